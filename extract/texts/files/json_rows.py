"""JSON files as tables: an object a line, a list of objects, or one object that holds columns.

A file is read twice, each time one row after another: first to see what its columns hold, then to
fill them. So rows may be of any length, files larger than the memory, and a column's type never
depends on its first rows. Strings stay strings, whatever they look like. A column that holds values
of several kinds is kept, each value as JSON, and tells what stands where if it is asked for.

Python's parser is chosen over Arrow's for what it refuses in words: too deep nesting, which ends
Arrow's by a segmentation fault, lone surrogates and numbers beyond 64 bits.
"""

from __future__ import annotations

import collections
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmembed.common.errors import DataError
from llmembed.common.scratch import gather
from llmembed.extract.texts.columns import MixedType
from llmembed.extract.texts.files.unpack import in_batches, open_unpacked

_BLOCK = 2**20
_BLANKS = re.compile(r"[ \t\r\n]*")
_LONGEST_TOKEN = 16
"""Characters of a broken number, literal or escape, which may be whole when more is read."""
_EMPTY_CELLS = 10**7
"""Cells that may be empty however few are filled."""
_EXACT_IN_FLOAT = 2**53
_MOST_DIGITS = 1000
"""Of a whole number that is read as one; Python refuses 4,300 or what it was told to."""
_DEEPEST = 100
"""Levels of nesting in a value; Python's own bound of some 1,000 depends on the caller."""
_HOW = 'Write one object a row, such as {"text": "...", "label": "..."}'

Row = Mapping[str, Any]


class _Beyond(str):
    """A number as written that Python does not read, or reads as infinite."""

    __slots__ = ()


class _DuplicateKeyError(ValueError):
    """An object has a key twice."""


_TEXT, _NULL, _BOOLEAN = "text", "nothing", "true or false"
_INTEGER, _LONG, _DECIMAL, _NAN = "a number", "a long number", "a decimal number", "NaN"
_ALONE: Mapping[str, str] = {
    "text with a lone surrogate": "Repair the encoding of that text.",
    "a number beyond 64 bits": "Write it as text, in quotes.",
    "a list": "A text or label is one value. Name another column; or, where a text has several "
    "labels, train with LLMEmbedClassifier (README, the same in Python).",
    "an object": "A text or label is one value. Name another column.",
}
"""Kinds that no column of texts or labels can have, and what to do."""
_SURROGATE, _BEYOND, _LIST, _OBJECT = _ALONE
_KINDS: Mapping[type, str] = {
    str: _TEXT,
    int: _INTEGER,
    float: _DECIMAL,
    bool: _BOOLEAN,
    type(None): _NULL,
    _Beyond: _BEYOND,
    list: _LIST,
    dict: _OBJECT,
}
_TYPES: tuple[tuple[frozenset[str], pa.DataType], ...] = (
    (frozenset(), pa.null()),
    (frozenset({_TEXT}), pa.large_string()),
    (frozenset({_BOOLEAN}), pa.bool_()),
    (frozenset({_INTEGER, _LONG}), pa.int64()),
    (frozenset({_INTEGER, _DECIMAL, _NAN}), pa.float64()),
)
"""The type of a column whose values are all among these kinds, the first that fits."""


def read_json(path: Path) -> pa.Table:
    """Read a file of JSON, packed or not.

    Returns:
        A table of large_string, int64, float64, bool and null columns, and of `MixedType` where
        none of them holds all values.

    Raises:
        DataError: it is no JSON, its rows are no objects, or it is not clear where they are.
        UnicodeDecodeError: it is not UTF-8.
    """
    schema = _survey(path)
    return gather(schema, (_batch(schema, rows) for rows in in_batches(_rows(path))))


def _survey(path: Path) -> pa.Schema:
    """See what each column holds, and in which row first."""
    columns: dict[str, dict[str, int]] = {}
    n_rows = n_values = 0
    for row, (members, _) in enumerate(_rows(path)):
        for name, value in members.items():
            if name not in columns:
                if _is_surrogate(name):
                    message = f"the key {name!r} holds a lone surrogate. Rename it."
                    raise DataError(f"{path}, row {row}: {message}")
                columns[name] = {}
            kind = _kind(value)
            columns[name].setdefault(kind, row)
            if kind in {_LIST, _OBJECT} and _is_deep(value, _DEEPEST):
                message = f"{name!r} is nested more than {_DEEPEST} deep. Repair the file."
                raise DataError(f"{path}, row {row}: {message}")
        n_rows, n_values = row + 1, n_values + len(members)
    if n_rows * len(columns) > _EMPTY_CELLS + 100 * n_values:
        raise DataError(
            f"{path} has {len(columns)} different keys in {n_rows} rows, nearly all of them "
            "missing in each row. Write the same keys in all rows."
        )
    return pa.schema([(name, _type(path, first)) for name, first in columns.items()])


def _type(path: Path, first: Mapping[str, int]) -> pa.DataType:
    """Choose the type of a column from its kinds, each with the first row that has it."""
    kinds = first.keys() - {_NULL}
    for fitting, kind in _TYPES:
        if kinds <= fitting:
            return kind
    for bad, remedy in _ALONE.items():
        if bad in first:
            return MixedType(f"holds {bad} in row {first[bad]} of {path.name}. {remedy}")
    (row_a, kind_a), (row_b, kind_b) = sorted((first[kind], kind) for kind in kinds)[:2]
    return MixedType(
        f"holds {kind_a} in row {row_a} and {kind_b} in row {row_b} of {path.name}. Write all of "
        "its values in one way, such as in quotes."
    )


