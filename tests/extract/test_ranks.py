"""Several processes share an extraction: `--rank`, `--world` and `llmembed-cache finalize`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from toy_cache import as_options, tree

from llmembed.cache_format.cli import main as cache_main
from llmembed.cache_format.tools import finalize
from llmembed.cache_format.writing import lock
from llmembed.common.errors import (
    CacheCorruptError,
    CacheLockedError,
    ConfigError,
)
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.engines.blocks import extract_blocks
from llmembed.extract.pipeline import prepare


def command(settings: dict[str, Any], *more: object) -> list[str]:
    options = as_options(settings)
    program = "from llmembed.extract.cli import main; main()"
    return [sys.executable, "-c", program, *options, *map(str, more)]


def ranks(settings: dict[str, Any], cache: Path, numbers: Sequence[int], world: int) -> Any:
    """Run ranks in this process, one after the other."""
    for rank in numbers:
        config = ExtractConfig(**settings, cache=str(cache), rank=rank, world=world)
        result = extract(config)
    return result


def test_two_processes_make_the_cache_of_one(
    settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Two ranks started at once, then finalize: byte for byte what one process writes."""
    cache = tmp_path / "shared.zarr"
    lines = [
        command(settings, "--cache", cache, "--rank", rank, "--world", 2, "--json")
        for rank in (0, 1)
    ]
    running = [subprocess.Popen(line, stdout=subprocess.PIPE) for line in lines]
    done = [json.loads(process.communicate()[0]) for process in running]
    assert [result["n_rows_computed"] for result in done] == [64 + 64 + 44, 64 + 64]
    assert f"When all have ended: llmembed-cache finalize {cache}" in done[0]["notes"][-1]
    result = CliRunner().invoke(cache_main, ["finalize", str(cache)])
    assert (result.exit_code, result.output) == (
        0,
        f"{cache}: 25 chunks, every hash holds; the cache is closed\n",
    )
    assert tree(cache) == whole
    finalize(cache)
    assert tree(cache) == whole


@pytest.mark.slow
def test_a_killed_rank_is_run_again(
    settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL after its first record: the same rank, started again, does what is left."""
    cache = tmp_path / "shared.zarr"
    kill = (
        "import os, signal\n"
        "from llmembed.cache_format.writing import blocks\n"
        "commit = blocks.commit\n"
        "def die(*arguments):\n"
        "    commit(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "blocks.commit = die\n"
    )
    line = command(settings, "--cache", cache, "--rank", 0, "--world", 2)
    line[2] = kill + line[2]
    assert subprocess.run(line, check=False).returncode == -signal.SIGKILL
    assert list((cache / ".llmembed/shared").iterdir())
    assert ranks(settings, cache, [0], world=2).n_rows_computed == 64 + 44
    ranks(settings, cache, [1], world=2)
    finalize(cache)
    assert tree(cache) == whole


def test_a_zombie_stops_before_its_next_block(
    settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A rank that was started a second time takes the place of the first, which writes no more."""
    cache = tmp_path / "shared.zarr"
    config = ExtractConfig(**settings, cache=str(cache), rank=0, world=1)
    task = prepare(config)
    task.register()
    with task.open_writer(shared="rank-0-of-1") as zombie:
        (plan,) = task.make_plans(zombie)
        ranks(settings, cache, [0], world=1)
        with pytest.raises(CacheLockedError, match="took the lock over"):
            extract_blocks(task, zombie, plan, task.load_extractor((1, 3)))
    finalize(cache)
    assert tree(cache) == whole


def test_finalize_withdraws_what_is_not_committed(
    settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A chunk of other bytes, as a zombie on other hardware leaves it, is found and redone."""
    cache = tmp_path / "shared.zarr"
    ranks(settings, cache, [0, 1], world=2)
    chunk = cache / "train/toy-llama/mean/layer_003/c.1.0"
    chunk.write_bytes(b"\x01" + chunk.read_bytes()[1:])
    with pytest.raises(CacheCorruptError, match=r"layer_003: block 1 does not hold .*withdrawn"):
        finalize(cache)
    assert ranks(settings, cache, [0, 1], world=2).n_rows_computed == 64
    finalize(cache)
    mended = tree(cache)
    assert {name for name in whole if "/c." in name and mended[name] != whole[name]} == set()


def test_who_shares_nothing_is_kept_apart(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer alone and ranks refuse each other, each naming the other."""
    monkeypatch.setattr(lock, "PATIENCE_S", 0.0)
    monkeypatch.setattr("llmembed.extract.engines.task.PATIENCE_S", 0.0)
    cache = tmp_path / "shared.zarr"
    config = ExtractConfig(**settings, cache=str(cache))
    task = prepare(config)
    here = f"process {os.getpid()}"
    task.register()
    with (
        task.open_writer(),
        pytest.raises(CacheLockedError, match=f"{here}.* shares it with nobody"),
    ):
        ranks(settings, cache, [0], world=2)
    with (
        task.open_writer(shared="rank-0-of-2"),
        pytest.raises(CacheLockedError, match=f"by rank-0-of-2, {here}"),
    ):
        extract(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "--rank and --world belong together"),
        ({"rank": 2, "world": 2}, "--rank is 2 of --world 2; ranks count from 0. Pass 0 to 1."),
        ({"rank": 0, "world": 0}, "--world is 0; it counts from 1"),
        ({"rank": 0, "world": 2, "overwrite": True}, "would let each rank delete"),
        ({"workers": 2}, "--workers is for --engine ray, and --engine is local. Pass both."),
        ({"engine": "ray", "gpus_per_worker": -1.0}, "--gpus-per-worker is -1.0; pass 0 or more"),
        ({"engine": "ray", "workers": 0}, "--workers is 0; it counts from 1"),
        ({"engine": "ray", "rank": 0, "world": 2}, "Pass either it or --rank and --world."),
        ({"engine": "rya"}, "engine 'rya' does not exist; did you mean 'ray'?"),
    ],
)
def test_a_share_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    """Ranks count from 0 to the world's size, none may overwrite, and Ray has its own options."""
    with pytest.raises(ConfigError, match=message):
        ExtractConfig(model="m", layers="1", **changes)
