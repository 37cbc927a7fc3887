"""Too little memory, for real: the address space of this process is limited for the time."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20


@contextlib.contextmanager
def only(n_bytes: int) -> Iterator[None]:
    """Let this process take that much more memory, not more."""
    import resource

    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed would be room, too
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
