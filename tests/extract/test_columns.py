from __future__ import annotations

import datetime as dt
import decimal
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from llmembed.common import scratch
from llmembed.common.errors import DataError
from llmembed.extract.texts.columns import MixedType, as_labels, as_texts

TEXTS = ["a", "Ünï 🦙", "", "a"]
TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
]
WRAPPED: dict[str, Callable[[pa.Array], pa.Array]] = {
    "plain": lambda array: array,
    "category": lambda array: pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 0]), array),
}


def column(kind: pa.DataType, wrapped: str, values: list[Any] = TEXTS) -> pa.ChunkedArray:
    is_text = "string" in str(kind)
    held = [value.encode() if isinstance(value, str) else value for value in values]
    array = pa.array(values if is_text else held, kind)
    piece = WRAPPED[wrapped](array)
    return pa.chunked_array([piece, piece.slice(1)])


def unchecked(values: list[bytes]) -> pa.Array:
    """A string column whose writer did not look at its bytes."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("spool_from", [0, scratch.SPOOL_FROM_BYTES])
def test_text_is_text_however_arrow_holds_it(
    kind: pa.DataType, wrapped: str, spool_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Categories, views and UTF-8 bytes give plain strings, in memory and mapped."""
    monkeypatch.setattr(scratch, "SPOOL_FROM_BYTES", spool_from)
    found = as_texts("t.parquet", "text", column(kind, wrapped))
    assert found.type in (pa.string(), pa.large_string())
    assert found.to_pylist() == TEXTS + TEXTS[1:]


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_labels_are_read_as_texts_are(kind: pa.DataType, wrapped: str) -> None:
    """A label column of any of these types names its classes by its texts."""
    assert as_labels("t.parquet", "label", column(kind, wrapped)).to_pylist() == TEXTS + TEXTS[1:]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([decimal.Decimal("1.00"), None, decimal.Decimal("-2.00")], ["1", None, "-2"]),
        ([decimal.Decimal(10) ** 30], ["1" + "0" * 30]),
        ([decimal.Decimal("0.5"), None, decimal.Decimal(1)], [0.5, None, 1.0]),
        ([1, 2], [1, 2]),
        ([True, None], [True, None]),
    ],
)
def test_labels_that_are_numbers_keep_their_value(
    values: list[object], expected: list[object]
) -> None:
    """Whole decimals become their digits, all of them; other numbers stay what they are."""
    assert as_labels("t", "label", pa.chunked_array([values])).to_pylist() == expected


@pytest.mark.parametrize(
    "piece",
    [
        unchecked([b"a", b"b\xff"]),
        pa.array([b"a", b"b\xff"]),
        pa.array([b"a", b"b\xff" + b"b" * 20], pa.binary_view()),
        pa.DictionaryArray.from_arrays(pa.array([0, 1]), unchecked([b"a", b"b\xff"])),
    ],
    ids=lambda piece: str(piece.type),
)
@pytest.mark.parametrize("read", [as_texts, as_labels])
def test_bytes_that_are_not_utf8_are_named_with_their_row(
    piece: pa.Array, read: Callable[..., pa.ChunkedArray]
) -> None:
    """What a writer called text, and is none, is refused before it reaches a tokenizer."""
    with pytest.raises(DataError, match=r"^t, row 3: column 'c' holds bytes that are not UTF-8\. "):
        read("t", "c", pa.chunked_array([piece.slice(0, 1), piece.slice(0, 1), piece]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "column 'text' of t holds int64, not text. Name a column of texts with --text-co"),
        ([0.5], "column 'text' of t holds double, not text"),
        ([True], "column 'text' of t holds bool, not text"),
        ([["a"]], "column 'text' of t holds list<item: string>, not text"),
        ([dt.date(2024, 1, 1)], "column 'text' of t holds date32[day], not text"),
        (["a", None, None], "t, row 1: the text is missing (2 rows in all)"),
        ([None], "t, row 0: the text is missing (1 rows in all)"),
    ],
)
def test_what_is_not_text_is_refused_with_its_type(values: list[object], message: str) -> None:
    """Numbers, dates, lists and nothing are never turned into texts."""
    with pytest.raises(DataError, match="^" + re.escape(message)):
        as_texts("t", "text", pa.chunked_array([values]))


@pytest.mark.parametrize("read", [as_texts, as_labels])
def test_a_column_of_several_kinds_tells_why_when_it_is_asked_for(
    read: Callable[..., pa.ChunkedArray],
) -> None:
    """The reason stays with the column through a mapped file."""
    kind = MixedType("holds text in row 0 and a number in row 1. Write one kind.")
    values = pa.ExtensionArray.from_storage(kind, pa.array(['"a"', "1"], pa.large_string()))
    batch = pa.record_batch({"text": values})
    mapped = scratch.spool(batch.schema, [batch])
    with pytest.raises(DataError, match=r"^column 'text' of t holds text in row 0 and a number"):
        read("t", "text", mapped["text"])


def test_a_damaged_column_is_refused() -> None:
    """Offsets beyond the bytes are found before anything follows them."""
    offsets = pa.array([0, 100, 4], pa.int32()).buffers()[1]
    piece = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"abcd")])
    with pytest.raises(DataError, match=r"^column 'text' of t is damaged: Offset .* Write the fil"):
        as_texts("t", "text", pa.chunked_array([piece]))


def test_labels_of_an_extension_are_refused_with_its_name() -> None:
    """What only another program knows how to read names no class."""
    column = pa.chunked_array([pa.array(["1", "2"], pa.json_())])
    with pytest.raises(DataError, match=r"^column 'label' of t holds extension<arrow\.json>; la"):
        as_labels("t", "label", column)


def test_small_decimals_are_labels() -> None:
    """Decimals of 32 and 256 bits are whole numbers as those of 128 are."""
    for kind in (pa.decimal32(5, 1), pa.decimal256(50, 3)):
        column = pa.chunked_array([pa.array([decimal.Decimal(2), None], kind)])
        assert as_labels("t", "label", column).to_pylist() == ["2", None]
