"""What people do, in random order and killed at any moment, against a model of what must hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import long_run
import pytest
import zarr
from toy_cache import DATASET, SOURCE, Toy, write_toy

from llmembed.cache_format import CacheWriter
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import verify
from llmembed.cache_format.writing import register
from llmembed.common.errors import DataError
from llmembed.extract import ExtractConfig, extract

FORKS = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has torch")


def live(seconds: float, seed: int, folder: Path) -> int:
    """Live in worlds for so long, in a process of its own; give the number of kills."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-P", long_run.__file__, str(seconds), str(seed), str(folder)]
    here = str(Path(long_run.__file__).parent)
    environment["PYTHONPATH"] = here
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills: int = json.loads(done.stdout.splitlines()[-1])["n_kills"]
    return kills


@FORKS
@pytest.mark.slow
@pytest.mark.fault("L1")
@pytest.mark.timeout(0)
def test_whatever_is_killed_the_model_holds(
    pytestconfig: pytest.Config, tmp_path: Path, tries: Callable[[int], None]
) -> None:
    """Rows that were committed stay as they are, runs are whole, answers are those of the run."""
    kills = live(pytestconfig.getoption("long"), 1, tmp_path)
    assert kills
    tries(kills)


@FORKS
@pytest.mark.fault("L1")
@pytest.mark.usefixtures("own_home")
def test_a_few_steps_hold(tmp_path: Path, tries: Callable[[int], None]) -> None:
    """The first steps of a world, each time the same."""
    model, truth = long_run.warm(tmp_path)
    (tmp_path / "world").mkdir()
    world = long_run.World(tmp_path / "world", model, truth, seed=3)
    for _ in range(5):
        world.step()
    assert world.kills.total()
    tries(world.kills.total())


@pytest.mark.fault("L1", "9")
def test_lost_token_counts_are_counted_again(
    settings: dict[str, object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Where only the chunk of token counts is gone, it is made again, and no feature."""
    config = ExtractConfig(**settings, cache=str(tmp_path / "toy.zarr"))  # type: ignore[arg-type]
    extract(config)
    lost = tmp_path / "toy.zarr/train/toy-llama/n_tokens/c.1"
    lost.unlink()
    assert extract(config).n_rows_computed == 64
    key = "train/toy-llama/n_tokens/c.1"
    assert lost.read_bytes() == whole[key]
    assert verify(open_store(config.cache or "")).damage == ()


@pytest.mark.fault("L1")
def test_metadata_of_before_are_no_damage(tmp_path: Path) -> None:
    """Who is killed before the root is renewed has damaged nothing, and `verify` names nothing."""
    path = tmp_path / "toy.zarr"
    write_toy(path, 100, layers=[4])
    before = (path / "zarr.json").read_bytes()
    write_toy(path, 100, layers=[4, 8])
    after = (path / "zarr.json").read_bytes()
    assert before != after
    (path / "zarr.json").write_bytes(before)
    assert verify(open_store(path)).damage == ()
    write_toy(path, 100, layers=[4, 8])
    assert (path / "zarr.json").read_bytes() == after
    spoiled = before.replace(b'"NaN"', b'"Inf"', 1)
    assert spoiled != before
    (path / "zarr.json").write_bytes(spoiled)
    (damage,) = verify(open_store(path)).damage
    assert "consolidated metadata differ" in damage.problem


@pytest.mark.fault("L1", "34")
def test_a_folder_of_texts_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails, or a folder that is not ours, is told in a sentence."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/train.csv").write_text("text,label\nw1,a\n")

    def refuse(_: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)  # what pathlib asks from Python 3.13 on
    config = ExtractConfig(model="m", layers="1", dataset=str(tmp_path / "texts"))
    with pytest.raises(DataError, match=r"texts cannot be read: Permission denied\. Check"):
        extract(config)


def test_what_plain_readers_see_of_a_grown_split_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last index and the root, the next extraction is not done yet."""
    path, toy = tmp_path / "toy.zarr", Toy(131)
    write_toy(path, 70)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(register, "consolidate", die)
        with pytest.raises(KeyboardInterrupt):
            write_toy(path, 131)
    with CacheWriter(path, dataset=DATASET) as writer:
        writer.add_source(SOURCE)
        writer.add_split("train", labels=toy.labels, text_hash=toy.text_hash)
        plan = writer.plan("train", SOURCE.name, arrays=[("last", 4), ("mean", 8)])
        assert not plan.blocks
        assert not writer.is_finished(plan)
        writer.finish("train", SOURCE.name)
        assert writer.is_finished(plan)
    listed = zarr.open_consolidated(str(path))
    assert listed["train/tiny/mean/layer_008"].shape == (131, 16)
