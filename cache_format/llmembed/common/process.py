"""Which process made something, and whether it is gone: for locks and files that are not finished.

A process is known by its host, its id and when it started, for ids are used again. Of another host
nothing is known, so what it made is taken for the work of a living process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path

UNKNOWN = "unknown"
"""Start time of a process that exists, where the system does not tell when it started."""
_PROC = Path("/proc")
_DEAD = "ZX"
"""States of a process that has ended and that its parent did not ask about yet."""


def started(pid: int) -> str | None:
    """Tell one process from a later one with the same id; None if there is no such process."""
    if (_PROC / "self/stat").exists():
        return _started_by_proc(pid)
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


def has_ended(pid: int, start: str) -> bool:
    """Tell whether a process of this host, known by id and start, has ended."""
    now = started(pid)
    return now is None or (UNKNOWN not in (now, start) and now != start)


def _started_by_proc(pid: int) -> str | None:
    try:
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return UNKNOWN if _is_hidden(pid) else None
    return None if fields[0] in _DEAD else fields[19]


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
