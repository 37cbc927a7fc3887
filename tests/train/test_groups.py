"""Rows that belong together stay on one side; weights of rows and classes come from a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clustered import HIDDEN_SIZE, LABELS, clustered, load, source_info, text_hash
from hypothesis import given, settings
from hypothesis import strategies as st
from number_classifier import NumberClassifier
from sklearn.model_selection import StratifiedGroupKFold

from llmembed.cache_format import CacheWriter, DatasetInfo
from llmembed.common.errors import ConfigError, DataError, LLMEmbedWarning
from llmembed.train import FitConfig, SweepConfig, fit
from llmembed.train.cli.fit import fit_main
from llmembed.train.inputs.grouping import as_group_names
from llmembed.train.inputs.shares import draw_folds, draw_stratified
from llmembed.train.linear.solved import folds_of
from llmembed.train.measures import Floats
from llmembed.train.reports.report import metrics_table

N = 90


def write(path: Path, **splits: dict[str, Any]) -> str:
    """Write clustered features; a split is its number of rows, weights and groups."""
    with CacheWriter(path, dataset=DatasetInfo(name="t", labels=LABELS, provenance={})) as writer:
        writer.add_source(source_info("tiny", HIDDEN_SIZE))
        for seed, (name, columns) in enumerate(splits.items()):
            n = columns.pop("n", N)
            features, labels = clustered(n, seed)
            given = {"labels": labels, "text_hash": text_hash(name, n)} | columns
            writer.add_split(name, **given)
            plan = writer.plan(name, "tiny", arrays=[("mean", 1), ("mean", 2)])
            for block in plan.blocks:
                rows = slice(block.compute_from, block.stop)
                arrays = {("mean", k + 1): features[k, rows] for k in range(2)}
                tokens = np.full(block.stop - block.compute_from, 3, dtype=np.int32)
                writer.write(plan, block, n_tokens=tokens, features=arrays)
            writer.finish(name, "tiny")
    return str(path)


def fives(n: int = N) -> np.ndarray:
    return (np.arange(n) // 5).astype(np.uint64)


def imbalance(labels: np.ndarray, folds: list[np.ndarray]) -> float:
    """How far the folds' shares of the classes are from equal: the mean deviation."""
    counts = np.array([np.bincount(labels[fold], minlength=labels.max() + 1) for fold in folds])
    return float((counts / counts.sum(axis=0)).std(axis=0).mean())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=12, max_size=80),
    st.integers(2, 5),
    st.integers(0, 9),
)
def test_no_group_is_in_two_folds(rows: list[tuple[int, int]], n_folds: int, seed: int) -> None:
    """Every row is in one fold, with all rows of its group; with enough groups none is empty."""
    labels, groups = np.array(rows).T
    generator = np.random.default_rng(seed)
    folds = draw_folds(labels, np.arange(len(rows)), n_folds, generator, groups)
    assert sorted(np.concatenate(folds).tolist()) == list(range(len(rows)))
    assert sum(len(np.unique(groups[fold])) for fold in folds) == len(np.unique(groups))
    if len(np.unique(groups)) >= n_folds:
        assert all(len(fold) for fold in folds)


