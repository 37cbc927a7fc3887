"""One writer at a time: a lock file that names its holder.

It is created, never taken with flock, which does nothing on many network file systems. A holder
that died on this host is detected by its process id and start time and taken over; of another
host nothing is known, so its lock is refused with what to do.
"""

from __future__ import annotations

import json
import os
import platform
import uuid
from pathlib import Path

from llmembed.cache_format.documents import dump
from llmembed.cache_format.errors import CacheLockedError
from llmembed.cache_format.store import Store

LOCK = ".llmembed/lock"


class WriterLock:
    """Held while a `CacheWriter` is open.

    Raises:
        CacheLockedError: if another live writer, or one of another host, holds it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        pid = os.getpid()
        self._document = dump(
            {
                "pid": pid,
                "host": platform.node(),
                "started": _start_time(pid),
                "token": uuid.uuid4().hex,
            }
        )
        if not store.create(LOCK, self._document):
            self._take_over()

    def check(self) -> None:
        """Refuse to go on if the lock was taken over while this process was stopped."""
        if self._store.get(LOCK) != self._document:
            raise CacheLockedError(
                f"{self._store.location}: another writer took the lock over while this one was "
                "stopped. Nothing more is written; run the same command again to resume."
            )

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        if self._store.get(LOCK) == self._document:
            self._store.delete(LOCK)

    def _take_over(self) -> None:
        found = self._store.get(LOCK)
        if found is not None and not _is_stale(found):
            raise CacheLockedError(
                f"{self._store.location} is being written by {_holder(found)}. Wait until it is "
                f"done; if it is gone, delete {self._store.location}/{LOCK} and run again."
            )
        self._store.delete(LOCK)
        if not self._store.create(LOCK, self._document):
            raise CacheLockedError(
                f"{self._store.location}: another writer started at the same moment. Wait for it."
            )


def refuse_if_held(store: Store) -> None:
    """Refuse to read a cache as a whole while it is being written.

    Raises:
        CacheLockedError: naming the holder.
    """
    found = store.get(LOCK)
    if found is not None and not _is_stale(found):
        raise CacheLockedError(f"{store.location} is being written by {_holder(found)}. Wait.")


def _is_stale(document: bytes) -> bool:
    try:
        holder = json.loads(document)
        pid, host, started = int(holder["pid"]), holder["host"], holder["started"]
    except (ValueError, KeyError, TypeError):
        return True  # a lock is created whole: only damage makes it unreadable
    return host == platform.node() and (_start_time(pid) is None or _start_time(pid) != started)


def _holder(document: bytes) -> str:
    holder = json.loads(document)
    return f"process {int(holder['pid'])} on host {str(holder['host'])[:100]!r}"


def _start_time(pid: int) -> str | None:
    """Tell one process from a later one with the same id; None if there is no such process."""
    if Path("/proc/self/stat").exists():
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except (FileNotFoundError, ProcessLookupError):
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
