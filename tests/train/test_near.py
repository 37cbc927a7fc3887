"""Evaluation rows that are nearly a training row are counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clustered import MakeCache, clustered, load

from llmembed.cache_format import open_cache
from llmembed.train import FitConfig, fit
from llmembed.train.inputs import near
from llmembed.train.inputs.near import find_repeated
from llmembed.train.reports.report import metrics_table


def leaking(make_cache: MakeCache) -> str:
    """Test rows 4 and 7 are training rows 11 and 35, but for a little noise."""
    train, test = clustered(90, 0), clustered(60, 1)
    features = test[0].copy()
    noise = np.random.default_rng(5).normal(size=(2, 2, 16)) * 0.02
    features[:, [4, 7]] = train[0][:, [11, 35]] + noise
    return str(make_cache({"train": train, "test": (features, test[1])}))


def by_hand(cache: str) -> np.ndarray:
    """Cosines `[60, 90]` of the rows of the deeper layer, in float64."""
    x, z = (open_cache(cache)[name].features(2).astype(float) for name in ("train", "test"))
    mean, scale = x.mean(axis=0), x.std(axis=0)
    x, z = ((one - mean) / scale for one in (x, z))
    x, z = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (x, z))
    found: np.ndarray = z @ x.T
    return found


@pytest.mark.parametrize("fusion", ["mean", "scalar-mix"])
def test_near_rows_are_those_of_the_cosines(make_cache: MakeCache, fusion: str) -> None:
    """Numbers of rows are those of their splits, the nearest first, watched rows too."""
    cache = leaking(make_cache)
    data = load(FitConfig(cache=cache, fusion=fusion))
    found = find_repeated(open_cache(cache), data)
    cosines = by_hand(cache)
    assert found["n_same_text"] == 0
    assert found["near"]["n_checked"] == 60
    assert found["near"]["n"] == int((cosines.max(axis=1) >= 0.98).sum()) == 2
    told = {(one["row"], one["train_row"]) for one in found["near"]["pairs"]}
    assert told == {(4, 11), (7, 35)}
    for one in found["near"]["pairs"]:
        assert one["cosine"] == pytest.approx(cosines[one["row"], one["train_row"]], abs=1e-3)
    assert found["near"]["feature"]["layer"] == 2


def test_blocks_and_a_budget(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks change nothing; beyond the budget rows at equal distances are looked at, and told."""
    cache = leaking(make_cache)
    data = load(FitConfig(cache=cache, fusion="mean"))
    whole = find_repeated(open_cache(cache), data)
    monkeypatch.setattr(near, "_BLOCK_ROWS", 7)
    assert find_repeated(open_cache(cache), data) == whole
    monkeypatch.setattr(near, "_BUDGET", 90 * 16 * 15)
    some = find_repeated(open_cache(cache), data)["near"]
    assert some["n_checked"] == 15
    assert [one["row"] for one in some["pairs"]] == [4]


def test_the_record_the_table_and_the_page_name_them(make_cache: MakeCache, tmp_path: Path) -> None:
    """Without any, nothing is said."""
    run = fit(FitConfig(cache=leaking(make_cache), fusion="mean", output=str(tmp_path / "run")))
    stored: dict[str, Any] = json.loads((tmp_path / "run/metrics.json").read_text())
    assert stored["repeated"]["near"]["n"] == 2
    said = "2 of 60 evaluation rows, by a cosine of 0.98 to a training row"
    assert said in metrics_table(run.metrics)
    assert said in (tmp_path / "run/report.html").read_text()
    clean = make_cache(name="clean.zarr")
    other = fit(FitConfig(cache=str(clean), fusion="mean", output=str(tmp_path / "other")))
    assert "near duplicates" not in metrics_table(other.metrics)
