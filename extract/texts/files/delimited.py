r"""Delimited files (csv, tsv, Orange's tab) as tables of which every column is text.

Nothing is guessed: a text "null" stays a text, a label "01" stays "01", a date stays as written.
The rules are those of RFC 4180, to the letter: a quote inside quotes is doubled. A reader that
forgives others turns `"say \"hi\""` into some other text, so what breaks the rules is refused with
its line and the way out.
"""

from __future__ import annotations

import contextlib
import csv
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmembed.common.errors import DataError, LLMEmbedWarning
from llmembed.extract.texts.files.dialect import NO_QUOTES, Dialect
from llmembed.extract.texts.files.unpack import in_batches, open_unpacked
from llmembed.extract.texts.spool import gather

_DELIMITERS = ",;\t|"
_LONGEST_FIELD = 2**31 - 1
"""Characters; the csv module keeps it in a C long."""


def read_delimited(
    path: Path, dialect: Dialect, *, delimiter: str, quote: str = '"', skip: int = 0
) -> pa.Table:
    """Read a delimited file.

    Args:
        path: of the file, packed or not.
        dialect: what was said about it.
        delimiter: what its suffix says.
        quote: what its suffix says.
        skip: rows below the header that are none.

    Returns:
        A table of large_string columns.

    Raises:
        DataError: a row has more or fewer fields than the header, quotes break the rules, or it
            seems to have another delimiter.
        UnicodeDecodeError: it is not UTF-8.
    """
    delimiter, quote = dialect.delimiter or delimiter, dialect.quote or quote
    with open_unpacked(path) as file, _fields_of_any_length():
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(
            lines,
            delimiter=delimiter,
            quotechar=None if quote == NO_QUOTES else quote,
            quoting=csv.QUOTE_NONE if quote == NO_QUOTES else csv.QUOTE_MINIMAL,
            escapechar=dialect.escape,
            strict=True,
        )
        records = _records(path, reader, quote)
        header = _names(path, next(records, (0, []))[1])
        if dialect.delimiter is None:
            _refuse_other_delimiter(path, header, delimiter)
        rows = _rows(path, records, header, skip)
        schema = pa.schema([(name, pa.large_string()) for name in header])
        return gather(schema, (_batch(schema, batch) for batch in in_batches(rows)))


def _batch(schema: pa.Schema, rows: Sequence[Sequence[str]]) -> pa.RecordBatch:
    columns = [pa.array(values, pa.large_string()) for values in zip(*rows, strict=True)]
    return pa.record_batch(columns, schema=schema)


def _records(path: Path, reader: Any, quote: str) -> Iterator[tuple[int, list[str]]]:
    """Give each record that is not blank, with the line it begins in."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, {_broken(error, line, reader.line_num, quote)}") from error
        if fields is None:
            return
        if fields:
            yield line, fields


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


def _names(path: Path, header: Sequence[str]) -> list[str]:
    names = [name.strip() for name in header]
    blank = [name for name in header if name != name.strip()]
    if blank:
        warnings.warn(
            f"{path}: the column {blank[0]!r} is named without the blanks around it, as all are; "
            "the fields keep theirs.",
            LLMEmbedWarning,
            stacklevel=2,
        )
    return names


def _refuse_other_delimiter(path: Path, header: Sequence[str], delimiter: str) -> None:
    others = [one for one in _DELIMITERS if one != delimiter and one in "".join(header)]
    if len(header) != 1 or not others:
        return
    shown = {"\t": "tab"}.get(others[0], repr(others[0]))
    own = {"\t": "tab"}.get(delimiter, repr(delimiter))
    message = (
        f"{path} has one column, {header[0]!r}, whose name holds another delimiter. Pass "
        f"--delimiter {shown}, or --delimiter {own} if it is one column."
    )
    raise DataError(message)


def _rows(
    path: Path, records: Iterator[tuple[int, list[str]]], header: Sequence[str], skip: int
) -> Iterator[tuple[list[str], int]]:
    """Give each row and its size."""
    for index, (line, fields) in enumerate(records):
        if index < skip:
            continue
        if len(fields) != len(header):
            message = (
                f"{path}, line {line}: the number of fields is {len(fields)}, but the header has "
                f"{len(header)}. Quote fields that hold the delimiter, or pass the right "
                "--delimiter, or --csv-escape '\\' if quotes inside are escaped by it."
            )
            raise DataError(message)
        yield fields, sum(map(len, fields))


@contextlib.contextmanager
def _fields_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
