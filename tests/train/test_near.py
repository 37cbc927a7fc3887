"""Evaluation rows that are a training row, or nearly one, are counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clustered import MakeCache, clustered, load, source_info, text_hash, write_split

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.common.errors import LLMEmbedWarning
from llmembed.train import FitConfig, fit
from llmembed.train.inputs import near
from llmembed.train.inputs.near import find_repeated
from llmembed.train.reports.report import metrics_table, notes_of_rows


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


def repeating(make_cache: MakeCache, n_test: int = 60) -> str:
    """Test rows 1, 8 and 9 have the texts of training rows 20, 5 and again 20, which is 30 too."""
    cache = make_cache({"train": clustered(90, 0)}, finish=False)
    hashes = {"train": text_hash("train", 90), "test": text_hash("test", n_test)}
    hashes["train"][30] = hashes["train"][20]
    hashes["test"][[1, 8, 9]] = hashes["train"][[20, 5, 20]]
    path = cache.with_name("repeating.zarr")
    with CacheWriter(path, dataset=open_cache(cache).dataset) as writer:
        writer.add_source(source_info("tiny", 16))
        for seed, (split, own) in enumerate(hashes.items()):
            write_split(writer, split, "tiny", *clustered(len(own), seed), hashes=own)
    return str(path)


SAME = [{"row": 1, "train_row": 20}, {"row": 8, "train_row": 5}, {"row": 9, "train_row": 20}]
REPEATED = "3 of 60 evaluation rows have the text of a training row: 1 to 20, 8 to 5, 9 to 20"


@pytest.mark.parametrize("fusion", ["mean", "scalar-mix"])
def test_rows_of_one_text_are_paired(make_cache: MakeCache, fusion: str) -> None:
    """Each evaluation row is named with the first training row of its text, watched rows too."""
    cache = repeating(make_cache)
    with pytest.warns(
        LLMEmbedWarning, match="stands in the training rows: row 1 of 'test' is row 20 of"
    ):
        data = load(FitConfig(cache=cache, fusion=fusion))
    found = find_repeated(open_cache(cache), data)
    assert (found["n_same_text"], found["same_text"]) == (3, SAME)
    assert found["near"]["n_checked"] == 57


def test_held_out_rows_of_one_text_are_rows_of_train(make_cache: MakeCache) -> None:
    """Where the evaluation rows were held out, both numbers are of the training split."""
    hashes = text_hash("train", 45)
    cache = make_cache({"test": clustered(9, 1)})
    path = str(cache.with_name("held.zarr"))
    with CacheWriter(path, dataset=open_cache(cache).dataset) as writer:
        writer.add_source(source_info("tiny", 16))
        every = np.concatenate([hashes, hashes])  # row k is row k + 45 once more
        write_split(writer, "train", "tiny", *clustered(90, 0), hashes=every)
    with pytest.warns(LLMEmbedWarning, match="of 'train' is row [0-9]+ of 'train'"):
        data = load(FitConfig(cache=path, fusion="mean"))
    found = find_repeated(open_cache(path), data)
    assert found["same_text"]
    for one in found["same_text"]:
        assert one["row"] in data.shares.eval
        assert abs(one["row"] - one["train_row"]) == 45
        assert one["train_row"] not in data.shares.eval


def test_a_few_are_named_and_a_thousand_are_listed(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted is never cut; lists are, and say so by dots where people read them."""
    cache = repeating(make_cache)
    monkeypatch.setattr(near, "MOST_LISTED", 2)
    monkeypatch.setattr("llmembed.train.inputs.shares.MOST_NAMED", 2)
    with pytest.warns(LLMEmbedWarning, match=r"row 20 of 'train', 8 is 5, \.\.\.\. They"):
        data = load(FitConfig(cache=cache, fusion="mean"))
    found = find_repeated(open_cache(cache), data)
    assert (found["n_same_text"], found["same_text"]) == (3, SAME[:2])
    told = dict(notes_of_rows({"splits": {"train": {}}, "n_eval": 60, "repeated": found}))
    assert told == {"repeated texts": REPEATED.replace(", 9 to 20", ", ...")}


def test_runs_that_only_counted_them_are_told_as_before() -> None:
    """The record of an older version has the number, and no rows."""
    metrics = {"splits": {"train": {}}, "n_eval": 60, "repeated": {"n_same_text": 3}}
    told = notes_of_rows(metrics)
    assert told == [("repeated texts", "3 of 60 evaluation rows have the text of a training row")]


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
    with pytest.warns(LLMEmbedWarning, match="3 of 60 evaluation rows"):
        same = fit(
            FitConfig(cache=repeating(make_cache), fusion="mean", output=str(tmp_path / "s"))
        )
    stored_same = json.loads((tmp_path / "s/metrics.json").read_text())["repeated"]
    assert (stored_same["n_same_text"], stored_same["same_text"]) == (3, SAME)
    assert REPEATED in metrics_table(same.metrics)
    assert REPEATED in (tmp_path / "s/report.html").read_text()
    run = fit(FitConfig(cache=leaking(make_cache), fusion="mean", output=str(tmp_path / "run")))
    stored: dict[str, Any] = json.loads((tmp_path / "run/metrics.json").read_text())
    assert stored["repeated"]["near"]["n"] == 2
    said = "2 of 60 evaluation rows, by a cosine of 0.98 to a training row"
    assert said in metrics_table(run.metrics)
    assert said in (tmp_path / "run/report.html").read_text()
    clean = make_cache(name="clean.zarr")
    other = fit(FitConfig(cache=str(clean), fusion="mean", output=str(tmp_path / "other")))
    for name in ("near duplicates", "repeated texts"):
        assert name not in metrics_table(other.metrics)
