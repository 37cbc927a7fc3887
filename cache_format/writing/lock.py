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
from typing import Self

import xxhash

from llmembed.cache_format.layout.documents import dump, parse
from llmembed.cache_format.stores import HIDDEN, Store
from llmembed.common.errors import CacheError, CacheFormatError, CacheLockedError, shown
from llmembed.common.process import has_ended, started

LOCK = f"{HIDDEN}/lock"
SHARED = f"{HIDDEN}/shared"
PATIENCE_S = 60.0  # how long those who share a plan wait for the one of them that registers it


class Lock:
    """What a writer holds: a file that holds this document while nobody took the lock over."""

    def __init__(self, store: Store, key: str, document: bytes) -> None:
        self.store, self.key, self.document = store, key, document

    def check(self) -> None:
        """Refuse to go on if the lock was taken over while this process was stopped."""
        if self.store.get(self.key) != self.document:
            raise CacheLockedError(
                f"{self.store.location}: another writer took the lock over while this one was "
                "stopped. Nothing more is written; run the same command again to resume."
            )

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        if self.store.get(self.key) == self.document:
            self.store.delete(self.key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def lease(self) -> str:
        """What `borrowed_lock` takes in a process that works for this one."""
        return json.dumps([self.key, self.document.decode()])


class WriterLock(Lock):
    """Held while a `CacheWriter` is open that may change everything, by it alone."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, LOCK, _new_document())
        try:
            if not store.create(LOCK, self.document):
                self._take_over()
            for name in store.names(HIDDEN):  # claims on earlier locks: nobody asks for them now
                if name.startswith("lock-"):
                    store.delete(f"{HIDDEN}/{name}")
            _refuse_sharing(store)
            for name in store.names(SHARED):  # of dead processes, now that nobody begins to share
                document = store.get(f"{SHARED}/{name}")
                if document is not None and _is_stale(document):
                    store.delete(f"{SHARED}/{name}")
            store.clear_leftovers()
        except BaseException:
            with suppress(CacheError):
                self.release()
            raise

    def _take_over(self) -> None:
        found = _last(self.store)
        if found == self.document:
            return  # created, but the acknowledgement was lost
        if found is not None and not _is_stale(found):
            raise _held(self.store, found)
        key = LOCK if found is None else claim_key(found)
        try:
            self.store.create(key, self.document)
            if _last(self.store) != self.document:
                raise CacheLockedError(
                    f"{self.store.location}: another writer started at the same moment. Wait for "
                    "it."
                )
            self.store.put(LOCK, [self.document])
        except BaseException:
            with suppress(CacheError):
                Lock(self.store, key, self.document).release()
            raise


class SharedLock(Lock):
    """Held by one of several writers that share a plan.

    A second writer by the same name takes the place of the first, which notices before its next
    block: a job that its scheduler starts again needs no cleaning.
    """

    def __init__(self, store: Store, name: str) -> None:
        super().__init__(store, f"{SHARED}/{name}", _new_document())
        patient_until = time.monotonic() + PATIENCE_S
        while True:
            store.put(self.key, [self.document])
            found = _live_lock(store)
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


def borrowed_lock(store: Store, lease: str) -> Lock:
    """Make the lock that its holder lent by its lease: to be checked, never released."""
    key, document = json.loads(lease)
    return Lock(store, key, document.encode())


def holders(store: Store) -> dict[str, str]:
    """Map the names of all shared locks to their holders, without those of dead processes."""
    found = {name: store.get(f"{SHARED}/{name}") for name in store.names(SHARED)}
    return {shown(k): _holder(v) for k, v in found.items() if v is not None and not _is_stale(v)}


def refuse_if_held(store: Store) -> None:
    """Refuse to read a cache as a whole while it is being written, naming who writes."""
    found = _live_lock(store)
    held_by = [_holder(found)] if found is not None else list(holders(store).values())
    if held_by:
        raise CacheLockedError(f"{store.location} is being written by {held_by[0]}. Wait.")


def refuse_if_taken(store: Store) -> None:
    """Refuse where a `WriterLock` would be refused now; nothing is written."""
    found = _live_lock(store)
    if found is not None:
        raise _held(store, found)
    _refuse_sharing(store)


def is_abandoned(store: Store) -> bool:
    """Tell whether a writer left its lock behind."""
    found = _last(store)
    return found is not None and _is_stale(found)


def claim_key(document: bytes) -> str:
    """Key of the claim on the lock, or on the claim, that holds these bytes."""
    return f"{LOCK}-{xxhash.xxh3_128_hexdigest(document)}"


def _held(store: Store, document: bytes) -> CacheLockedError:
    return CacheLockedError(
        f"{store.location} is being written by {_holder(document)}. Wait until it is done; if it "
        f"is gone, delete {store.location}/{LOCK} and run again."
    )


def _refuse_sharing(store: Store) -> None:
    sharing = holders(store)
    if sharing:
        name, holder = next(iter(sharing.items()))
        raise CacheLockedError(
            f"{store.location} is being written by {name}, {holder} ({len(sharing)} share it). "
            f"Wait until they are done; for those that are gone, delete {store.location}/{SHARED}/"
            f"{name} and its kin, or finalize the complete cache."
        )


def _new_document() -> bytes:
    pid = os.getpid()
    holder = {"pid": pid, "host": platform.node(), "started": started(pid)}
    return dump(holder | {"token": uuid.uuid4().hex})


def _last(store: Store) -> bytes | None:
    """Return the lock, or the last claim where dead processes had it; None if there is no lock."""
    found = store.get(LOCK)
    while found is not None and _is_stale(found):
        claim = store.get(claim_key(found))
        if claim is None:
            break
        found = claim
    return found


def _live_lock(store: Store) -> bytes | None:
    found = _last(store)
    return None if found is None or _is_stale(found) else found


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
