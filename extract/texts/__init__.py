"""From a data set, file or folder to texts and labels.

    options -> origins (aliases, files) -> columns, labels -> corpora

`corpora` has the verb, `load_corpus`. It needs Arrow, so it is imported where texts are read, and
here stands what options and tokenizers need.
"""

from llmembed.extract.texts.aliases import DATASETS, DatasetAlias, register_dataset
from llmembed.extract.texts.options import DatasetOptions, Dialect
from llmembed.extract.texts.templates import SEPARATOR, describe_bad_text, fill, template_fields

__all__ = [
    "DATASETS",
    "SEPARATOR",
    "DatasetAlias",
    "DatasetOptions",
    "Dialect",
    "describe_bad_text",
    "fill",
    "register_dataset",
    "template_fields",
]
