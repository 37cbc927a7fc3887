"""Files of texts as Arrow tables: csv, tsv, Orange tab, json, jsonl, parquet, arrow, feather.

`read_table` is the one door for every file, and reads nothing whole that may be large. What cannot
be read is refused with the file and, where it is known, the line or row. What a column must hold to
be texts or labels, `columns` decides.
"""

from __future__ import annotations

import collections
import csv
import functools
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from llmembed.common import scratch
from llmembed.common.errors import DataError, warn
from llmembed.common.regular import open_regular, require_regular
from llmembed.extract.texts.columns import MixedType
from llmembed.extract.texts.options import AS_THE_SUFFIX_SAYS, NO_QUOTES, Dialect
from llmembed.extract.texts.templates import is_unicode

_SHOWN_CHARACTERS = 200  # of a path in a message
PACKED: Mapping[str, str] = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # as Arrow names it
_MOST_GROWTH = 250  # texts pack to a hundredth at best; what grows more was made to fill a disk
_AT_ONCE = 2**24  # characters of the rows that are turned into Arrow together
One = TypeVar("One")


def read_table(path: Path, dialect: Dialect = AS_THE_SUFFIX_SAYS) -> pa.Table:
    """Read one file, whose suffix is among `READERS`: distinct columns, and at least one row.

    Raises:
        DataError: unknown suffix, no regular file, unreadable content, a column twice, or no rows.
        ConfigError: a dialect for a file that is not delimited.
    """
    _, suffix = split_suffix(path.name)
    base, _ = _cut(suffix, PACKED)
    try:
        require_regular(path)
        if base not in READERS:
            packed = f"{', '.join(_TEXT_READERS)} may be packed ({', '.join(PACKED)})."
            remedy = f"Convert the file to one of them; {packed}"
            raise DataError.unknown(f"{path}: the file format", path.suffix, READERS, remedy)
        if base not in _DELIMITED:
            dialect.refuse_for(str(path))
        table = _DELIMITED[base](path, dialect) if base in _DELIMITED else READERS[base](path)
        repeated = collections.Counter(table.column_names).most_common(1)
    except UnicodeDecodeError as error:
        raise DataError(_bad_encoding(path)) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(unreadable(path, error)) from error
    if repeated and repeated[0][1] > 1:
        raise DataError(f"{path} has the column {repeated[0][0]!r} more than once. Rename one.")
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows. Pass a file with at least one example.")
    return table


def split_suffix(name: str) -> tuple[str, str]:
    """Split the name of a file into its stem and the suffix that says how it is read.

    >>> split_suffix("reviews.v2.CSV.gz"), split_suffix("README.md")
    (('reviews.v2', '.csv.gz'), ('README.md', ''))
    """
    stem, packed = _cut(name, PACKED)
    stem, suffix = _cut(stem, _TEXT_READERS if packed else READERS)
    return (stem, suffix + packed) if suffix else (name, "")


def short(name: str) -> str:
    """Cut what is too long for a message."""
    if len(name) <= _SHOWN_CHARACTERS:
        return name
    return f"{name[:_SHOWN_CHARACTERS]}... ({len(name)} characters)"


def _cut(name: str, known: Container[str]) -> tuple[str, str]:
    suffix = Path(name).suffix
    is_known = suffix.lower() in known
    return (name.removesuffix(suffix), suffix.lower()) if is_known else (name, "")


def _read_orange(path: Path, dialect: Dialect) -> pa.Table:
    """Read Orange's format: below the names stand a line of types and one of roles."""
    table = _read_delimited(path, dialect, delimiter="\t", quote=NO_QUOTES, skip=2)
    if not table.num_rows:
        return table
    filled = [pyarrow.compute.not_equal(column, "") for column in table.columns]
    return table.filter(functools.reduce(pyarrow.compute.or_, filled))


def _read_parquet(path: Path) -> pa.Table:
    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        return scratch.gather(file.schema_arrow, file.iter_batches())


