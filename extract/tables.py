"""Files of texts as Arrow tables: csv, tsv, Orange tab, json, jsonl, parquet, arrow.

Every column of a delimited file is read as text, so nothing is guessed: a text "null" stays a text,
a label "01" stays "01". What cannot be read is refused with the file and, where it is known, the
line.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.feather
import pyarrow.json
import pyarrow.parquet

from llmembed.cache_format.errors import DataError
from llmembed.extract.spool import SPOOL_FROM_BYTES, spool


def read_table(path: Path) -> pa.Table:
    """Read one file.

    Args:
        path: a file whose suffix is among those of `READERS`.

    Returns:
        An Arrow table with distinct column names and at least one row.

    Raises:
        DataError: unknown suffix, unreadable content, a column twice, or no rows.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError.unknown(
            f"{path}: the file format", path.suffix, READERS, "Convert the file to one of them."
        )
    try:
        table = reader(path)
    except UnicodeDecodeError as error:
        raise DataError(_bad_encoding(path, error)) from error
    except (pa.ArrowInvalid, json.JSONDecodeError, csv.Error, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{path} cannot be read as {path.suffix.lstrip('.')}: {reason}. Repair the file."
        raise DataError(message) from error
    repeated = {name for name in table.column_names if table.column_names.count(name) > 1}
    if repeated:
        message = f"{path} has the column {min(repeated)!r} more than once. Rename one."
        raise DataError(message)
    if table.num_rows == 0:
        message = f"{path} has no rows. Pass a file with at least one example."
        raise DataError(message)
    return table


def _read_delimited(path: Path, *, delimiter: str, quoted: bool, skip: int = 0) -> pa.Table:
    content = path.read_bytes()
    content.decode("utf-8-sig")  # pyarrow does not say on which line the bad byte is
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=delimiter), [])
    return pyarrow.csv.read_csv(
        pa.BufferReader(content),
        read_options=pyarrow.csv.ReadOptions(skip_rows_after_names=skip),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.large_string() for name in header}, strings_can_be_null=False
        ),
    )


def _read_orange(path: Path) -> pa.Table:
    """Read Orange's format: below the names stand a line of types and one of roles."""
    table = _read_delimited(path, delimiter="\t", quoted=False, skip=2)
    blank = [pyarrow.compute.equal(column, "") for column in table.columns]
    return table.filter(pyarrow.compute.invert(functools.reduce(pyarrow.compute.and_, blank)))


def _read_json(path: Path) -> pa.Table:
    with path.open("rb") as file:
        starts_as_list = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not starts_as_list:
        return pyarrow.json.read_json(path)
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not all(isinstance(row, dict) for row in rows):
        message = f"{path} is a JSON list whose members are not objects. Write one object a row."
        raise DataError(message)
    return pa.Table.from_pylist(rows)


def _read_parquet(path: Path) -> pa.Table:
    """Read into memory, or into a mapped file what would fill it."""
    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) < SPOOL_FROM_BYTES:
            return file.read()
        return spool(file.schema_arrow, file.iter_batches())


def _bad_encoding(path: Path, error: UnicodeDecodeError) -> str:
    line = error.object[: error.start].count(b"\n") + 1
    return (
        f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8. "
        "Save the file as UTF-8."
    )


READERS: Mapping[str, Callable[[Path], pa.Table]] = {
    ".csv": functools.partial(_read_delimited, delimiter=",", quoted=True),
    ".tsv": functools.partial(_read_delimited, delimiter="\t", quoted=True),
    ".tab": _read_orange,
    ".json": _read_json,
    ".jsonl": pyarrow.json.read_json,
    ".parquet": _read_parquet,
    ".arrow": functools.partial(pyarrow.feather.read_table, memory_map=True),
}
