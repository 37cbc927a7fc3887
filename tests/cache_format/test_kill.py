"""SIGKILL at any file-system operation: nothing committed is lost, nothing wrong is read."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import killed_writer
import numpy as np
from toy_cache import Toy, assert_toy, tree, write_toy

from llmembed.cache_format import open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import verify
from llmembed.common.errors import CacheFormatError, CacheNotFoundError

N_KILLS = int(os.environ.get("LLMEMBED_KILLS", "12"))
STAGES = ((200, "4,8"), (330, "4,8,12"))  # the data set grows, and a layer is added
N_OPERATIONS = 170  # of a stage, roughly: some draws let the writer finish


def run_killed(path: Path, stage: tuple[int, str], operation: int, log: Path) -> bool:
    """Run the writer until it dies or finishes; tell whether it finished."""
    n_rows, layers = stage
    command = [sys.executable, killed_writer.__file__, path, n_rows, layers, operation, log]
    process = subprocess.run([str(part) for part in command], check=False, capture_output=True)
    assert process.returncode in (0, -signal.SIGKILL), process.stderr.decode()
    return process.returncode == 0


def committed_rows(path: Path, n_rows: int) -> int:
    """Count the rows a reader may see, and check each of them."""
    try:
        cache = open_cache(path)
    except (CacheNotFoundError, CacheFormatError):
        assert not list(path.rglob("commits/**/*.json"))
        return 0
    total = 0
    for split in (cache[name] for name in cache.splits):
        for (source, pooling, layer), n in split.arrays.items():
            found = split.features(layer, source, pooling, allow_partial=True)
            there = ~np.isnan(found).any(axis=1)
            expected = Toy(n_rows).features(pooling, layer)[: len(found)]
            assert there.sum() == n
            np.testing.assert_array_equal(found[there], expected[there])
            total += n
    return total


def test_kills_lose_nothing_committed(tmp_path: Path) -> None:
    """After any kill no committed row is lost or wrong, at most one block is redone, and the
    finished cache is byte for byte the one that was never interrupted."""  # noqa: D205, D209
    rng = random.Random(N_KILLS)
    kills = runs = 0
    while kills < N_KILLS:
        path, log = tmp_path / f"killed-{runs}.zarr", tmp_path / f"log-{runs}"
        log.touch()
        seen = stage_kills = 0
        for stage in STAGES:
            while not run_killed(path, stage, rng.randrange(1, N_OPERATIONS), log):
                stage_kills += 1
                now = committed_rows(path, stage[0])
                assert now >= seen
                seen = now
        n_blocks = 4 + 6  # 200 rows; then blocks 0-5, of which 0-2 lack a layer
        assert len(log.read_text().split()) <= n_blocks + stage_kills
        kills, runs = kills + stage_kills, runs + 1
        assert_toy(open_cache(path), 330)
        assert verify(open_store(path)).damage == ()
        whole = tmp_path / f"whole-{runs}.zarr"
        write_toy(whole, 200)
        write_toy(whole, 330, layers=[4, 8, 12])
        assert tree(path) == tree(whole)


def test_leftovers_of_a_killed_writer_are_cleared(tmp_path: Path) -> None:
    """Temporary files are gone after the next run, and the lock of a dead process is taken."""
    path = tmp_path / "toy.zarr"
    assert not run_killed(path, STAGES[0], 60, tmp_path / "log")
    assert list((path / ".llmembed/tmp").iterdir())
    assert (path / ".llmembed/lock").exists()
    write_toy(path)
    assert not list((path / ".llmembed/tmp").iterdir())
    assert not (path / ".llmembed/lock").exists()
