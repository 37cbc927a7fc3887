"""Columns of a table as plain texts or as labels, however Arrow holds them.

Text is what Arrow calls a string, also as a category (dictionary), a view, or as bytes that are
UTF-8. Numbers, dates and lists are not text, and are never turned into it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute

from llmembed.common.errors import ConfigError, DataError, listed
from llmembed.common.scratch import forget_pages, gather
from llmembed.extract.texts.templates import SEPARATOR

_TEXT_TYPES = (pa.string(), pa.large_string())
_BYTES_OR_VIEWS = (pa.binary(), pa.large_binary(), pa.string_view(), pa.binary_view())
_TEXT_NAMES = ("text", "sentence", "content", "review", "document", "body", "title")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "topic")


def label_columns_of(
    columns: Sequence[str], asked: str | None, text_asked: str | None
) -> list[str]:
    """Name the column of labels: the one that is asked for, or the first of the usual ones.

    Several that are asked for, with commas between, are a label each. Where the column of texts
    cannot be told either, one error asks for both.
    """
    if asked is None:
        usual = {column.lower() for column in columns}
        if len(columns) > 2 and text_asked is None and usual.isdisjoint(LABEL_NAMES + _TEXT_NAMES):
            raise DataError(
                f"no column looks like the text or the label among {listed(columns)}. Name them "
                "with --text-column NAME and --label-column NAME."
            )
        return [_usual("label", columns, LABEL_NAMES)]
    if asked in columns:
        return [asked]
    names = [name.strip() for name in asked.split(",")]
    for place, name in enumerate(names):
        if name not in columns:
            raise ConfigError.unknown("column", name, columns, "Pass one to --label-column.")
        if name in names[:place]:
            raise ConfigError(f"--label-column {asked} names {name!r} twice. Name each once.")
    return names


def text_columns_of(columns: Sequence[str], asked: str | None) -> list[str]:
    """Name the column of texts, or the two of pairs, which are asked for with a comma between.

    >>> text_columns_of(["premise", "hypothesis", "label"], "premise,hypothesis")
    ['premise', 'hypothesis']
    >>> text_columns_of(["id", "Review"], None), text_columns_of(["anything"], None)
    (['Review'], ['anything'])
    """
    if asked is None:
        return [*columns] if len(columns) == 1 else [_usual("text", columns, _TEXT_NAMES)]
    if asked in columns:
        return [asked]
    names = [name.strip() for name in asked.split(",")]
    if len(names) > 2:
        raise ConfigError(f"--text-column {asked} names {len(names)} columns. Name one or two.")
    for name in names:
        if name not in columns:
            raise ConfigError.unknown("column", name, columns, "Pass one to --text-column.")
    return names


def _usual(kind: str, columns: Sequence[str], usual: Sequence[str]) -> str:
    by_name = {column.lower(): column for column in columns}
    for name in usual:
        if name in by_name:
            return by_name[name]
    raise DataError(
        f"no column looks like the {kind} among {listed(columns)}. Name it with --{kind}-column "
        "NAME."
    )


def texts_of(where: str, table: pa.Table, names: Sequence[str]) -> pa.ChunkedArray:
    """Give a column of texts, or two as pairs, as `as_texts` does."""
    columns = [as_texts(where, name, table[name]) for name in names]
    if len(columns) == 1:
        return columns[0]
    for column in columns:
        holds = pyarrow.compute.match_substring(column, SEPARATOR).combine_chunks()
        row = holds.index(True).as_py()
        if row >= 0:
            raise DataError(
                f"{where}, row {row}: the text holds U+001F, which separates the texts of a pair. "
                "Remove it."
            )
    wide = [column.cast(pa.large_string()) for column in columns]
    separator = pa.scalar(SEPARATOR, pa.large_string())
    return pyarrow.compute.binary_join_element_wise(*wide, separator)


def as_texts(where: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Give a column `[N]` as string or large_string: valid UTF-8, none missing.

    Raises:
        DataError: it holds something else; the message says `where`, such as "reviews.csv".

    >>> as_texts("toy.parquet", "text", pa.chunked_array([[b"a", b"b"]])).to_pylist()
    ['a', 'b']
    """
    plain = _plain(where, name, column)
    if plain.null_count:
        row = int(np.flatnonzero(plain.is_null().to_numpy())[0])
        raise DataError(
            f"{where}, row {row}: the text is missing ({plain.null_count} rows in all). Remove "
            "such rows, or write an empty text, which is legal."
        )
    if plain.type not in _TEXT_TYPES:
        raise DataError(
            f"column {name!r} of {where} holds {column.type}, not text. Name a column of texts "
            "with --text-column, or write its values as text."
        )
    return plain


