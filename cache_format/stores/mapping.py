"""Chunk files as one contiguous array, without copying them.

A chunk file is raw rows plus a tail, and the rows fill whole pages. So each file's rows can be
mapped right behind those of the file before, and the next mapping hides the tail. numpy and torch
then read the page cache itself: no copy, no second use of memory, and processes share the pages.
Python's `mmap` cannot choose an address, hence the C library's.
"""

from __future__ import annotations

import functools
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

MAX_FILES = 8192  # mappings one array may take; Linux allows a process 65,530
_THREADS = 4  # that wait for the disk where the files are not in memory yet
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_MAP_POPULATE = 0x8000 if sys.platform == "linux" else 0


def can_map(n_files: int, size_bytes: int) -> bool:
    """Tell whether this many files of that many leading bytes each can be one array here.

    >>> can_map(2, mmap.ALLOCATIONGRANULARITY + 1)
    False
    """
    whole_pages = size_bytes > 0 and size_bytes % mmap.ALLOCATIONGRANULARITY == 0
    return whole_pages and n_files <= MAX_FILES and _libc() is not None


def map_behind_each_other(
    files: Sequence[AbstractContextManager[int]], size_bytes: int
) -> memoryview:
    """Map the first bytes of each file, one file behind the other, and bring them into memory.

    `files` open one each and give its descriptor; `size_bytes` are whole pages, no more than a file
    has. The bytes are read-only, `len(files) * size_bytes` of them, and unmapped when nothing
    refers to them.
    """
    import ctypes

    libc = _libc()

    def place(address: int | None, n_bytes: int, flags: int, file: int) -> int:
        found = libc.mmap(address, n_bytes, mmap.PROT_READ, flags, file, 0)
        if found == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(found)

    total = len(files) * size_bytes
    base = place(None, total, mmap.MAP_PRIVATE | mmap.MAP_ANON | _MAP_NORESERVE, -1)
    mapped = (ctypes.c_char * total).from_address(base)
    weakref.finalize(mapped, libc.munmap, ctypes.c_void_p(base), ctypes.c_size_t(total))

    def place_file(index: int) -> None:
        shared = mmap.MAP_SHARED | _MAP_FIXED | _MAP_POPULATE
        with files[index] as file:
            place(base + index * size_bytes, size_bytes, shared, file)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(place_file, range(len(files))))
    return memoryview(mapped).cast("B").toreadonly()


@functools.cache
def _libc() -> Any:
    """Open the C library; None where it is not known, or its names cannot be had."""
    if sys.platform not in ("linux", "darwin") or not hasattr(mmap, "PROT_READ"):
        return None
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.munmap.restype = ctypes.c_int
    except (ImportError, OSError, TypeError, AttributeError):
        return None
    place = (ctypes.c_void_p, ctypes.c_size_t)
    libc.mmap.argtypes = (*place, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    return libc
