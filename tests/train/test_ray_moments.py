"""Gram sums on Ray, on one machine, with real workers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clustered import MakeCache, clustered, load
from torch import Tensor

from llmembed.common.cluster import joined
from llmembed.common.errors import ConfigError, DataError, EngineError, MissingPackageError
from llmembed.train import FitConfig, SweepConfig, fit, run_sweep
from llmembed.train.linear import ray_moments
from llmembed.train.linear.solved import grid_of, solve_base

N = 2500  # three shares at most


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    """One Ray for all tests: it takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        with joined(None, 2):
            yield


@pytest.fixture
def cache(make_cache: MakeCache) -> str:
    """2,500 rows, of which some have no label, in three layers that tell classes apart badly."""
    features, labels = clustered(N, 0, n_layers=3)
    features += 3 * np.random.default_rng(5).normal(size=features.shape).astype(np.float16)
    labels[::50] = -1
    return str(make_cache({"train": (features, labels), "test": clustered(60, 1, n_layers=3)}))


pytestmark = pytest.mark.filterwarnings("ignore:.*have no label")


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
def test_a_sweep_on_ray_is_that_of_one_process(cache: str, tmp_path: Path) -> None:
    """Two workers' sums give the candidates, strengths and accuracies of the local sweep."""
    here = SweepConfig(cache=cache, class_weight="balanced", output=str(tmp_path / "here"))
    on_ray = dataclasses.replace(here, engine="ray", workers=2, output=str(tmp_path / "ray"))
    local, summed = run_sweep(here), run_sweep(on_ray)
    assert summed["best"] == local["best"]
    assert summed["candidates"] == local["candidates"]


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize("fusion", ["max", "auto"])
def test_a_fit_on_ray_predicts_as_one_process(cache: str, tmp_path: Path, fusion: str) -> None:
    """A solved head and a stack give the probabilities of the local fit, to rounding."""
    here = FitConfig(cache=cache, fusion=fusion, output=str(tmp_path / "here"))
    on_ray = dataclasses.replace(here, engine="ray", workers=3, output=str(tmp_path / "ray"))
    x = load(here).x_eval
    local, summed = (fit(config).classifier.logits_all(x).numpy() for config in (here, on_ray))
    np.testing.assert_allclose(summed, local, rtol=1e-3, atol=1e-4)


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
def test_workers_leave_a_validation_split_alone(make_cache: MakeCache, tmp_path: Path) -> None:
    """Its rows stand behind those of train, which alone are summed for the base of cooc."""
    splits = {"train": clustered(1500, 0), "validation": clustered(90, 2), "test": clustered(60, 1)}
    here = FitConfig(
        cache=str(make_cache(splits)), fusion="cooc", epochs=1, output=str(tmp_path / "here")
    )
    on_ray = dataclasses.replace(here, engine="ray", workers=2, output=str(tmp_path / "ray"))
    local, summed = (fit(config).classifier.base for config in (here, on_ray))
    assert local is not None
    assert summed is not None
    np.testing.assert_allclose(summed.weight.detach(), local.weight.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
def test_rows_that_are_watched_are_left_out_on_ray_too(cache: str) -> None:
    """Of 2,500 rows a tenth is watched and judged by the others, whose sums workers make."""
    here = FitConfig(cache=cache, fusion="cooc")
    on_ray = dataclasses.replace(here, engine="ray", workers=2)
    local, summed = (
        solve_base(config.plan().method, load(config)).held_out for config in (here, on_ray)
    )
    torch.testing.assert_close(summed, local, rtol=1e-3, atol=1e-3)


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
def test_workers_that_only_sum_import_no_backbone(cache: str) -> None:
    """A worker has the sums without transformers, and the extraction, ever being imported."""
    import ray

    (share, *_) = shares(cache)

    def imported(share: ray_moments.Share) -> list[str]:
        ray_moments.sums_of(share)
        return [name for name in sys.modules if name in {"transformers", "llmembed.extract"}]

    assert ray.get(ray.remote(imported).remote(share)) == []


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
def test_what_a_worker_cannot_read_is_told_in_its_own_words(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known error of a worker is the command's; another one is named in one sentence."""
    (share, *_) = shares(cache)
    other = dataclasses.replace(share, fingerprint="of another cache")
    with pytest.raises(DataError, match=r"a worker of Ray finds another cache at .*tiny\.zarr"):
        ray_moments.on_workers([other])
    with pytest.raises(EngineError, match=r"^Ray gave up: AttributeError: .*\. See Ray's logs"):
        ray_moments.on_workers([dataclasses.replace(share, standardiser=None)])


def shares(cache: str, sample_weights: Tensor | None = None) -> list[ray_moments.Share]:
    config = FitConfig(cache=cache, fusion="auto", engine="ray", workers=2)
    data = dataclasses.replace(load(config), sample_weights=sample_weights)
    summed = grid_of(config.plan().method, data, 0).summed_of
    assert isinstance(summed, ray_moments.RayMoments)
    return list(summed.shares("single", [0]))


def test_shares_are_whole_chunks(cache: str) -> None:
    """Shares begin at multiples of 1,024 rows, and together are all rows."""
    found = shares(cache)
    assert [share.rows.start for share in found] == [0, 1024]
    assert found[0].rows.stop == 1024
    assert found[1].rows.stop == N
    assert sum(len(rows) for share in found for rows in share.folds) == N - N // 50


def test_shares_have_the_weights_of_their_rows(cache: str) -> None:
    """The sums of all shares are those of one process, where rows are weighed."""
    weights = torch.arange(N) % 5 + 1.0
    parts = [ray_moments.sums_of(share) for share in shares(cache, weights)]
    config = FitConfig(cache=cache, fusion="auto")
    data = dataclasses.replace(load(config), sample_weights=weights)
    moments = grid_of(config.plan().method, data, 0).solver("single", [0]).problem.moments
    for name, tensor in vars(moments).items():
        np.testing.assert_allclose(sum(part[name] for part in parts), tensor, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2}, r"--workers is for --engine ray, and --engine is local\. Pass both"),
        ({"engine": "rya"}, r"engine 'rya' does not exist; did you mean 'ray'\?"),
        ({"engine": "ray", "workers": 0}, r"workers 0 is out of range"),
        ({"engine": "ray", "fusion": "gated"}, r"--engine ray would do nothing: fusion 'gated'"),
        ({"engine": "ray", "preset": "paper"}, r"--engine ray would do nothing: fusion 'paper'"),
        ({"engine": "ray", "fusion": "max", "head": "mlp"}, r"with head 'mlp' is trained by"),
    ],
)
def test_options_of_ray_that_would_do_nothing(options: dict[str, Any], message: str) -> None:
    """Options of Ray without Ray, and Ray without a Gram matrix to sum, are refused."""
    with pytest.raises(ConfigError, match=message):
        FitConfig(cache="a.zarr", **options)


def test_ray_is_an_extra(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray the command names the extra before it reads anything."""
    monkeypatch.setitem(sys.modules, "ray", None)
    config = SweepConfig(cache=cache, engine="ray", output=str(tmp_path / "s"))
    with pytest.raises(MissingPackageError, match=r"--engine ray needs ray.*llmembed-cache\[ray\]"):
        run_sweep(config)