def as_labels(where: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Give a column of labels `[N]` in types whose values name classes as they are.

    Text becomes strings, whole decimals their digits, other decimals floats; a category stays one.

    Raises:
        DataError: it holds values of several kinds, of an extension, or bytes that are not UTF-8.

    >>> whole = pa.array(["1.0", "0.0"]).cast(pa.decimal128(3, 1))
    >>> as_labels("toy.parquet", "label", pa.chunked_array([whole])).to_pylist()
    ['1', '0']
    """
    plain = _plain(where, name, column)
    if pa.types.is_decimal(plain.type):
        try:
            return plain.cast(pa.decimal256(76, 0)).cast(pa.large_string())
        except pa.ArrowInvalid:  # not all of them are whole
            return plain.cast(pa.float64())
    if isinstance(plain.type, pa.BaseExtensionType):
        raise DataError(
            f"column {name!r} of {where} holds {plain.type}; labels are strings, integers or "
            "booleans. Name another column with --label-column."
        )
    return plain.dictionary_encode() if pa.types.is_dictionary(column.type) else plain


class MixedScalar(pa.ExtensionScalar):  # type: ignore[misc]  # pyarrow is untyped
    """One value of a `MixedType`."""

    def as_py(self, **_: Any) -> Any:
        """Give the value, or its JSON where it holds text that no file could be given."""
        if self.value is None:
            return None
        text = self.value.as_py()
        value = json.loads(text)
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return text
        return value


class MixedType(pa.ExtensionType):  # type: ignore[misc]  # pyarrow is untyped
    """The type of a column of JSON that no Arrow type holds: each value as JSON, and why.

    Such a column does no harm until it is asked for texts or labels; `to_pylist` gives its values.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        """What it holds and where, to follow the column's name in a message."""
        super().__init__(pa.large_string(), "llmembed.mixed")

    def __arrow_ext_serialize__(self) -> bytes:
        """Keep the reason, in a mapped file too."""
        return self.reason.encode()

    def __arrow_ext_scalar_class__(self) -> type[MixedScalar]:
        """Say what one value is."""
        return MixedScalar

    @classmethod
    def __arrow_ext_deserialize__(cls, _storage: pa.DataType, serialized: bytes) -> Self:
        """Take the reason back."""
        return cls(serialized.decode())


pa.register_extension_type(MixedType())


def _plain(where: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Take off what is around the texts of a column (categories, views, bytes), and check each."""
    if isinstance(column.type, MixedType):
        raise DataError(f"column {name!r} of {where} {column.type.reason}")
    schema = pa.schema([(name, _plain_type(column.type))])
    pieces = _pieces(where, name, column, schema.field(0).type)
    batches = (pa.record_batch([piece], schema=schema) for piece in pieces)
    if schema.field(0).type == column.type:
        for _ in batches:
            forget_pages()
        return column
    return gather(schema, batches)[name]


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Name the type of what a column holds; of texts one that takes more than 2 GB, if need be."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.large_string() if _holds_text(value) and kind != pa.string() else value


def _pieces(
    where: str, name: str, column: pa.ChunkedArray, kind: pa.DataType
) -> Iterator[pa.Array]:
    n_before = 0
    for chunk in column.chunks:
        try:
            _refuse_damaged(chunk)
            if pa.types.is_dictionary(chunk.type):  # only texts that some row has must be UTF-8
                content = _as_bytes(chunk.dictionary).take(chunk.indices)
            else:
                content = _as_bytes(chunk)
            yield content.cast(kind)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise DataError(
                    f"column {name!r} of {where} is damaged: {error}. Write the file anew."
                ) from error
            raise DataError(
                f"{where}, row {n_before + _first_bad(content)}: column {name!r} holds bytes that "
                "are not UTF-8. Decode them with their own encoding and write the file anew."
            ) from error
        n_before += len(chunk)


def _as_bytes(array: pa.Array) -> pa.Array:
    """Give texts as bytes, whose cast to text looks at each; other values as they are."""
    return array.cast(pa.large_binary()) if _holds_text(array.type) else array


def _refuse_damaged(chunk: pa.Array) -> None:
    try:
        chunk.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise


def _first_bad(content: pa.Array) -> int:
    for row, value in enumerate(content.to_pylist()):
        try:
            (value or b"").decode()
        except UnicodeDecodeError:
            return row
    raise AssertionError("all are UTF-8")


def _holds_text(kind: pa.DataType) -> bool:
    is_text = kind in (*_TEXT_TYPES, *_BYTES_OR_VIEWS)
    return is_text or bool(pa.types.is_fixed_size_binary(kind))