def _kind(value: Any) -> str:
    kind = _KINDS[type(value)]
    if kind is _TEXT and _is_surrogate(value):
        return _SURROGATE
    if kind is _INTEGER and not -_EXACT_IN_FLOAT <= value <= _EXACT_IN_FLOAT:
        return _LONG if -(2**63) <= value < 2**63 else _BEYOND
    return _NAN if kind is _DECIMAL and value != value else kind


def _is_surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_deep(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        value = [*value.values()]
    return isinstance(value, list) and (
        levels == 0 or any(_is_deep(one, levels - 1) for one in value)
    )


def _batch(schema: pa.Schema, rows: Sequence[Row]) -> pa.RecordBatch:
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if isinstance(field.type, MixedType):
            texts = [None if value is None else json.dumps(value) for value in values]
            stored = pa.array(texts, pa.large_string())
            columns.append(pa.ExtensionArray.from_storage(field.type, stored))
        else:
            columns.append(pa.array(values, field.type))
    return pa.record_batch(columns, schema=schema)


def _rows(path: Path) -> Iterator[tuple[Row, int]]:
    """Give each row of a file, and the characters it took."""
    with open_unpacked(path) as file:
        values = _Values(path, io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        found = iter(values)
        start = list(itertools.islice(found, 2))
        if len(start) == 1 and not values.is_list and isinstance(start[0][0], dict):
            members, size = start[0]
            rows = _rows_in(path, members)
            start = [(row, size // max(1, len(rows))) for row in rows]
        for row, (members, size) in enumerate(itertools.chain(start, found)):
            if not isinstance(members, dict):
                raise DataError(f"{path}, row {row} is {_kind(members)}, not an object. {_HOW}.")
            yield members, size


def _rows_in(path: Path, whole: Row) -> Sequence[Row]:
    """Find the rows in an object that is all of a file.

    >>> _rows_in(Path("t.json"), {"data": [{"text": "a"}, {"text": "b"}], "version": 1})
    [{'text': 'a'}, {'text': 'b'}]
    >>> _rows_in(Path("t.json"), {"text": ["a", "b"], "label": [0, 1]})
    [{'text': 'a', 'label': 0}, {'text': 'b', 'label': 1}]
    >>> _rows_in(Path("t.json"), {"text": {"0": "a", "1": "b"}, "label": {"0": 0, "1": 1}})
    [{'text': 'a', 'label': 0}, {'text': 'b', 'label': 1}]
    """
    for name, value in whole.items():
        is_rows = isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
        if is_rows and (name == "data" or len(whole) == 1):
            return list(value)
    held = list(whole.values())
    if not all(isinstance(value, list | dict) for value in held) or not held:
        return [whole]
    if all(isinstance(value, dict) for value in held) and not all(map(str.isdigit, whole)):
        first = list(held[0])  # pandas: the index of each row, in each column
        if all(map(str.isdigit, first)) and all(list(value) == first for value in held):
            held = [list(value.values()) for value in held]
    is_columns = all(isinstance(value, list) and len(value) == len(held[0]) for value in held)
    nested = (isinstance(one, list | dict) for column in held for one in column)
    if is_columns and not any(nested):
        return [dict(zip(whole, row, strict=True)) for row in zip(*held, strict=True)]
    raise DataError(
        f"{path} is one JSON object in which it is not clear what a row is. {_HOW}, all in a list "
        "or one a line; in pandas df.to_json(path, orient='records', lines=True)."
    )


class _Values:
    """The values of a file, one after another or in a list, of which it holds little more than one.

    Iterating gives each value with the number of characters it took.
    """

    def __init__(self, path: Path, file: io.TextIOBase) -> None:
        self._path, self._file, self.is_list = path, file, False
        self._text, self._at, self._n_lines_before = "", 0, 0

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self.is_list = self._next() == "["
        if not self.is_list:
            while self._next():
                yield self._value()
            return
        self._at += 1
        is_open = self._next() != "]"
        while is_open:
            yield self._value()
            end = self._next()
            if end not in {",", "]"}:
                raise self._error("a comma or the end of the list is missing")
            is_open = end == ","
            if is_open:
                self._at += 1
                self._next()
        self._at += 1
        if self._next():
            raise self._error("there is more after the end of the list")

    def _next(self) -> str:
        """Skip blanks and give the character at which a value can begin; none at the end."""
        while True:
            match = _BLANKS.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def _value(self) -> tuple[Any, int]:
        while True:
            start = self._at
            try:
                value, self._at = _DECODER.raw_decode(self._text, start)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - _LONGEST_TOKEN
                is_open = error.msg.startswith("Unterminated string")
                if not ((is_cut or is_open) and self._read_more()):
                    self._at = error.pos
                    raise self._error(error.msg[:1].lower() + error.msg[1:]) from error
            except _DuplicateKeyError as error:
                raise self._error(str(error)) from error
            except RecursionError as error:
                raise self._error("lists and objects are nested too deeply") from error
            else:
                return value, self._at - start

    def _read_more(self) -> bool:
        """Read as much again as is not parsed yet, so that a long row is tried few times."""
        rest = self._text[self._at :]
        more = self._file.read(max(_BLOCK, len(rest)))
        if more:
            self._n_lines_before += self._text.count("\n", 0, self._at)
            self._text, self._at = rest + more, 0
        return bool(more)

    def _error(self, what: str) -> DataError:
        line = self._n_lines_before + self._text.count("\n", 0, self._at) + 1
        return DataError(f"{self._path}, line {line}: {what}. Repair the file.")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise _DuplicateKeyError(f"an object has the key {twice!r} more than once")
    return members


def _integer(digits: str) -> int | _Beyond:
    return int(digits) if len(digits) <= _MOST_DIGITS else _Beyond(digits)


def _decimal(digits: str) -> float | _Beyond:
    value = float(digits)
    return value if math.isfinite(value) else _Beyond(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_decimal)
