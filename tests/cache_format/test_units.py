"""Blocks that other processes write: units, and the lock they borrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
from toy_cache import DATASET, SOURCE, Toy, tree, write_toy

from llmembed.cache_format import CacheWriter, SplitPlan
from llmembed.cache_format.tools import finalize
from llmembed.cache_format.writing import UnitWriter
from llmembed.common.errors import CacheError, CacheLockedError, DataError


@contextmanager
def planned(path: Path, toy: Toy, shared: str | None) -> Iterator[tuple[CacheWriter, SplitPlan]]:
    """Plan the toy data set, as the only writer or as one that shares."""
    with CacheWriter(path, dataset=DATASET, shared=shared) as writer:
        writer.add_source(SOURCE)
        writer.add_split("train", labels=toy.labels, text_hash=toy.text_hash)
        yield writer, writer.plan("train", "tiny", arrays=product(["last", "mean"], [4, 8]))


def register(path: Path, toy: Toy) -> None:
    with planned(path, toy, shared=None) as (writer, _):
        writer.register()


def do(path: Path, unit: SplitPlan, lease: str, toy: Toy, n_blocks: int | None = None) -> int:
    """Write blocks of a unit as a worker does; tell how many were left."""
    writer = UnitWriter(path, unit, lease)
    left = writer.left()
    for block in left.blocks[:n_blocks]:
        writer.check_texts(block, toy.text_hash[block.start : block.stop])
        rows = slice(block.compute_from, block.stop)
        features = {key: toy.features(*key)[rows] for key in block.missing}
        writer.write(left, block, n_tokens=toy.n_tokens[rows], features=features)
    return len(left.blocks)


@pytest.mark.parametrize("n_before", [0, 100])
def test_units_make_the_cache_of_one_writer(
    tmp_path: Path, n_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that travel as JSON end in the same bytes, also where a split grew."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    toy, path = Toy(300), tmp_path / "units.zarr"
    for one in (path, tmp_path / "whole.zarr"):
        if n_before:
            write_toy(one, n_before)
    write_toy(tmp_path / "whole.zarr", 300)
    register(path, toy)
    with planned(path, toy, shared="ray") as (writer, plan):
        for some in (plan.blocks[2:], plan.blocks[:2]):
            unit = SplitPlan.loads(plan.part(some).dumps())
            assert unit == plan.part(some)
            assert do(path, unit, writer.lease, toy) == len(some)
    finalize(path, only_new=True)
    assert tree(path) == tree(tmp_path / "whole.zarr")


def test_a_unit_goes_on_where_its_first_worker_ended(tmp_path: Path) -> None:
    """Blocks of a unit that are committed are not done again."""
    toy = Toy(300)
    register(tmp_path, toy)
    with planned(tmp_path, toy, shared="ray") as (writer, plan):
        unit = plan.part(plan.blocks)
        assert do(tmp_path, unit, writer.lease, toy, n_blocks=2) == 5
        assert do(tmp_path, unit, writer.lease, toy) == 3


def test_workers_of_a_planner_that_is_gone_write_no_more(tmp_path: Path) -> None:
    """A lent lock ends with its holder, or when another takes its place."""
    toy = Toy(300)
    register(tmp_path, toy)
    with planned(tmp_path, toy, shared="ray") as (first, plan):
        unit, lease = plan.part(plan.blocks), first.lease
        with (
            planned(tmp_path, toy, shared="ray"),
            pytest.raises(CacheLockedError, match="took the lock over"),
        ):
            do(tmp_path, unit, lease, toy)
        with pytest.raises(CacheLockedError, match="took the lock over"):
            do(tmp_path, unit, lease, toy)


def test_a_worker_with_other_texts_is_refused(tmp_path: Path) -> None:
    """A worker whose file differs from the planner's is told the rows before it computes."""
    toy = Toy(300)
    register(tmp_path, toy)
    with planned(tmp_path, toy, shared="ray") as (writer, plan):
        worker = UnitWriter(tmp_path, plan.part(plan.blocks[1:]), writer.lease)
        with pytest.raises(DataError, match=r"rows 64-128 of split 'train' are other texts"):
            worker.check_texts(plan.blocks[1], toy.text_hash[:64])


def test_a_lock_that_is_not_held_is_not_lent(tmp_path: Path) -> None:
    """Only a writer that may write has workers."""
    with (
        CacheWriter(tmp_path / "c.zarr", dataset=DATASET) as writer,
        pytest.raises(CacheError, match="a closed writer lends no lock"),
    ):
        assert writer.lease
