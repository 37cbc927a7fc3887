"""Two writers, interrupted by each other at every operation: neither harms the other."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from interleaving import count_steps, interleave, stepwise, stop_here
from toy_cache import DATASET, SOURCE, Toy, assert_toy, tree, write_toy

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.stores.local import TEMPORARY, LocalStore
from llmembed.cache_format.tools import finalize
from llmembed.cache_format.writing.lock import LOCK, SHARED, SharedLock, WriterLock, claim_key
from llmembed.common.errors import CacheLockedError
from llmembed.common.process import owner

STRIDE = int(os.environ.get("LLMEMBED_STRIDE", "20"))
"""Every so many points of a second preemption are tried; 1 is all."""


def dead_lock(token: str) -> bytes:
    """The lock of a process of this host that is gone: its id was used again since."""
    holder = {"pid": os.getpid(), "host": platform.node(), "started": "1", "token": token}
    return json.dumps(holder).encode()


def dead_owner() -> str:
    pid, _, machine = owner(os.getpid()).split("_")
    return f"{pid}_1_{machine}"


def nothing(store: LocalStore) -> None:
    del store


def a_dead_lock(store: LocalStore) -> None:
    store.create(LOCK, dead_lock("a"))


def a_dead_claim(store: LocalStore) -> None:
    store.create(LOCK, dead_lock("a"))
    store.create(claim_key(dead_lock("a")), dead_lock("b"))


def a_dead_share(store: LocalStore) -> None:
    store.create(f"{SHARED}/rank-0", dead_lock("a"))
    store.create(f"{TEMPORARY}/{dead_owner()}-left", b"half")


STARTS = [nothing, a_dead_lock, a_dead_claim, a_dead_share]


class Room:
    """What only those may enter who hold a lock; it notices who should not be there together."""

    def __init__(self, path: Path) -> None:
        self.store = LocalStore(path)
        self.inside: list[str] = []

    def enter(self, lock: WriterLock, kind: str) -> str:
        assert not self.inside or {kind, *self.inside} == {"shared"}
        self.inside.append(kind)
        lock.check()
        self.store.put(f"written-{kind}", [b"by a holder"])
        lock.check()
        self.inside.remove(kind)
        lock.release()
        return kind

    def write(self) -> str:
        try:
            lock = WriterLock(self.store)
        except CacheLockedError:
            return "refused"
        return self.enter(lock, "alone")

    def share(self) -> str:
        return self.enter(SharedLock(self.store, "rank-0"), "shared")


def schedules(n_first: int, n_second: int) -> Iterator[tuple[int, ...]]:
    """The first is interrupted after i steps, the second after j; then each to its end."""
    for first in range(n_first + 1):
        yield first, 10**6
        yield from ((first, second) for second in range(1, n_second + 1, STRIDE))


def run_all(
    folder: Path,
    start: Callable[[LocalStore], None],
    actors: Callable[[Room], list[Callable[[], str]]],
) -> Iterator[tuple[Room, list[Any]]]:
    """Run two actors under every schedule, each in a folder of its own."""
    numbers = itertools.count()

    def room() -> Room:
        made = Room(folder / str(next(numbers)))
        start(made.store)
        return made

    with stepwise():
        n_steps = [count_steps(actors(room())[index]) for index in (0, 1)]
        for order in ((0, 1), (1, 0)):
            for turns in schedules(*(n_steps[index] for index in order)):
                one = room()
                acts = actors(one)
                yield one, interleave([acts[index] for index in order], turns)


@pytest.mark.parametrize("start", STARTS)
def test_one_of_two_writers_holds_the_lock(
    tmp_path: Path, start: Callable[[LocalStore], None]
) -> None:
    """At every interleaving one goes in alone and keeps its lock, and no file is left."""
    for room, results in run_all(tmp_path, start, lambda room: [room.write, room.write]):
        assert set(results) <= {"alone", "refused"}, results
        assert "alone" in results
        assert list(room.store.walk()) == ["written-alone"]
        assert not room.store.names(TEMPORARY)


@pytest.mark.parametrize("start", STARTS)
def test_who_shares_and_who_does_not_exclude_each_other(
    tmp_path: Path, start: Callable[[LocalStore], None]
) -> None:
    """At every interleaving the one who shares gets in, the other before, after or not at all."""
    for room, results in run_all(tmp_path, start, lambda room: [room.write, room.share]):
        assert set(results) <= {"alone", "refused", "shared"}, results
        assert "shared" in results
        left = {key for key in room.store.walk() if not key.startswith("written")}
        assert left <= {LOCK}  # of a dead process, where nobody took it over


def rank(path: Path, number: int) -> str:
    """Register the cache unless that is done, then write every second block."""
    toy = Toy(128)

    def plan(writer: CacheWriter) -> Any:
        writer.add_source(SOURCE)
        writer.add_split("train", labels=toy.labels, text_hash=toy.text_hash)
        return writer.plan("train", SOURCE.name, arrays=[("mean", 4)])

    def is_registered() -> bool:
        with CacheWriter(path, dataset=DATASET, dry_run=True) as writer:
            plan(writer)
            return writer.is_registered

    while not is_registered():
        try:
            with CacheWriter(path, dataset=DATASET) as writer:
                plan(writer)
                writer.register()
        except CacheLockedError:
            stop_here(sleeps=True)
    with CacheWriter(path, dataset=DATASET, shared=f"rank-{number}") as writer:
        todo = plan(writer)
        for block in todo.blocks[number::2]:
            rows = slice(block.start, block.stop)
            features = {("mean", 4): toy.features("mean", 4)[rows]}
            writer.write(todo, block, n_tokens=toy.n_tokens[rows], features=features)
    return "done"


def test_two_ranks_that_start_at_once_both_end(tmp_path: Path) -> None:
    """Interrupted at any operation by the whole of the other, neither is ended by the other."""
    write_toy(tmp_path / "whole", 128, layers=[4], poolings=["mean"])
    numbers = itertools.count()

    def start() -> Path:
        path = tmp_path / f"ranks-{next(numbers)}"
        a_dead_claim(LocalStore(path))
        a_dead_share(LocalStore(path))
        return path

    with stepwise():
        alone = start()
        n_steps = count_steps(lambda: rank(alone, 0))
        for first in range(0, n_steps, STRIDE):
            path = start()
            acts = [lambda path=path: rank(path, 0), lambda path=path: rank(path, 1)]
            assert interleave(acts, (first,)) == ["done", "done"], first
            # the second rank reads its plan before or after the first committed its block
            write_toy(path, 128, layers=[4], poolings=["mean"])
            finalize(path)
            assert_toy(open_cache(path), 128)
            assert tree(path).keys() == tree(tmp_path / "whole").keys()


def test_a_living_owner_keeps_its_files(tmp_path: Path) -> None:
    """Only leftovers of dead processes of this machine, and very old ones, are cleared."""
    store = LocalStore(tmp_path)
    names = {
        f"{dead_owner()}-dead": False,
        f"{owner(os.getpid())}-living": True,
        "1_1_other-host": True,
        "0123456789abcdef": True,  # of a version that gave no owner
        "1_1_other-old": False,
    }
    for name in names:
        store.put(f"{TEMPORARY}/{name}", [b"half"])
    os.utime(tmp_path / TEMPORARY / "1_1_other-old", (0, 0))
    with CacheWriter(tmp_path, dataset=DATASET) as writer:
        writer.add_source(SOURCE)
    assert store.names(TEMPORARY) == sorted(name for name, stays in names.items() if stays)


@pytest.mark.parametrize("left", [b"", b"{}", b"[" * 100_000, b'{"pid": 1e400}'])
def test_a_damaged_lock_is_taken_over(tmp_path: Path, left: bytes) -> None:
    """A lock that says nothing holds nobody off."""
    store = open_store(tmp_path)
    store.create(LOCK, left)
    lock = WriterLock(store)
    lock.check()
    lock.release()
    assert list(store.walk()) == []
