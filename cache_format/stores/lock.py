"""Who may write: one writer, or several that share a plan.

A lock is a file that names its holder. It is created, never taken with flock, which does nothing on
many network file systems. A holder that died on this host is detected by its process id and start
time; of another host nothing is known, so its lock is refused with what to do.

`WriterLock` is held by the one who registers splits, arrays and indexes. Writers that share a plan
write blocks of registered arrays alone, so any number may; each holds a `SharedLock` under a name
of its own. Each kind creates its file first and then looks for the other kind, so no two that
exclude each other can both go on.

Nobody deletes a file because of what it was a moment ago: by then it may be another's. Who finds
the lock of a dead process claims it, under a name made of its very bytes, which one alone can
create, then looks again whether the lock is still that one, and only then replaces it. A claimer
that dies is claimed in the same way. Shared locks of dead processes are deleted under the lock
alone, and who shares looks for its own once more after it has seen that there is no lock.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from contextlib import suppress

import xxhash

from llmembed.cache_format.layout.documents import dump, parse
from llmembed.cache_format.layout.schema import HIDDEN
from llmembed.cache_format.stores.base import Store
from llmembed.common.errors import CacheError, CacheFormatError, CacheLockedError, shown
from llmembed.common.process import has_ended, started

LOCK = f"{HIDDEN}/lock"
SHARED = f"{HIDDEN}/shared"
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
        try:
            if not store.create(LOCK, self._document):
                self._take_over()
            self._clear_claims()
            self._refuse_sharing()
            self._clear_shared()
            store.clear_leftovers()
        except BaseException:
            with suppress(CacheError):
                self.release()
            raise

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
        found = _last(self._store)
        if found == self._document:
            return  # created, but the acknowledgement was lost
        if found is not None and not _is_stale(found):
            raise CacheLockedError(
                f"{self._store.location} is being written by {_holder(found)}. Wait until it is "
                f"done; if it is gone, delete {self._store.location}/{LOCK} and run again."
            )
        key = LOCK if found is None else claim_key(found)
        try:
            self._store.create(key, self._document)
            if _last(self._store) != self._document:
                raise CacheLockedError(
                    f"{self._store.location}: another writer started at the same moment. Wait for "
                    "it."
                )
            self._store.put(LOCK, [self._document])
        except BaseException:
            with suppress(CacheError):
                if self._store.get(key) == self._document:
                    self._store.delete(key)
            raise

    def _refuse_sharing(self) -> None:
        sharing = holders(self._store)
        if sharing:
            name, holder = next(iter(sharing.items()))
            raise CacheLockedError(
                f"{self._store.location} is being written by {name}, {holder} ({len(sharing)} "
                "share it). Wait until they are done; for those that are gone, delete "
                f"{self._store.location}/{SHARED}/{name} and its kin, or finalize the complete "
                "cache."
            )

    def _clear_claims(self) -> None:
        """Delete the claims on locks that were here before; nobody asks for them any more."""
        for name in self._store.names(HIDDEN):
            if name.startswith("lock-"):
                self._store.delete(f"{HIDDEN}/{name}")

    def _clear_shared(self) -> None:
        """Delete what dead processes left, now that nobody can begin to share."""
        for name in self._store.names(SHARED):
            document = self._store.get(f"{SHARED}/{name}")
            if document is not None and _is_stale(document):
                self._store.delete(f"{SHARED}/{name}")


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
        while True:
            store.put(self.key, [self._document])
            found = live_lock(store)
            if found is None and store.get(self.key) is not None:
                return
            self.release()
            if time.monotonic() > patient_until:
                holder = "another writer" if found is None else _holder(found)
                raise CacheLockedError(
                    f"{store.location} is being written by {holder}, which shares it with nobody. "
                    f"Wait until it is done; if it is gone, delete {store.location}/{LOCK}."
                )
            time.sleep(0.1)

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
    """Map the names of all shared locks to their holders, without those of dead processes."""
    sharing = {}
    for name in store.names(SHARED):
        found = store.get(f"{SHARED}/{name}")
        if found is not None and not _is_stale(found):
            sharing[shown(name)] = _holder(found)
    return sharing


def refuse_if_held(store: Store) -> None:
    """Refuse to read a cache as a whole while it is being written.

    Raises:
        CacheLockedError: naming the holder.
    """
    found = live_lock(store)
    held_by = [_holder(found)] if found is not None else list(holders(store).values())
    if held_by:
        raise CacheLockedError(f"{store.location} is being written by {held_by[0]}. Wait.")


def live_lock(store: Store) -> bytes | None:
    """Return the lock of a writer that shares with nobody, None if there is none or it is dead."""
    found = _last(store)
    return None if found is None or _is_stale(found) else found


def is_abandoned(store: Store) -> bool:
    """Tell whether a writer left its lock behind."""
    found = _last(store)
    return found is not None and _is_stale(found)


def _document() -> bytes:
    pid = os.getpid()
    return dump(
        {
            "pid": pid,
            "host": platform.node(),
            "started": started(pid),
            "token": uuid.uuid4().hex,
        }
    )


def _last(store: Store) -> bytes | None:
    """Return the lock, or the last claim where dead processes had it; None if there is no lock."""
    found = store.get(LOCK)
    while found is not None and _is_stale(found):
        claim = store.get(claim_key(found))
        if claim is None:
            break
        found = claim
    return found


def claim_key(document: bytes) -> str:
    """Key of the claim on the lock, or on the claim, that holds these bytes."""
    return f"{LOCK}-{xxhash.xxh3_128_hexdigest(document)}"


def _is_stale(document: bytes) -> bool:
    holder = _parse(document)
    if holder is None:
        return True  # a lock is created whole: only damage makes it unreadable
    pid, host, start = holder
    return host == platform.node() and has_ended(pid, start)


def _holder(document: bytes) -> str:
    pid, host, _ = _parse(document) or (0, "", "")
    return f"process {pid} on host {host[:100]!r}"


def _parse(document: bytes) -> tuple[int, str, str] | None:
    """Read process id, host and start time; None if it is no lock."""
    try:
        fields = parse(document, LOCK)
        pid = fields.integer("pid", 1, 2**31 - 1)
        return pid, fields.get("host", str), fields.get("started", str)
    except CacheFormatError:
        return None
