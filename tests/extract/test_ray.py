"""Extraction on Ray, on one machine, with real workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toy_model import toy_texts

from llmembed.cache_format.errors import ExtractionError
from llmembed.extract import ExtractConfig, extract, ray_engine

pytestmark = [
    pytest.mark.ray,
    # Ray Data sets deprecated fields of its own context.
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]

N_TEXTS = 300  # five blocks of 64 rows


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """One Ray for all tests: it takes seconds to start."""
    config = ExtractConfig(model="", layers="", engine="ray", workers=2)
    with ray_engine.joined(config):
        yield


@pytest.fixture
def settings(llama: Path, write_csv: Any) -> dict[str, Any]:
    return {
        "model": str(llama),
        "layers": "1,3",
        "dataset": str(write_csv(texts=toy_texts(N_TEXTS))),
        "max_length": 16,
        "compute_dtype": "float32",
        "token_budget": 64,
    }


@pytest.fixture
def whole(settings: dict[str, Any], tmp_path: Path) -> dict[str, bytes]:
    """Every file of the cache that one process makes."""
    return tree(Path(extract(ExtractConfig(**settings, cache=str(tmp_path / "whole.zarr"))).path))


@pytest.fixture
def on_ray(settings: dict[str, Any], tmp_path: Path) -> ExtractConfig:
    """The same with two workers."""
    return ExtractConfig(**settings, cache=str(tmp_path / "ray.zarr"), engine="ray", workers=2)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@contextmanager
def in_workers(code: str) -> Iterator[None]:
    """Run code in every worker before it begins."""

    class Sabotaged(ray_engine.Worker):
        def __init__(self, job: str) -> None:
            exec(code, {})  # noqa: S102
            super().__init__(job)

    Sabotaged.__module__ = "__main__"  # so that Ray sends it whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_engine, "Worker", Sabotaged)
        yield


def test_workers_make_the_cache_of_one_process(
    on_ray: ExtractConfig, whole: dict[str, bytes]
) -> None:
    """Two workers of Ray write, byte for byte, what one process writes."""
    result = extract(on_ray)
    assert result.n_rows_computed == N_TEXTS
    assert tree(Path(result.path)) == whole


def test_a_killed_worker_is_replaced(
    on_ray: ExtractConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL of a worker before a record: another does the unit, and all rows are right."""
    marker = tmp_path / "killed"
    kill = (
        "import os, signal\n"
        "from llmembed.cache_format import blocks\n"
        "commit = blocks.commit\n"
        "def die(*arguments):\n"
        f"    if not os.path.exists({str(marker)!r}):\n"
        f"        open({str(marker)!r}, 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    commit(*arguments)\n"
        "blocks.commit = die\n"
    )
    with in_workers(kill):
        result = extract(dataclasses.replace(on_ray, workers=1))
    assert marker.exists()
    assert tree(Path(result.path)) == whole


def test_a_poison_row_is_named_and_the_rest_is_done(on_ray: ExtractConfig) -> None:
    """A unit that must not be stored is named by its row; every other unit is committed."""
    poison = (
        "from llmembed.cache_format.errors import ExtractionError\n"
        "from llmembed.extract.extractor import Extractor\n"
        "compute = Extractor.compute\n"
        "def poisoned(self, ids, on_batch, describe_row):\n"
        "    if describe_row(0).endswith('row 128'):\n"
        "        raise ExtractionError(describe_row(0) + ' is poison.')\n"
        "    return compute(self, ids, on_batch, describe_row)\n"
        "Extractor.compute = poisoned\n"
    )
    with in_workers(poison), pytest.raises(ExtractionError, match=r"1 of 5 units .*row 128 is p"):
        extract(dataclasses.replace(on_ray, workers=1))
    again = extract(dataclasses.replace(on_ray, engine="local", workers=1))
    assert again.n_rows_computed == 64
