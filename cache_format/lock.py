"""Who may write: one writer, or several that share a plan.

A lock is a file that names its holder. It is created, never taken with flock, which does nothing on
many network file systems. A holder that died on this host is detected by its process id and start
time; of another host nothing is known, so its lock is refused with what to do.

`WriterLock` is held by the one who registers splits, arrays and indexes. Writers that share a plan
write blocks of registered arrays alone, so any number may; each holds a `SharedLock` under a name
of its own. Each kind creates its file first and then looks for the other kind, so no two that
exclude each other can both go on.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from pathlib import Path

from llmembed.cache_format.documents import dump
from llmembed.cache_format.errors import CacheLockedError
from llmembed.cache_format.store import Store

LOCK = ".llmembed/lock"
SHARED = ".llmembed/shared"
PATIENCE_S = 60.0
"""How long those who share a plan wait for the one of them that registers it."""


class WriterLock:
    """Held while a `CacheWriter` is open that may change everything.

    Raises:
        CacheLockedError: if another live writer, or one of another host, holds a lock.
    """

    key = LOCK

    def __init__(self, store: Store) -> None:
        self._store = store
        self._document = _document()
        if not store.create(LOCK, self._document):
            self._take_over()
        sharing = holders(store)
        if sharing:
            self.release()
            name, holder = next(iter(sharing.items()))
            raise CacheLockedError(
                f"{store.location} is being written by {name}, {holder} ({len(sharing)} share it). "
                "Wait until they are done; for those that are gone, delete "
                f"{store.location}/{SHARED}/{name} and its kin, or finalize the complete cache."
            )

    def check(self) -> None:
        """Refuse to go on if the lock was taken over while this process was stopped."""
        if self._store.get(self.key) != self._document:
            raise CacheLockedError(
                f"{self._store.location}: another writer took the lock over while this one was "
                "stopped. Nothing more is written; run the same command again to resume."
            )

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        if self._store.get(self.key) == self._document:
            self._store.delete(self.key)

    def _take_over(self) -> None:
        found = self._store.get(LOCK)
        if found == self._document:
            return  # created, but the acknowledgement was lost
        if found is not None and not _is_stale(found):
            raise CacheLockedError(
                f"{self._store.location} is being written by {_holder(found)}. Wait until it is "
                f"done; if it is gone, delete {self._store.location}/{LOCK} and run again."
            )
        self._store.delete(LOCK)
        if not self._store.create(LOCK, self._document) and self._store.get(LOCK) != self._document:
            raise CacheLockedError(
                f"{self._store.location}: another writer started at the same moment. Wait for it."
            )


class SharedLock(WriterLock):
    """Held by one of several writers that share a plan.

    A second writer by the same name takes the place of the first, which notices before its next
    block: a job that its scheduler starts again needs no cleaning.

    Args:
        store: where the cache lies.
        name: of this writer, such as `rank-0-of-2`.

    Raises:
        CacheLockedError: if a writer that shares nothing is at work, and stays so for a minute.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._document = _document()
        self.key = f"{SHARED}/{name}"
        patient_until = time.monotonic() + PATIENCE_S
        store.put(self.key, [self._document])
        while (found := store.get(LOCK)) is not None and not _is_stale(found):
            self.release()
            if time.monotonic() > patient_until:
                raise CacheLockedError(
                    f"{store.location} is being written by {_holder(found)}, which shares it with "
                    f"nobody. Wait until it is done; if it is gone, delete {store.location}/{LOCK}."
                )
            time.sleep(0.1)
            store.put(self.key, [self._document])

    @property
    def lease(self) -> str:
        """What a `BorrowedLock` of another process is made from."""
        return json.dumps([self.key.removeprefix(f"{SHARED}/"), self._document.decode()])


class BorrowedLock(WriterLock):
    """A shared lock that its holder lent: it is compared, never taken and never given back.

    Args:
        store: where the cache lies.
        lease: what the holder's `SharedLock.lease` says.
    """

    def __init__(self, store: Store, lease: str) -> None:
        self._store = store
        name, document = json.loads(lease)
        self.key, self._document = f"{SHARED}/{name}", document.encode()


def holders(store: Store) -> dict[str, str]:
    """Map the names of all shared locks to their holders; those of dead processes are cleared."""
    sharing = {}
    for name in store.names(SHARED):
        found = store.get(f"{SHARED}/{name}")
        if found is not None and _is_stale(found):
            store.delete(f"{SHARED}/{name}")
        elif found is not None:
            sharing[name] = _holder(found)
    return sharing


def refuse_if_held(store: Store) -> None:
    """Refuse to read a cache as a whole while it is being written.

    Raises:
        CacheLockedError: naming the holder.
    """
    found = store.get(LOCK)
    held_by = list(holders(store).values())
    if found is not None and not _is_stale(found):
        held_by = [_holder(found)]
    if held_by:
        raise CacheLockedError(f"{store.location} is being written by {held_by[0]}. Wait.")


def _document() -> bytes:
    pid = os.getpid()
    return dump(
        {
            "pid": pid,
            "host": platform.node(),
            "started": _start_time(pid),
            "token": uuid.uuid4().hex,
        }
    )


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