@pytest.mark.parametrize("n_groups", [12, 60, 400])
def test_folds_are_as_stratified_as_those_of_scikit_learn(n_groups: int) -> None:
    """On the mean over ten draws of skewed groups, to a twentieth: ours evens out all rows too."""
    ours, theirs = [], []
    for seed in range(10):
        generator = np.random.default_rng(seed)
        groups = generator.zipf(1.4, 600) % n_groups
        labels = generator.dirichlet(np.ones(4), n_groups)[groups].cumsum(axis=1)
        labels = (generator.random(600)[:, None] > labels).sum(axis=1).clip(max=3)
        folds = draw_folds(labels, np.arange(600), 5, generator, groups)
        ours.append(imbalance(labels, folds))
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        split = [test for _, test in splitter.split(labels, labels, groups)]
        theirs.append(imbalance(labels, split))
    assert np.mean(ours) <= np.mean(theirs) * 1.05


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=12, max_size=80),
    st.sampled_from([0.1, 0.3, 0.5]),
)
def test_a_share_takes_whole_groups_and_leaves_each_class(
    rows: list[tuple[int, int]], fraction: float
) -> None:
    """What is drawn shares no group with what is kept, and what is kept has all classes."""
    labels, groups = np.array(rows).T
    if len(np.unique(groups)) < 2:
        return
    generator = np.random.default_rng(0)
    kept, drawn = draw_stratified(labels, np.arange(len(rows)), fraction, generator, groups)
    assert sorted([*kept, *drawn]) == list(range(len(rows)))
    assert not set(groups[kept]) & set(groups[drawn])
    assert set(labels[kept]) == set(labels)


def test_a_share_of_many_groups_has_the_size_asked_for() -> None:
    """In all and of each class, to a group."""
    labels, groups = np.arange(900) % 3, np.arange(900) // 3
    _, drawn = draw_stratified(labels, np.arange(900), 0.1, np.random.default_rng(0), groups)
    assert np.bincount(labels[drawn]).tolist() == [30, 30, 30]


def test_rows_without_groups_are_divided_as_before(tmp_path: Path) -> None:
    """--ignore-groups draws what a cache without groups draws."""
    with_groups = write(tmp_path / "a.zarr", train={"groups": fives()}, test={"n": 30})
    plain = write(tmp_path / "b.zarr", train={}, test={"n": 30})
    ignoring = FitConfig(cache=with_groups, fusion="mean", ignore_groups=True)
    folds = [
        folds_of(config.plan().method, load(config), 0)
        for config in (ignoring, FitConfig(cache=plain, fusion="mean"))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*folds, strict=True))


@pytest.mark.parametrize("has_test", [True, False])
@pytest.mark.parametrize("fusion", ["mean", "scalar-mix", "cooc"])
def test_groups_of_a_cache_are_on_one_side_everywhere(
    tmp_path: Path, fusion: str, has_test: bool
) -> None:
    """Of folds, of the share that stops the training, and of the share that is evaluated."""
    splits: dict[str, Any] = {"test": {"n": 30}} if has_test else {}
    cache = write(tmp_path / "a.zarr", train={"groups": fives()}, **splits)
    epochs = {"epochs": 2} if fusion != "mean" else {}
    config = FitConfig(cache=cache, fusion=fusion, output=str(tmp_path / "run"), **epochs)
    data = load(config)
    groups, shares = fives(), data.shares
    sides = [shares.train, shares.validation] + ([] if has_test else [shares.eval])
    assert sum(len(np.unique(groups[side])) for side in sides) == 18
    assert len(shares.validation) == (0 if fusion == "mean" else pytest.approx(9, abs=4))
    folds = folds_of(config.plan().method, data, 0)
    assert sum(len(np.unique(groups[fold])) for fold in folds) == len(
        np.unique(groups[shares.train])
    )
    metrics = fit(config).metrics
    assert metrics["splits"]["train"]["n_groups"] == len(np.unique(groups[shares.train]))
    assert "groups of rows" in metrics_table(metrics)


def test_groups_on_both_sides_of_the_data_set_are_counted(tmp_path: Path) -> None:
    """They are evaluated, and a warning says how many there are."""
    cache = write(
        tmp_path / "a.zarr", train={"groups": fives()}, test={"n": 30, "groups": fives(30) + 16}
    )
    with pytest.warns(LLMEmbedWarning, match="2 groups stand in the training rows and in the"):
        assert len(load(FitConfig(cache=cache, fusion="mean")).shares.eval) == 30


