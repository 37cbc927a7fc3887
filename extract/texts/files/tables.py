"""Files of texts as Arrow tables: csv, tsv, Orange tab, json, jsonl, parquet, arrow, feather.

The one door for every file. What cannot be read is refused with the file and, where it is known,
the line or row. What a column must hold to be texts or labels, `columns` decides.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from llmembed.common import scratch
from llmembed.common.errors import DataError
from llmembed.common.regular import open_regular, require_regular
from llmembed.extract.texts.files.delimited import read_delimited
from llmembed.extract.texts.files.json_rows import read_json
from llmembed.extract.texts.files.unpack import PACKED, open_unpacked
from llmembed.extract.texts.options import AS_THE_SUFFIX_SAYS, NO_QUOTES, Dialect

_SHOWN_CHARACTERS = 200
"""Of a path in a message."""


def read_table(path: Path, dialect: Dialect = AS_THE_SUFFIX_SAYS) -> pa.Table:
    """Read one file.

    Args:
        path: a regular file whose suffix is among those of `READERS`, perhaps packed.
        dialect: what was said about a delimited file.

    Returns:
        An Arrow table with distinct column names and at least one row.

    Raises:
        DataError: unknown suffix, no regular file, unreadable content, a column twice, or no rows.
        ConfigError: a dialect for a file that is not delimited.
    """
    try:
        require_regular(path)
        table = _read(path, dialect)
        repeated = collections.Counter(table.column_names).most_common(1)
    except UnicodeDecodeError as error:
        raise DataError(_bad_encoding(path)) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(_unreadable(path, error)) from error
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


def _read(path: Path, dialect: Dialect) -> pa.Table:
    _, suffix = split_suffix(path.name)
    if not suffix:
        raise DataError.unknown(
            f"{path}: the file format",
            path.suffix,
            READERS,
            f"Convert the file to one of them; {', '.join(_TEXT_READERS)} may be packed "
            f"({', '.join(PACKED)}).",
        )
    base, _ = _cut(suffix, PACKED)
    if base in _DELIMITED:
        return _DELIMITED[base](path, dialect)
    dialect.refuse_for(str(path))
    return READERS[base](path)


def _read_orange(path: Path, dialect: Dialect) -> pa.Table:
    """Read Orange's format: below the names stand a line of types and one of roles."""
    table = read_delimited(path, dialect, delimiter="\t", quote=NO_QUOTES, skip=2)
    if not table.num_rows:
        return table
    blank = [pyarrow.compute.equal(column, "") for column in table.columns]
    return table.filter(pyarrow.compute.invert(functools.reduce(pyarrow.compute.and_, blank)))


def _read_parquet(path: Path) -> pa.Table:
    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) < scratch.SPOOL_FROM_BYTES:
            return file.read()
        return scratch.spool(file.schema_arrow, file.iter_batches())


def _read_arrow(path: Path) -> pa.Table:
    """Map Arrow's IPC, which Feather is, as a file or as a stream."""
    with open_regular(path) as file:
        is_file = file.read(6) == b"ARROW1"
    source = pa.memory_map(str(path))
    return (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = short(str(path))
        return f"{name} cannot be read: {error.strerror}. Check the path and who may read it."
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    kind = split_suffix(path.name)[1].lstrip(".")
    return f"{path} cannot be read as {kind}: {reason.rstrip('.')}. Repair the file."


def _bad_encoding(path: Path) -> str:
    if _cut(path.name, PACKED)[1] or _cut(path.name, _TEXT_READERS)[1]:
        with open_unpacked(path) as file:
            for line, content in enumerate(file, start=1):
                try:
                    content.decode()
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{content[error.start]:02x}"
                    return f"{path}, line {line}: {byte} is not UTF-8. Save the file as UTF-8."
    return f"{path}: the name of a column is not UTF-8. Write the file anew."


_DELIMITED: Mapping[str, Callable[[Path, Dialect], pa.Table]] = {
    ".csv": functools.partial(read_delimited, delimiter=","),
    ".tsv": functools.partial(read_delimited, delimiter="\t"),
    ".tab": _read_orange,
}
_TEXT_READERS: Mapping[str, Callable[..., pa.Table]] = {
    **_DELIMITED,
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), read_json),
}
READERS: Mapping[str, Callable[..., pa.Table]] = {
    **_TEXT_READERS,
    ".parquet": _read_parquet,
    **dict.fromkeys((".arrow", ".ipc", ".feather"), _read_arrow),
}
"""Suffix -> who reads such a file."""
