"""Which split stops the training early, and which is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clustered import MakeCache, clustered, load

from llmembed.common.errors import LLMEmbedWarning
from llmembed.train import FitConfig, fit
from llmembed.train.cli.fit import fit_main
from llmembed.train.reports.report import metrics_table

GRADIENT = {"fusion": "scalar-mix", "epochs": 3, "layers": "1,2"}


def splits(**names: int) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    return {name: clustered(n, seed) for seed, (name, n) in enumerate(names.items())}


@pytest.mark.parametrize(
    ("sizes", "evaluated", "watched"),
    [
        ({"train": 90, "validation": 30, "test": 60}, ("test", 60), ("validation", 30)),
        ({"train": 90, "dev": 30, "test": 60}, ("test", 60), ("dev", 30)),
        ({"train": 90, "test": 60}, ("test", 60), ("train", 9)),
        ({"train": 90, "validation": 30}, ("validation", 30), ("train", 9)),
        ({"train": 90, "val": 30}, ("val", 30), ("train", 9)),
    ],
)
def test_a_validation_split_is_evaluated_or_watched(
    make_cache: MakeCache,
    sizes: dict[str, int],
    evaluated: tuple[str, int],
    watched: tuple[str, int],
) -> None:
    """Beside test it stops the training early; without test it is evaluated."""
    data = load(FitConfig(cache=str(make_cache(splits(**sizes))), **GRADIENT))
    record = data.shares.record()
    assert tuple(record["eval"].values()) == evaluated
    assert tuple(record["validation"].values()) == watched
    assert record["train"]["n"] == 90 - (9 if watched[0] == "train" else 0)


def test_the_rows_of_a_validation_split_stand_behind_those_of_train(make_cache: MakeCache) -> None:
    """They have their own features, standardised as the training rows are, and their labels."""
    parts = splits(train=90, validation=30, test=60)
    config = FitConfig(cache=str(make_cache(parts)), **GRADIENT)
    data, alone = load(config), load(FitConfig(cache=config.cache, fusion="mean"))
    assert (data.x.shape[0], data.y.shape[0]) == (120, 120)
    assert alone.x.shape[0] == 90
    features, labels = parts["validation"]
    raw = torch.from_numpy(np.concatenate(list(features[:2]), axis=1)).float()
    rows = torch.from_numpy(data.shares.validation)
    torch.testing.assert_close(data.x[rows], data.standardiser(raw))
    assert data.y[rows].tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("options", "watched"),
    [
        ({"val_fraction": 0.2}, ("train", 18)),
        ({"val_fraction": 0.0}, ("train", 0)),
        ({"eval_split": "validation"}, ("train", 9)),
        ({"eval_split": "dev"}, ("train", 9)),
    ],
)
def test_a_validation_split_is_watched_only_where_it_may_be(
    make_cache: MakeCache, options: dict[str, Any], watched: tuple[str, int]
) -> None:
    """A share that is asked for is drawn from train, and what is evaluated is never watched."""
    cache = make_cache(splits(train=90, validation=30, test=60))
    data = load(FitConfig(cache=str(cache), **GRADIENT, **options))
    assert tuple(data.shares.record()["validation"].values()) == watched


def test_validation_rows_of_no_trained_class_are_not_watched(make_cache: MakeCache) -> None:
    """Their loss could only end the training at a wrong time; they are counted in a warning."""
    parts = dict(splits(train=90, validation=30, test=60))
    parts["train"] = clustered(90, 0, n_classes=2)
    cache = make_cache(parts)
    with pytest.warns(LLMEmbedWarning, match="split 'validation': 10 of 30 rows have a class that"):
        data = load(FitConfig(cache=str(cache), **GRADIENT))
    assert len(data.shares.validation) == 20
    unlabelled = {**parts, "validation": (parts["validation"][0], np.full(30, -1, np.int32))}
    other = load(FitConfig(cache=str(make_cache(unlabelled, name="u.zarr")), **GRADIENT))
    assert other.shares.record()["validation"] == {"split": "train", "n": 9}


@pytest.mark.parametrize("fusion", ["cooc", "scalar-mix"])
def test_a_fit_says_which_split_stopped_it(
    make_cache: MakeCache, tmp_path: Path, fusion: str
) -> None:
    """The record and the printed figures name the split; heads that are solved need none."""
    cache = make_cache(splits(train=90, validation=30, test=60))
    config = FitConfig(cache=str(cache), fusion=fusion, epochs=3, output=str(tmp_path / "run"))
    run = fit(config)
    assert run.metrics["splits"]["validation"] == {"split": "validation", "n": 30}
    assert run.metrics["splits"]["train"] == {"split": "train", "n": 90}
    assert "early stopping   validation, 30 examples" in metrics_table(run.metrics)
    assert run.metrics["accuracy"] > 0.8
    solved = CliRunner().invoke(
        fit_main, ["--cache", str(cache), "--fusion", "mean", "--output", str(tmp_path / "s")]
    )
    assert solved.exit_code == 0, solved.output
    assert "early stopping" not in solved.output


def test_the_base_of_cooc_has_not_seen_the_validation_split(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """Random labels of a validation split leave the solved base as it is."""
    parts = dict(splits(train=90, validation=30, test=60))
    bases = []
    for name in ("a", "b"):
        config = FitConfig(
            cache=str(make_cache(parts, name=f"{name}.zarr")),
            fusion="cooc",
            epochs=1,
            output=str(tmp_path / name),
        )
        bases.append(fit(config).classifier.base)
        features, labels = parts["validation"]
        parts["validation"] = (-features, np.roll(labels, 1))
    assert bases[0] is not None
    assert bases[1] is not None
    torch.testing.assert_close(bases[0].weight, bases[1].weight, rtol=0, atol=0)
