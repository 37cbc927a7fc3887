"""Scratch files: what would fill the memory lies in a mapped file, which takes disk instead.

A mapped array is an array: any row can be read at once, what computes on it is the same code with
the same result, and the system takes pages back when it needs them, or when it is told to. The
file lies in $TMPDIR, else in /var/tmp, which unlike /tmp is a disk. It has no name, or is deleted
by the system (Windows), so nothing is left of it whatever happens.
"""

from __future__ import annotations

import errno
import itertools
import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmembed.common.errors import DataError, LLMEmbedError

if TYPE_CHECKING:
    import pyarrow as pa

SPOOL_FROM_BYTES = 64 * 2**20  # tables and columns that are larger lie in a mapped file
_DISK = "/var/tmp"  # noqa: S108 - a file without a name, made with O_EXCL
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def scratch_folder() -> Path:
    """Tell where scratch files lie."""
    wanted = (os.environ.get("TMPDIR"), _DISK)
    return Path(next((one for one in wanted if one and Path(one).is_dir()), tempfile.gettempdir()))


def scratch_array(
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    what: str,
    *,
    remedy: str = "",
    error: type[LLMEmbedError] = DataError,
) -> npt.NDArray[Any]:
    """Make an array of a shape that is not empty in a mapped file, to be filled.

    Where there is no room it is an `error`, which says what would be stored, and what helps besides
    setting TMPDIR.
    """
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    with _scratch_file() as file:
        try:
            if size_bytes > shutil.disk_usage(scratch_folder()).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.truncate(size_bytes)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a SIGBUS later
                os.posix_fallocate(file.fileno(), 0, size_bytes)
        except OSError as problem:
            size = f"{size_bytes / 1e6:,.0f}"
            raise error(_no_room(problem, what, size, remedy)) from problem
        mapped = mmap.mmap(file.fileno(), size_bytes)
    _mapped.add(mapped)
    return np.ndarray(shape, dtype, buffer=mapped)


def column_array(n_rows: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Make an array `[n_rows]` to be filled, in a mapped file if it is large."""
    if n_rows * np.dtype(dtype).itemsize <= SPOOL_FROM_BYTES:
        return np.empty(n_rows, dtype)
    return scratch_array((n_rows,), dtype, "a column of the data set")


def spool(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Write batches, one of which at a time is in memory, to a mapped file: Arrow IPC."""
    import pyarrow as pa

    with _scratch_file() as file:
        try:
            # A stream, since a file of Arrow has no room for the dictionaries of each batch.
            with pa.ipc.new_stream(pa.PythonFile(file, "w"), schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
        except OSError as problem:
            if problem.errno not in _NO_ROOM:
                raise
            size = f"more than {file.tell() / 1e6:,.0f}"
            raise DataError(_no_room(problem, "the table", size)) from problem
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _mapped.add(mapped)
    return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()


def gather(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Collect batches in memory, or all of them in a mapped file where they would fill it.

    Where there is no room for that file it is a `DataError`.

    >>> import pyarrow as pa
    >>> batch = pa.record_batch({"text": ["a", "b"]})
    >>> gather(batch.schema, iter([batch, batch])).num_rows
    4
    """
    import pyarrow as pa

    held, size_bytes, rest = [], 0, iter(batches)
    for batch in rest:
        held.append(batch)
        size_bytes += batch.get_total_buffer_size()
        if size_bytes >= SPOOL_FROM_BYTES:
            return spool(schema, itertools.chain(held, rest))
    return pa.Table.from_batches(held, schema)


def forget_pages() -> None:
    """Give back the memory of all scratch files; what is needed again is read again."""
    for mapped in _mapped:
        if hasattr(mapped, "madvise"):  # not on Windows
            mapped.madvise(mmap.MADV_DONTNEED)


def _scratch_file() -> IO[bytes]:
    return tempfile.TemporaryFile(dir=scratch_folder())


def _no_room(problem: OSError, what: str, size: str, remedy: str = "") -> str:
    return (
        f"{scratch_folder()} cannot take {what} ({size} MB): {problem.strerror}. "
        f"Set TMPDIR to a folder with room{remedy}."
    )
