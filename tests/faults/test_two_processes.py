"""Two that start, write, read or remove at the same time: neither harms the other."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from interleaving import OF_REMOVAL, count_steps, interleave, stepwise
from toy_cache import Toy, assert_toy, count_right_rows, tree, write_toy

from llmembed.cache_format import open_cache
from llmembed.cache_format.layout import arrays, commits
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import copy, remove, verify
from llmembed.common.errors import (
    CacheLockedError,
    ConfigError,
    LLMEmbedError,
)

Tries = Callable[[int], None]
Act = Callable[[Path], str]
N_ROWS = 100


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule chooses among the two, and among nothing else."""
    for module in (arrays, commits):
        monkeypatch.setattr(module, "in_parallel", lambda _, work, items: [*map(work, items)])


def answered(act: Callable[[Path], object], known: type[LLMEmbedError] = LLMEmbedError) -> Act:
    """Say `done`, or what was refused."""

    def run(path: Path) -> str:
        try:
            act(path)
        except known as error:
            return f"{type(error).__name__}: {error}"
        return "done"

    return run


def read_all(path: Path) -> None:
    """Read every layer that is said to be there: right rows, or an error."""
    split = open_cache(path)["train"]
    for source, pooling, layer in split.arrays:
        found = split.features(layer, source, pooling)
        np.testing.assert_array_equal(found, Toy(N_ROWS).features(pooling, layer))


write = answered(lambda path: write_toy(path, N_ROWS, poolings=["mean"]), CacheLockedError)
read = answered(read_all)
copied = answered(lambda path: copy(path, path.with_suffix(".copy")))
remove_layer = answered(lambda path: remove(path, layers=[4]), (CacheLockedError, ConfigError))  # type: ignore[arg-type]
remove_split = answered(lambda path: remove(path, split="train"), (CacheLockedError, ConfigError))  # type: ignore[arg-type]
PAIRS: dict[str, tuple[Act, Act]] = {
    "write and read": (write, read),
    "write and remove": (write, remove_layer),
    "remove a layer and read": (remove_layer, read),
    "remove a split and read": (remove_split, read),
    "remove and remove": (remove_layer, remove_layer),
    "remove and copy": (remove_layer, copied),
    "write and copy": (write, copied),
}


def schedules(n_first: int, n_second: int, n_most: int) -> Iterator[tuple[int, ...]]:
    """The first stops after i steps, the second after j, then each ends; so many of these."""
    every = [
        (first, second)
        for first in range(n_first + 1)
        for second in itertools.chain([10**6], range(1, n_second + 1, 7))
    ]
    yield from every[:: max(1, len(every) // n_most)]


def started(folder: Path, name: str, number: int) -> Path:
    """What both find: a finished cache, or one that is half written."""
    path = folder / f"{number}.zarr"
    shutil.copytree(folder / ("half" if "write" in name else "whole"), path)
    return path


@pytest.mark.fault("F5")
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "n_most",
    [
        pytest.param(4, id="few"),
        pytest.param(400, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_two_at_the_same_time(tmp_path: Path, tries: Tries, pair: str, n_most: int) -> None:
    """What is read is right, or refused in a sentence; what stays is sound, and is done again."""
    write_toy(tmp_path / "whole", N_ROWS, poolings=["mean"])
    write_toy(tmp_path / "half", N_ROWS, poolings=["mean"], n_blocks=1)
    numbers, n_tried = itertools.count(), 0
    seen = set()
    expected = again(pair, started(tmp_path, pair, next(numbers)))
    with stepwise(*OF_REMOVAL):
        for order in ((0, 1), (1, 0)):
            acts = [PAIRS[pair][index] for index in order]
            n_steps = []
            for act in acts:
                path = started(tmp_path, pair, next(numbers))
                n_steps.append(count_steps(lambda act=act, path=path: act(path)))
            for turns in schedules(n_steps[0], n_steps[1], n_most):
                path = started(tmp_path, pair, next(numbers))
                ends = interleave([lambda act=act, path=path: act(path) for act in acts], turns)
                assert all(isinstance(end, str) for end in ends), (order, turns, ends)
                assert not any("\n" in end for end in ends)
                seen |= {end.partition(":")[0] for end in ends}
                count_right_rows(path)
                assert again(pair, path) == expected, (order, turns)
                shutil.rmtree(path)
                shutil.rmtree(path.with_suffix(".copy"), ignore_errors=True)
                n_tried += 1
    assert "done" in seen
    tries(n_tried)


def again(pair: str, path: Path) -> dict[str, bytes]:
    """Let each do alone what it does, then write what lacks; give the files."""
    for act in PAIRS[pair]:
        if act not in (read, copied):
            act(path)
    write(path)
    assert verify(open_store(path)).damage == ()
    assert_toy(open_cache(path), N_ROWS)
    return tree(path)