def _read_arrow(path: Path) -> pa.Table:
    """Map Arrow's IPC, which Feather is, as a file or as a stream."""
    with open_regular(path) as file:
        is_file = file.read(6) == b"ARROW1"
    source = pa.memory_map(str(path))
    return (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()


def unreadable(path: Path, error: Exception) -> str:
    """Say in a sentence why a file or folder cannot be read."""
    if isinstance(error, OSError) and error.strerror:
        name = short(str(path))
        return f"{name} cannot be read: {error.strerror}. Check the path and who may read it."
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    kind = split_suffix(path.name)[1].lstrip(".")
    return f"{path} cannot be read as {kind}: {reason.rstrip('.')}. Repair the file."


def _bad_encoding(path: Path) -> str:
    if _cut(path.name, PACKED)[1] or _cut(path.name, _TEXT_READERS)[1]:
        with _open_unpacked(path) as file:
            for line, content in enumerate(file, start=1):
                try:
                    content.decode()
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{content[error.start]:02x}"
                    return f"{path}, line {line}: {byte} is not UTF-8. Save the file as UTF-8."
    return f"{path}: the name of a column is not UTF-8. Write the file anew."


def _open_unpacked(path: Path) -> BinaryIO:
    file = open_regular(path)
    codec = PACKED.get(path.suffix.lower())
    return io.BufferedReader(_Unpacked(file, codec, path), 2**20) if codec else file


def _in_batches(rows: Iterable[tuple[One, int]]) -> Iterator[list[One]]:
    """Cut rows, each with its size in characters, into lists of about 16 MiB.

    >>> list(_in_batches([("a", 2**24), ("b", 1), ("c", 1)]))
    [['a'], ['b', 'c']]
    """
    held, size = [], 0
    for row, n_characters in rows:
        held.append(row)
        size += n_characters
        if size >= _AT_ONCE:
            yield held
            held, size = [], 0
    if held:
        yield held


class _Unpacked(io.RawIOBase):
    """What a packed file holds, up to the bound."""

    def __init__(self, file: BinaryIO, codec: str, path: Path) -> None:
        self._file, self._stream, self._path = file, pa.CompressedInputStream(file, codec), path
        size_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._left_bytes = max(scratch.SPOOL_FROM_BYTES, _MOST_GROWTH * size_bytes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise DataError(
                f"{self._path} unpacks to more than {_MOST_GROWTH} times its size, which texts do "
                "not. If it is meant so, unpack it first."
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        super().close()
        self._file.close()


_DELIMITERS = ",;\t|"
_LONGEST_FIELD = 2**31 - 1  # characters; the csv module keeps it in a C long


def _read_delimited(
    path: Path, dialect: Dialect, *, delimiter: str, quote: str = '"', skip: int = 0
) -> pa.Table:
    r"""Read a delimited file as columns of text, leaving out rows below the header.

    The rules are those of RFC 4180, to the letter: a reader that forgives others turns
    `"say \"hi\""` into some other text.
    """
    delimiter, quote = dialect.delimiter or delimiter, dialect.csv_quote or quote
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with _open_unpacked(path) as file:
            reader = csv.reader(
                io.TextIOWrapper(file, encoding="utf-8-sig", newline=""),
                delimiter=delimiter,
                quotechar=None if quote == NO_QUOTES else quote,
                quoting=csv.QUOTE_NONE if quote == NO_QUOTES else csv.QUOTE_MINIMAL,
                escapechar=dialect.csv_escape,
                strict=True,
            )
            records = _records(path, reader, quote, skip)
            names = _names(path, next(records, ([], 0))[0])
            if dialect.delimiter is None:
                _refuse_other_delimiter(path, names, delimiter)
            schema = pa.schema([(name, pa.large_string()) for name in names])
            return scratch.gather(schema, (_batch(schema, rows) for rows in _in_batches(records)))
    finally:
        csv.field_size_limit(limit)


def _batch(schema: pa.Schema, rows: list[list[str]]) -> pa.RecordBatch:
    columns = [pa.array(values, pa.large_string()) for values in zip(*rows, strict=True)]
    return pa.record_batch(columns, schema=schema)


def _records(path: Path, reader: Any, quote: str, skip: int) -> Iterator[tuple[list[str], int]]:
    """Give the header and each row that is not blank, with their sizes."""
    n_columns, n_records = 0, 0
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, {_broken(error, line, reader.line_num, quote)}") from error
        if fields is None:
            return
        n_records += bool(fields)
        if not fields or 1 < n_records <= 1 + skip:
            continue
        n_columns = n_columns or len(fields)
        if len(fields) != n_columns:
            raise DataError(
                f"{path}, line {line}: the number of fields is {len(fields)}, but the header has "
                f"{n_columns}. Quote fields that hold the delimiter, or pass the right "
                "--delimiter, or --csv-escape '\\' if quotes inside are escaped by it."
            )
        yield fields, sum(map(len, fields))


def _broken(error: csv.Error, line: int, last_line: int, quote: str) -> str:
    if "unexpected end" in str(error):
        return (
            f"line {line}: a quote opens here that nothing closes. Close it; or, if quotes are "
            "characters as any other, pass --csv-quote none."
        )
    if "expected after" in str(error):
        where = f"line {line}" if line == last_line else f"lines {line} to {last_line}"
        return (
            f"{where}: a quoted field has a {quote} inside that is not doubled. Double it; or pass "
            f"--csv-escape '\\' if the file writes \\{quote}, or --csv-quote none if quotes are "
            "characters as any other."
        )
    return f"line {line}: {error}. Repair the line."


def _names(path: Path, header: list[str]) -> list[str]:
    blank = [name for name in header if name != name.strip()]
    if blank:
        warn(
            f"{path}: the column {blank[0]!r} is named without the blanks around it, as all are; "
            "the fields keep theirs."
        )
    return [name.strip() for name in header]


def _refuse_other_delimiter(path: Path, names: list[str], delimiter: str) -> None:
    others = [one for one in _DELIMITERS if one != delimiter and one in "".join(names)]
    if len(names) == 1 and others:
        other, own = ("tab" if one == "\t" else repr(one) for one in (others[0], delimiter))
        raise DataError(
            f"{path} has one column, {names[0]!r}, whose name holds another delimiter. Pass "
            f"--delimiter {other}, or --delimiter {own} if it is one column."
        )


_BLOCK = 2**20
_CHARACTER = re.compile(r"[^ \t\r\n]")
_LONGEST_TOKEN = 16  # characters of a broken number, literal or escape, whole when more is read
_EMPTY_CELLS = 10**7  # cells that may be empty however few are filled
_EXACT_IN_FLOAT = 2**53
_MOST_DIGITS = 1000  # of a whole number; Python refuses 4,300, or what it was told to
_DEEPEST = 100  # levels of nesting; Python's own bound of some 1,000 depends on the caller
_HOW = 'Write one object a row, such as {"text": "...", "label": "..."}'

Row = Mapping[str, Any]


class _Beyond(str):
    """A number as written that Python does not read, or reads as infinite."""

    __slots__ = ()


_TEXT, _NULL, _BOOLEAN = "text", "nothing", "true or false"
_INTEGER, _LONG, _DECIMAL, _NAN = "a number", "a long number", "a decimal number", "NaN"
_ALONE: Mapping[str, str] = {
    "text with a lone surrogate": "Repair the encoding of that text.",
    "a number beyond 64 bits": "Write it as text, in quotes.",
    "a list": "A text is one value; where a text has several labels, each row has a list of texts "
    "or of whole numbers. Write it so, or name another column.",
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
_OF_LABELS = (pa.large_string(), pa.bool_(), pa.int64())  # what the lists of a column may hold


def _read_json(path: Path) -> pa.Table:
    """Read JSON: an object a line, a list of objects, or one object that holds columns.

    It is read twice, row by row: first to see what its columns hold, so that a column's type never
    depends on its first rows, then to fill them. Python's parser refuses in words what ends Arrow's
    by a segmentation fault (too deep nesting), lone surrogates and numbers beyond 64 bits.
    """
    schema = _survey(path)
    batches = _in_batches(_json_rows(path))
    return scratch.gather(schema, (_json_batch(schema, rows) for rows in batches))


def _survey(path: Path) -> pa.Schema:
    """See what each column holds, and in which row first."""
    columns: dict[str, dict[str, int]] = {}
    inside: dict[str, set[str]] = {}  # kinds in the lists of a column
    n_rows = n_values = 0
    for row, (members, _) in enumerate(_json_rows(path)):
        for name, value in members.items():
            if name not in columns:
                columns[name] = {}
                if not is_unicode(name):
                    wrong = f"the key {name!r} holds a lone surrogate. Rename it."
                    raise DataError(f"{path}, row {row}: {wrong}")
            kind = _kind(value)
            columns[name].setdefault(kind, row)
            if kind is _LIST:
                inside.setdefault(name, set()).update(map(_kind, value))
            if kind in {_LIST, _OBJECT} and _is_deep(value, _DEEPEST):
                wrong = f"{name!r} is nested more than {_DEEPEST} deep. Repair the file."
                raise DataError(f"{path}, row {row}: {wrong}")
        n_rows, n_values = row + 1, n_values + len(members)
    if n_rows * len(columns) > _EMPTY_CELLS + 100 * n_values:
        raise DataError(
            f"{path} has {len(columns)} different keys in {n_rows} rows, nearly all of them "
            "missing in each row. Write the same keys in all rows."
        )
    found = {name: _type(path, first, inside.get(name, ())) for name, first in columns.items()}
    return pa.schema(list(found.items()))


def _type(path: Path, first: Mapping[str, int], inside: Iterable[str]) -> pa.DataType:
    """Choose the type of a column from its kinds, each with the first row that has it.

    A column of nothing but lists has a type where the lists may be labels.
    """
    kinds = first.keys() - {_NULL}
    if kinds == {_LIST}:
        held = {*inside} - {_NULL}
        fits = [kind for fitting, kind in _TYPES if held <= fitting]
        if not held or (fits and fits[0] in _OF_LABELS):
            return pa.large_list(fits[0])
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
    if kind is _TEXT and not is_unicode(value):
        return _SURROGATE
    if kind is _INTEGER and not -_EXACT_IN_FLOAT <= value <= _EXACT_IN_FLOAT:
        return _LONG if -(2**63) <= value < 2**63 else _BEYOND
    return _NAN if kind is _DECIMAL and value != value else kind


def _is_deep(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        value = [*value.values()]
    return isinstance(value, list) and (
        levels == 0 or any(_is_deep(one, levels - 1) for one in value)
    )


def _json_batch(schema: pa.Schema, rows: Sequence[Row]) -> pa.RecordBatch:
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if isinstance(field.type, MixedType):
            values = [None if value is None else json.dumps(value) for value in values]
        columns.append(pa.array(values, field.type))
    return pa.record_batch(columns, schema=schema)


def _json_rows(path: Path) -> Iterator[tuple[Row, int]]:
    """Give each row of a file, and the characters it took."""
    with _open_unpacked(path) as file:
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
    """Gives each value of a file with its size in characters, and holds little more than one."""

    def __init__(self, path: Path, file: io.TextIOBase) -> None:
        self._path, self._file, self.is_list = path, file, False
        self._text, self._at, self._n_lines_before = "", 0, 0

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self.is_list = self._skip("[")
        if not self.is_list:
            while self._next():
                yield self._value()
            return
        is_open = not self._skip("]")
        while is_open:
            yield self._value()
            is_open = self._skip(",")
            if not (is_open or self._skip("]")):
                raise self._error("a comma or the end of the list is missing")
        if self._next():
            raise self._error("there is more after the end of the list")

    def _skip(self, character: str) -> bool:
        is_next = self._next() == character
        self._at += is_next
        return is_next

    def _next(self) -> str:
        """Skip blanks and give the character at which a value can begin; none at the end."""
        while not (match := _CHARACTER.search(self._text, self._at)):
            self._at = len(self._text)
            if not self._read_more():
                return ""
        self._at = match.start()
        return match[0]

    def _value(self) -> tuple[Any, int]:
        self._next()
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
            except ValueError as error:  # of `_object`
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
        raise ValueError(f"an object has the key {twice!r} more than once")
    return members


def _integer(digits: str) -> int | _Beyond:
    return int(digits) if len(digits) <= _MOST_DIGITS else _Beyond(digits)


def _decimal(digits: str) -> float | _Beyond:
    value = float(digits)
    return value if math.isfinite(value) else _Beyond(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_decimal)


_DELIMITED: Mapping[str, Callable[..., pa.Table]] = {
    ".csv": functools.partial(_read_delimited, delimiter=","),
    ".tsv": functools.partial(_read_delimited, delimiter="\t"),
    ".tab": _read_orange,
}
_TEXT_READERS = {**_DELIMITED, **dict.fromkeys((".json", ".jsonl", ".ndjson"), _read_json)}
_ARROW_READERS = dict.fromkeys((".arrow", ".ipc", ".feather"), _read_arrow)
READERS = {**_TEXT_READERS, ".parquet": _read_parquet, **_ARROW_READERS}
"""Suffix -> who reads such a file."""
