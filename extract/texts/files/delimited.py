r"""Delimited files (csv, tsv, Orange's tab) as tables of which every column is text.

Nothing is guessed: a text "null" stays a text, a label "01" stays "01", a date stays as written.
The rules are those of RFC 4180, to the letter: a quote inside quotes is doubled. A reader that
forgives others turns `"say \"hi\""` into some other text, so what breaks the rules is refused with
its line and the way out.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmembed.common.errors import DataError, LLMEmbedWarning
from llmembed.common.scratch import gather
from llmembed.extract.texts.files.unpack import in_batches, open_unpacked
from llmembed.extract.texts.options import NO_QUOTES, Dialect

_DELIMITERS = ",;\t|"
_LONGEST_FIELD = 2**31 - 1
"""Characters; the csv module keeps it in a C long."""


def read_delimited(
    path: Path, dialect: Dialect, *, delimiter: str, quote: str = '"', skip: int = 0
) -> pa.Table:
    """Read a delimited file into large_string columns.

    Args:
        path: of the file, packed or not.
        dialect: what was said about it.
        delimiter: what its suffix says.
        quote: what its suffix says.
        skip: rows below the header that are none.

    Raises:
        DataError: a row has more or fewer fields than the header, quotes break the rules, or it
            seems to have another delimiter.
        UnicodeDecodeError: it is not UTF-8.
    """
    delimiter, quote = dialect.delimiter or delimiter, dialect.quote or quote
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with open_unpacked(path) as file:
            reader = csv.reader(
                io.TextIOWrapper(file, encoding="utf-8-sig", newline=""),
                delimiter=delimiter,
                quotechar=None if quote == NO_QUOTES else quote,
                quoting=csv.QUOTE_NONE if quote == NO_QUOTES else csv.QUOTE_MINIMAL,
                escapechar=dialect.escape,
                strict=True,
            )
            records = _records(path, reader, quote)
            header = next(records, (0, []))[1]
            names = _names(path, header)
            if dialect.delimiter is None:
                _refuse_other_delimiter(path, names, delimiter)
            rows = _rows(path, records, len(names), skip)
            schema = pa.schema([(name, pa.large_string()) for name in names])
            return gather(schema, (_batch(schema, batch) for batch in in_batches(rows)))
    finally:
        csv.field_size_limit(limit)


def _batch(schema: pa.Schema, rows: list[list[str]]) -> pa.RecordBatch:
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


def _names(path: Path, header: list[str]) -> list[str]:
    blank = [name for name in header if name != name.strip()]
    if blank:
        warnings.warn(
            f"{path}: the column {blank[0]!r} is named without the blanks around it, as all are; "
            "the fields keep theirs.",
            LLMEmbedWarning,
            stacklevel=2,
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


def _rows(
    path: Path, records: Iterator[tuple[int, list[str]]], n_columns: int, skip: int
) -> Iterator[tuple[list[str], int]]:
    """Give each row and its size."""
    for index, (line, fields) in enumerate(records):
        if index < skip:
            continue
        if len(fields) != n_columns:
            raise DataError(
                f"{path}, line {line}: the number of fields is {len(fields)}, but the header has "
                f"{n_columns}. Quote fields that hold the delimiter, or pass the right "
                "--delimiter, or --csv-escape '\\' if quotes inside are escaped by it."
            )
        yield fields, sum(map(len, fields))
