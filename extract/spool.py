"""Tables that would fill the memory lie in a mapped file: they take disk, and memory while read.

A Parquet file must be decoded, which a mapping cannot do. So its batches are written once as Arrow
IPC, uncompressed, to a file without a name in TMPDIR, and mapped from there. Any row can be read at
once, and the system takes pages back when it needs them, or when it is told to.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterable

import pyarrow as pa

_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def spool(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Write batches to a mapped file.

    Args:
        schema: of the batches.
        batches: the rows; one at a time is in memory.

    Returns:
        The table, whose columns are the mapping; the file is gone when they are.

    >>> batch = pa.record_batch({"text": ["a", "b"]})
    >>> spool(batch.schema, [batch, batch])["text"].to_pylist()
    ['a', 'b', 'a', 'b']
    """
    with tempfile.TemporaryFile() as file:
        with pa.ipc.new_file(pa.PythonFile(file, "w"), schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _mapped.add(mapped)
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()


def forget_pages() -> None:
    """Give back the memory of all spooled tables; what is needed again is read again."""
    for mapped in _mapped:
        if hasattr(mapped, "madvise"):  # not on Windows
            mapped.madvise(mmap.MADV_DONTNEED)
