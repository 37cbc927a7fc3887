"""Too little memory, for real: the address space of this process is limited for the time."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
_LARGEST, _SMALLEST = 1 << 30, 1 << 16


@contextlib.contextmanager
def limited(n_bytes: int) -> Iterator[None]:
    """Let this process map that much more memory; what it has freed is room besides."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def only(n_bytes: int) -> Iterator[None]:
    """Let this process have that much more memory, not more, whatever earlier tests have freed."""
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    taken, size = [], _LARGEST
    with limited(0):
        while size >= _SMALLEST:
            if block := libc.malloc(size):
                taken.append(block)
            else:
                size //= 2
    try:
        with limited(n_bytes):
            yield
    finally:
        for block in taken:
            libc.free(block)