def test_a_class_of_one_group_is_never_held_out(tmp_path: Path) -> None:
    """Without the group there is no such class; the fit knows it all the same."""
    labels = np.arange(N) % 3
    groups = np.where(labels == 2, 1000, np.arange(N)).astype(np.uint64)
    cache = write(tmp_path / "a.zarr", train={"groups": groups}, test={"n": 30})
    run = fit(FitConfig(cache=cache, fusion="mean", head="lda", output=str(tmp_path / "run")))
    assert run.held_out is not None
    assert set(run.held_out.label) == {0, 1}
    assert run.metrics["per_class"]["trade"]["recall"] > 0.5


@pytest.mark.parametrize(
    ("groups", "options", "error", "message"),
    [
        (np.zeros(N), {}, DataError, "all 90 training rows are of one group, so none can be held"),
        (np.zeros(N), {"fusion": "gated"}, DataError, "pass --ignore-groups"),
        (fives(), {"folds": 20}, ConfigError, "18 groups of training rows can't be divided into"),
    ],
)
def test_groups_that_cannot_be_divided_are_refused(
    tmp_path: Path, groups: np.ndarray, options: dict[str, Any], error: Any, message: str
) -> None:
    """One group, or fewer than folds: one sentence."""
    cache = write(tmp_path / "a.zarr", train={"groups": groups.astype(np.uint64)}, test={"n": 30})
    with pytest.raises(error, match=message):
        fit(FitConfig(cache=cache, **{"fusion": "mean", **options}, output=str(tmp_path / "run")))


@pytest.mark.parametrize("fusion", ["mean", "auto", "scalar-mix"])
def test_weights_of_a_cache_are_those_of_the_estimator(tmp_path: Path, fusion: str) -> None:
    """A row of weight 2 is two rows, and one of weight 0 none, in every kind of fit."""
    weights = np.ones(N, dtype=np.float32)
    weights[::7], weights[1::5] = 3, 0
    cache = write(tmp_path / "a.zarr", train={"weights": weights}, test={"n": 30})
    options: dict[str, Any] = {"epochs": 2} if fusion == "scalar-mix" else {}
    config = FitConfig(cache=cache, fusion=fusion, output=str(tmp_path / "run"), **options)
    data = load(config)
    assert data.sample_weights is not None
    rows = np.concatenate([data.shares.train, data.shares.validation])
    assert set(rows) == set(np.flatnonzero(weights))
    torch.testing.assert_close(
        data.sample_weights[rows], torch.from_numpy(weights[rows] / weights[rows].mean())
    )
    metrics = fit(config).metrics
    told = metrics["splits"]["train"]["weights"]
    assert told == {"min": 1.0, "max": 3.0, "n_left_out": int((weights == 0).sum())}
    assert "1 to 3, 18 rows of 0 left out" in metrics_table(metrics)


def test_weights_may_be_left_out(tmp_path: Path) -> None:
    """--ignore-weights fits what a cache without weights would give."""
    weights = (1 + np.arange(N) % 4).astype(np.float32)
    weighed = write(tmp_path / "a.zarr", train={"weights": weights}, test={"n": 30})
    plain = write(tmp_path / "b.zarr", train={}, test={"n": 30})
    found = [
        fit(FitConfig(cache=cache, fusion="mean", output=str(tmp_path / name), ignore_weights=skip))
        for cache, name, skip in ((weighed, "1", True), (plain, "2", False), (weighed, "3", False))
    ]
    first, second, third = (run.classifier.head.logits.weight for run in found)  # type: ignore[union-attr]
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_weights_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    """Of the labelled rows alone, too."""
    labels = clustered(N, 0)[1].copy()
    labels[:5] = -1
    weights = np.zeros(N, dtype=np.float32)
    weights[:5] = 1
    cache = write(tmp_path / "a.zarr", train={"weights": weights, "labels": labels}, test={"n": 30})
    with (
        pytest.warns(LLMEmbedWarning, match="5 of 90 rows have no label"),
        pytest.raises(DataError, match="all 85 labelled rows of split 'train' have weight 0"),
    ):
        load(FitConfig(cache=cache, fusion="mean"))


