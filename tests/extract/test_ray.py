"""Extraction on Ray, on one machine, with real workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sabotaged import POISON, before_first_record, in_workers, two_units
from toy_cache import tree

from llmembed.common.cluster import joined
from llmembed.common.errors import CacheCorruptError, ConfigError, LLMEmbedWarning, RowError
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.engines import ray_engine
from llmembed.extract.engines.outcome import Counts

pytestmark = [
    pytest.mark.ray,
    # Ray Data sets deprecated fields of its own context.
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """One Ray for all tests: it takes seconds to start."""
    with joined(None, 2, ray_engine.STORE_BYTES):
        yield


@pytest.fixture
def on_ray(settings: dict[str, Any], tmp_path: Path) -> ExtractConfig:
    """The extraction by one worker."""
    return ExtractConfig(**settings, cache=str(tmp_path / "ray.zarr"), engine="ray")


def test_workers_make_the_cache_of_one_process(
    on_ray: ExtractConfig, whole: dict[str, bytes]
) -> None:
    """Two workers of Ray write, byte for byte, what one process writes."""
    result = extract(dataclasses.replace(on_ray, workers=2))
    assert result.n_rows_computed == 300
    assert tree(Path(result.path)) == whole


def test_workers_read_prompts_behind_each_text(on_ray: ExtractConfig, tmp_path: Path) -> None:
    """Of prompts too they write, byte for byte, what one process writes."""
    asked = dataclasses.replace(on_ray, prompts=("It was", "This is about"), workers=2)
    here = dataclasses.replace(asked, cache=str(tmp_path / "here.zarr"), engine="local", workers=1)
    assert tree(Path(extract(asked).path)) == tree(Path(extract(here).path))


def test_workers_hash_a_large_cache_at_the_end(
    on_ray: ExtractConfig, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a zombie left in a chunk is found by workers, and its block alone is done again."""
    monkeypatch.setattr(ray_engine, "_MANY_CHUNKS", 1)
    chunk = Path(on_ray.cache or "") / "train/toy-llama/mean/layer_003/c.1.0"
    collect = ray_engine.collect

    def then_spoil(*arguments: Any) -> Counts:
        counts = collect(*arguments)
        chunk.write_bytes(b"\x01" + chunk.read_bytes()[1:])
        return counts

    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "collect", then_spoil)
        with pytest.raises(
            CacheCorruptError, match=r"layer_003: block 1 does not hold .*withdrawn"
        ):
            extract(on_ray)
    result = extract(dataclasses.replace(on_ray, engine="local"))
    assert result.n_rows_computed == 64
    assert chunk.read_bytes() == whole["train/toy-llama/mean/layer_003/c.1.0"]


def test_a_killed_worker_is_replaced(
    on_ray: ExtractConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL of a worker before a record: another does its units, and all rows are right."""
    marker = tmp_path / "killed"
    kill = before_first_record(marker, "os.kill(os.getpid(), signal.SIGKILL)")
    with two_units(), in_workers(kill):
        result = extract(on_ray)
    assert marker.exists()
    assert tree(Path(result.path)) == whole


def test_a_poison_row_is_named_and_the_rest_is_done(
    on_ray: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row without a feature is named; every other block is committed, of the same unit too."""
    monkeypatch.setattr(ray_engine, "_UNITS_A_WORKER", 1)  # so that one unit has all blocks
    named = r"row 128 is poison\. All other blocks of rows are done\."
    with (
        in_workers(POISON),
        pytest.warns(LLMEmbedWarning, match=r"row 128 is poison\. Going on"),
        pytest.raises(RowError, match=named),
    ):
        extract(on_ray)
    again = extract(dataclasses.replace(on_ray, engine="local"))
    assert again.n_rows_computed == 64


def test_a_failing_device_is_left_for_another_process(
    on_ray: ExtractConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """What fails once in a worker is done again, by a worker that did not see it fail."""
    fail = "raise RuntimeError('CUDA error: an illegal memory access was encountered')"
    with two_units(), in_workers(before_first_record(tmp_path / "marker", fail)):
        result = extract(on_ray)
    assert tree(Path(result.path)) == whole


def test_gpus_that_are_not_there_are_not_waited_for(on_ray: ExtractConfig) -> None:
    """On this machine alone, more GPUs than it has are refused; none will come."""
    with pytest.raises(ConfigError, match=r"--gpus-per-worker is 99, but .* more than \d+ GPUs"):
        extract(dataclasses.replace(on_ray, gpus_per_worker=99.0))


def test_the_arithmetic_of_gpus_is_not_chosen_without_one(on_ray: ExtractConfig) -> None:
    """A driver that sees no GPU does not decide what workers with GPUs compute in."""
    config = dataclasses.replace(on_ray, compute_dtype="auto", gpus_per_worker=1.0)
    with pytest.raises(ConfigError, match=r"but the workers have. Pass --compute-dtype"):
        extract(config)
