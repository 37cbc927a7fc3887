"""Texts that come in pairs (premise and hypothesis, question and answer), each held as one string.

The two are joined by the unit separator U+001F, which no text may hold by itself. So hashes,
duplicates, caches and predictions deal with a pair as with any text; only the tokenizer, which has
its own way of joining two texts, and a template with {text_a} and {text_b} take it apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute

from llmembed.common.errors import ConfigError, DataError

SEPARATOR = "\x1f"


def column_names(text_column: str, columns: Sequence[str]) -> list[str]:
    """Take apart what `--text-column` names: one column, or two with a comma between.

    Raises:
        ConfigError: a column does not exist, or more than two are named.

    >>> column_names("premise,hypothesis", ["premise", "hypothesis", "label"])
    ['premise', 'hypothesis']
    """
    if text_column in columns:
        return [text_column]
    names = [name.strip() for name in text_column.split(",")]
    if len(names) > 2:
        message = f"--text-column {text_column} names {len(names)} columns. Name one or two."
        raise ConfigError(message)
    for name in names:
        if name not in columns:
            raise ConfigError.unknown("column", name, columns, "Pass one to --text-column.")
    return names


def join_columns(split: str, first: pa.ChunkedArray, second: pa.ChunkedArray) -> pa.ChunkedArray:
    """Join two columns of texts `[N]` into one of pairs.

    Raises:
        DataError: a text holds the separator.
    """
    for column in (first, second):
        holds = pyarrow.compute.match_substring(column, SEPARATOR).combine_chunks()
        row = holds.index(True).as_py()
        if row >= 0:
            message = (
                f"split {split!r}, row {row}: the text holds U+001F, which separates the texts of "
                "a pair. Remove it."
            )
            raise DataError(message)
    wide = [column.cast(pa.large_string()) for column in (first, second)]
    separator = pa.scalar(SEPARATOR, pa.large_string())
    return pyarrow.compute.binary_join_element_wise(*wide, separator)


def fill(template: str | None, texts: Sequence[str], *, text_pair: bool) -> list[list[str]]:
    r"""Give what the tokenizer takes: one list of texts, or for pairs without a template two.

    Raises:
        DataError: a text is not a pair and should be.

    >>> fill("{text_a} -> {text_b}", ["rain\x1fwet"], text_pair=True)
    [['rain -> wet']]
    >>> fill(None, ["rain\x1fwet"], text_pair=True)
    [['rain'], ['wet']]
    """
    if not text_pair:
        return [[template.format(text=text) for text in texts] if template else list(texts)]
    pairs = [text.split(SEPARATOR) for text in texts]
    for row, pair in enumerate(pairs):
        if len(pair) != 2:
            message = (
                f"text {row} is not a pair, which the features are made of. Pass a file with two "
                "columns (--text-column a,b), or join two strings by U+001F."
            )
            raise DataError(message)
    if template:
        return [[template.format(text_a=first, text_b=second) for first, second in pairs]]
    return [[first for first, _ in pairs], [second for _, second in pairs]]


def describe_bad_text(texts: Sequence[Any]) -> str:
    """Name the first text that is no Unicode string."""
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {row} is a {type(text).__name__}, not a string. Pass strings only."
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"text {row} holds a lone surrogate, which is not Unicode. Repair its encoding."
    return "the texts cannot be tokenised. Pass a list of strings."
