"""Memory of the process: its peak, and when the C library keeps or returns what was freed.

glibc maps every block above 128 KiB to 32 MiB anew and unmaps it when freed, so each activation of
a batch costs page faults again: 8 % of the time of SmolLM2 on a CPU, with batches of 1,024 tokens,
and as many gradients of 4 MiB a tenth of a training step and more. So it is kept between batches.
Batches of many shapes leave holes between what stays, 80 MB within 25,000 short texts, so it is
returned after each block of rows, which takes 7 ms.
"""

from __future__ import annotations

import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_KEPT = 32 * 2**20
"""Bytes; glibc takes no more."""


def keep_freed_memory() -> None:
    """Let freed memory of this process be reused, unless the user set glibc's own variables.

    Other C libraries are left alone.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if not chosen:
        _glibc("mallopt", _MMAP_THRESHOLD, _LARGEST_KEPT)
        _glibc("mallopt", _TRIM_THRESHOLD, 2**30)
        _glibc("mallopt", _ARENA_MAX, 1)  # threads reuse what other threads have freed


def return_freed_memory() -> None:
    """Give every page without a living block back to the system."""
    _glibc("malloc_trim", 0)


def peak_memory_bytes() -> int | None:
    """Tell the most memory that this process ever held; None on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        try:
            import ctypes

            call = getattr(ctypes.CDLL(None), function)
        except (ImportError, OSError, TypeError, AttributeError):
            return
        call(*arguments)
