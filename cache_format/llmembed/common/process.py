"""What the system tells of processes: whether one has ended, and how this one holds its memory.

A process is known by its host, its id and when it started, for ids are used again. Of another host
nothing is known, so what it made is taken for the work of a living process.

glibc maps every block above 128 KiB to 32 MiB anew and unmaps it when freed, so each activation of
a batch costs page faults again: 8 % of the time of SmolLM2 on a CPU, with batches of 1,024 tokens,
and as many gradients of 4 MiB a tenth of a training step and more. So it is kept between batches.
Batches of many shapes leave holes between what stays, 80 MB within 25,000 short texts, so it is
returned after each block of rows, which takes 7 ms.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
from pathlib import Path

UNKNOWN = "unknown"
"""Start time of a process that exists, where the system does not tell when it started."""
_PROC = Path("/proc")
_DEAD = "ZX"  # states of a process that has ended and that its parent did not ask about yet
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_KEPT = 32 * 2**20  # bytes; glibc takes no more


def started(pid: int) -> str | None:
    """Tell one process from a later one with the same id; None if there is no such process."""
    if (_PROC / "self/stat").exists():
        try:
            stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8")
        except OSError:
            return UNKNOWN if _is_hidden(pid) else None
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in _DEAD else fields[19]
    try:
        import psutil
    except ImportError:
        return UNKNOWN
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return UNKNOWN


def has_ended(pid: int, start: str) -> bool:
    """Tell whether a process of this host, known by id and start, has ended."""
    now = started(pid)
    return now is None or (UNKNOWN not in (now, start) and now != start)


@functools.lru_cache(maxsize=1)
def owner(pid: int) -> str:
    """Name a process of this machine within the name of a file; `is_gone` reads it.

    >>> is_gone(owner(os.getpid()))
    False
    """
    return f"{pid}_{started(pid)}_{_machine()}"


def is_gone(name: str) -> bool:
    """Tell whether the owner of that name ran on this machine and has ended."""
    pid, _, rest = name.partition("_")
    start, _, machine = rest.partition("_")
    return machine == _machine() and pid.isdecimal() and has_ended(int(pid), start)


def _is_hidden(pid: int) -> bool:
    """Tell whether a process exists that /proc does not show (mounted with hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


@functools.cache
def _machine() -> str:
    """Name what gives ids to processes: the host, or a container on it."""
    try:
        space = (_PROC / "self/ns/pid").readlink()
    except OSError:
        space = Path()
    return hashlib.blake2s(f"{platform.node()}\0{space}".encode(), digest_size=4).hexdigest()


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
