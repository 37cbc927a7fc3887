"""What would fill the memory lies in a mapped file: it takes disk, and memory while it is read.

Most files must be decoded, which a mapping cannot do. So their batches are written once as Arrow
IPC, uncompressed, to a file without a name in TMPDIR, and mapped from there. Any row can be read at
once, and the system takes pages back when it needs them, or when it is told to.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmembed.common.errors import DataError

SPOOL_FROM_BYTES = 64 * 2**20
"""What is larger lies in a mapped file."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

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
        try:
            # A stream, since a file of Arrow has no room for the dictionaries of each batch.
            with pa.ipc.new_stream(pa.PythonFile(file, "w"), schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            message = (
                f"the table needs more than {file.tell() / 1e6:.0f} MB in {tempfile.gettempdir()}: "
                f"{error.strerror}. Set TMPDIR to a folder with room."
            )
            raise DataError(message) from error
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _mapped.add(mapped)
    return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()


def gather(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Collect batches in memory, or all of them in a mapped file where they would fill it.

    >>> batch = pa.record_batch({"text": ["a", "b"]})
    >>> gather(batch.schema, iter([batch, batch])).num_rows
    4
    """
    held, size_bytes, rest = [], 0, iter(batches)
    for batch in rest:
        held.append(batch)
        size_bytes += batch.get_total_buffer_size()
        if size_bytes >= SPOOL_FROM_BYTES:
            return spool(schema, itertools.chain(held, rest))
    return pa.Table.from_batches(held, schema)


def spooled_array(n_rows: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Make an array `[n_rows]` to be filled, in a mapped file if it is large.

    Raises:
        DataError: there is no room for that file.

    >>> spooled_array(3, np.dtype(np.int32)).shape
    (3,)
    """
    size_bytes = n_rows * dtype.itemsize
    if size_bytes <= SPOOL_FROM_BYTES:
        return np.empty(n_rows, dtype)
    with tempfile.TemporaryFile() as file:
        _take_room(file.fileno(), size_bytes)
        mapped = mmap.mmap(file.fileno(), size_bytes)
    _mapped.add(mapped)
    return np.frombuffer(mapped, dtype)


def _take_room(file: int, size_bytes: int) -> None:
    """Lengthen an empty file, and take its blocks at once: a mapping cannot say that it is full."""
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file, 0, size_bytes)
        else:
            os.truncate(file, size_bytes)
    except OSError as error:
        message = (
            f"a column of the data set needs {size_bytes / 1e6:.0f} MB in {tempfile.gettempdir()}: "
            f"{error.strerror}. Set TMPDIR to a folder with room."
        )
        raise DataError(message) from error


def forget_pages() -> None:
    """Give back the memory of all that is spooled; what is needed again is read again."""
    for mapped in _mapped:
        if hasattr(mapped, "madvise"):  # not on Windows
            mapped.madvise(mmap.MADV_DONTNEED)