def test_class_weights_by_name_are_weights_of_their_rows(tmp_path: Path) -> None:
    """On the command line and in Python; the record and the command on the page hold them."""
    labels = clustered(N, 0)[1]
    by_row = np.array([2.5, 1, 0.5], dtype=np.float32)[labels]
    plain = write(tmp_path / "a.zarr", train={}, test={"n": 30})
    weighed = write(tmp_path / "b.zarr", train={"weights": by_row}, test={"n": 30})
    given = ["--class-weight", "earn=2.5", "--class-weight", "trade=0.5"]
    command = ["--cache", plain, "--fusion", "scalar-mix", "--epochs", "1", "--val-fraction", "0"]
    said = CliRunner().invoke(
        fit_main, [*command, *given, "--output", str(tmp_path / "run")], catch_exceptions=False
    )
    assert said.exit_code == 0
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["fit"]["class_weight"] == {"earn": 2.5, "trade": 0.5}
    page = (tmp_path / "run/report.html").read_text()
    assert "--class-weight earn=2.5 --class-weight trade=0.5" in page
    config = FitConfig(cache=plain, class_weight={"earn": 2.5, "trade": 0.5}, fusion="scalar-mix")
    by_class = load(config).class_weights()[torch.from_numpy(labels).long()]
    of_rows = load(FitConfig(cache=weighed, fusion="scalar-mix")).sample_weights
    assert of_rows is not None
    torch.testing.assert_close(by_class, of_rows, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"earn": 0}, "the class weight of 'earn' is 0, and a weight is a finite number above 0"),
        ({"earn": -1}, "is -1"),
        (("earn=nan",), "is nan"),
        (("earn=much",), "is 'much'"),
        (("earn=1", "earn=2"), "gives class 'earn' two weights, 1.0 and 2"),
        (("balanced", "earn=2"), "class_weight 'balanced' does not exist"),
        (("ballanced",), "did you mean 'balanced'"),
    ],
)
@pytest.mark.parametrize("config", [FitConfig, SweepConfig])
def test_class_weights_that_are_none_are_refused(config: Any, given: Any, message: str) -> None:
    """Before anything is read: one sentence with the value."""
    with pytest.raises(ConfigError, match=message):
        config(cache="none.zarr", class_weight=given)


def test_a_class_weight_of_no_class_is_refused(tmp_path: Path) -> None:
    """By the names of the cache, with a close match."""
    cache = write(tmp_path / "a.zarr", train={}, test={"n": 30})
    with pytest.raises(ConfigError, match=r"class 'graim' does not exist; did you mean 'grain'"):
        load(FitConfig(cache=cache, class_weight={"graim": 2}))


def numbers() -> tuple[Floats, np.ndarray]:
    generator = np.random.default_rng(0)
    y = np.arange(60) % 3
    return generator.normal(size=(3, 4))[y] + generator.normal(size=(60, 4)), y


@pytest.mark.parametrize("fusion", ["concat", "gated"])
def test_the_estimator_takes_groups(fusion: str) -> None:
    """Every text a group of its own changes the draws alone; a missing one is refused."""
    x, y = numbers()
    model = NumberClassifier(fusion=fusion, epochs=2 if fusion == "gated" else None)
    grouped = model.fit(x, y, groups=[f"author {k // 4}" for k in range(60)])
    assert grouped.score(x, y) > 0.5
    with pytest.raises(DataError, match="all 60 training rows are of one group"):
        model.fit(x, y, groups=["ann"] * 60)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a", None, "b"], "groups is None in row 1"),
        ([1.0, 2.0, float("nan")], "groups is nan in row 2"),
        (["a"], "groups has 1 values, and there are 3 texts"),
    ],
)
def test_groups_that_are_none_are_refused(groups: list[Any], message: str) -> None:
    """A text without a group would silently stand alone."""
    with pytest.raises(DataError, match=message):
        as_group_names(groups, 3)
