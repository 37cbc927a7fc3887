from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clustered import MakeCache, clustered, write_cache

from llmembed.common.errors import ConfigError
from llmembed.train import FitConfig, fit, load_run
from llmembed.train.config import PRESETS
from llmembed.train.fusions.classifier import Architecture, Classifier
from llmembed.train.fusions.paper import paper_features
from llmembed.train.inputs.select import Feature

WIDTHS, N_CLASSES = (*(12,) * 5, 1024, 1024), 3  # the LLM's last five layers, BERT, RoBERTa
LAYERS = tuple(range(1, 7))


def published(weights: dict[str, np.ndarray], parts: list[np.ndarray], sigma: float) -> np.ndarray:
    """The formulas of the paper, one example at a time, in float64."""
    rows = []
    for example in zip(*parts, strict=True):
        phi = []
        for i, feature in enumerate(example):
            if i < 5:
                w, b = (weights[f"fusion.compress.{i}.{name}"] for name in ("weight", "bias"))
                phi.append(np.maximum(w @ feature + b, 0))
            else:
                phi.append(feature)
        gram = np.array([[p @ q for q in phi] for p in phi])
        normalised = 2 / (1 + np.exp(-sigma * gram)) - 1
        hidden = np.concatenate([normalised.ravel(), np.mean(example[:5], axis=0)])
        for layer in (0, 3):
            w, b = (weights[f"head.layers.{layer}.{name}"] for name in ("weight", "bias"))
            hidden = np.maximum(w @ hidden + b, 0)
        logits = weights["head.layers.6.weight"] @ hidden + weights["head.layers.6.bias"]
        rows.append(np.exp(logits) / np.exp(logits).sum())
    return np.array(rows)


@pytest.mark.parametrize("sigma", [1.0, 0.001])
def test_the_forward_pass_is_the_papers(sigma: float) -> None:
    """Raw features, Gram matrix, normalisation, MLP and softmax equal a direct transcription."""
    torch.manual_seed(0)
    classifier = Classifier(
        Architecture(fusion="paper", head="paper", widths=WIDTHS, n_classes=N_CLASSES, dropout=0.5)
    )
    classifier = classifier.double().eval()
    classifier.fusion.get_buffer("sigma").fill_(sigma)
    parts = [np.random.default_rng(i).normal(size=(4, width)) for i, width in enumerate(WIDTHS)]
    weights = {name: weight.numpy() for name, weight in classifier.state_dict().items()}
    ours = classifier(torch.from_numpy(np.concatenate(parts, axis=1))).detach().numpy()
    np.testing.assert_allclose(ours, published(weights, parts, sigma), rtol=0, atol=1e-6)


def test_the_sizes_are_derived() -> None:
    """With five layers of width H the MLP is (25 + H) -> 1024 -> 256 -> C."""
    classifier = Classifier(
        Architecture(fusion="paper", head="paper", widths=(12,) * 5, n_classes=3, dropout=0.5)
    )
    shapes = {name: tuple(weight.shape) for name, weight in classifier.head.named_parameters()}
    assert [shapes[f"layers.{i}.weight"] for i in (0, 3, 6)] == [(1024, 37), (256, 1024), (3, 256)]


@pytest.fixture
def cache(tmp_path: Path) -> str:
    splits = {"train": clustered(90, 0, n_layers=6), "test": clustered(60, 1, n_layers=6)}
    return str(write_cache(tmp_path / "six.zarr", splits))


def test_the_preset_fits_raw_features_of_the_last_five_layers(cache: str, tmp_path: Path) -> None:
    """The run has five layers, no standardisation, a sigma that the validation loss chose."""
    config = FitConfig(cache=cache, preset="paper", epochs=2, output=str(tmp_path / "r"))
    run = fit(config)
    assert [feature.layer for feature in run.features] == [2, 3, 4, 5, 6]
    loaded = load_run(run.path).classifier
    assert not loaded.standardise.mean.any()
    assert (loaded.standardise.scale == 1).all()
    row = run.metrics["per_seed"][0]
    tried = row["val_loss_of_sigma"]
    assert list(tried) == [str(sigma) for sigma in PRESETS["paper"].sigmas]
    assert row["sigma"] == float(min(tried, key=tried.__getitem__))
    assert loaded.get_buffer("fusion.sigma").item() == pytest.approx(row["sigma"])


def test_a_given_sigma_is_used(cache: str, tmp_path: Path) -> None:
    """With --sigma there is one fit, with that sigma, and a scale of 1e4 saturates its entries."""
    options: dict[str, Any] = {"preset": "paper", "sigma": 1e4, "epochs": 1}
    row = fit(FitConfig(cache=cache, output=str(tmp_path / "r"), **options)).metrics["per_seed"][0]
    assert (row["sigma"], "val_loss_of_sigma" in row) == (1e4, False)
    assert row["saturated_share"] > 0.9


def test_fewer_than_five_layers(make_cache: MakeCache, tmp_path: Path) -> None:
    """A cache with two layers is refused with both numbers."""
    config = FitConfig(cache=str(make_cache()), preset="paper", output=str(tmp_path / "r"))
    with pytest.raises(ConfigError, match=r"takes the last 5 mean-pooled layers.*tiny has 2"):
        fit(config)


def test_mean_pooled_layers_alone_are_counted() -> None:
    """Six features of three layers are three mean-pooled ones, and the error says three."""
    chosen = [Feature("tiny", pooling, k, 16) for k in (1, 2, 3) for pooling in ("mean", "last")]
    with pytest.raises(ConfigError, match=r"of the features chosen tiny has 3\. Add layers with"):
        paper_features(chosen)


def test_other_sources_enter_raw() -> None:
    """The LLM's layers come first, padded means before others; BERT's one feature follows."""
    llm = [Feature("llama", pooling, k, 12) for pooling in ("mean", "mean_padded") for k in LAYERS]
    bert = Feature("bert", "pooler", 24, 1024)
    assert paper_features([bert, *llm]) == (*llm[-5:], bert)
    with pytest.raises(ConfigError, match=r"one feature of width 1024 of each source beside the"):
        paper_features([bert._replace(hidden_size=384), *llm])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, "--lr 0.1 contradicts --preset paper, which fixes it"),
        ({"layers": "1,2"}, "--layers 1,2 contradicts --preset paper"),
        ({"fusion": "mean"}, "--fusion mean contradicts --preset paper"),
        ({"val_fraction": 0.0}, "leaves --preset paper nothing to choose sigma by. Pass --sigma"),
        ({"preset": "none", "sigma": 1.0}, "--sigma 1.0 would do nothing: cooc learns its own"),
    ],
)
def test_options_that_contradict_the_recipe(options: dict[str, Any], message: str) -> None:
    """What the recipe fixes can't be given beside it."""
    with pytest.raises(ConfigError, match=message):
        FitConfig(**{"cache": "a.zarr", "preset": "paper", **options})


def test_the_recipe_has_a_place_of_its_own() -> None:
    """The preset's run does not replace that of the default cooc."""
    config = FitConfig(cache="r8.zarr", preset="paper")
    assert config.run_path.as_posix() == "runs/r8-paper-0"
    assert dataclasses.replace(config, sigma=1.0).training.lr == 1e-4
