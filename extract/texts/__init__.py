"""From a data set, file or folder to texts and labels.

`corpora` has the verb and needs Arrow: it is imported where texts are read.
"""

from llmembed.extract.texts.options import (
    DATASETS,
    DatasetAlias,
    DatasetOptions,
    Dialect,
    register_dataset,
)
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
