"""What solving saves: closed forms, softmax and the sweep against scikit-learn, on the same rows.

LDA with 10 strengths and 5 folds stands against LogisticRegressionCV(Cs=10, cv=5), as it comes (100
steps at most), on four layers of each of three data sets, one by one: on one layer two such
accuracies lie 0.3 points apart by chance (nine of MR's 3,554 rows), and up to 0.9 on SST-2's 872.
With R52's classes LogisticRegressionCV takes an hour. Ridge, as fast, stands there too; against
RidgeClassifierCV, with the same strengths and folds, on four layers together. A softmax regression
stands against LogisticRegression(), with the penalised loss that each reaches. The sweep over all
layers of one pooling stands against one fit on the concatenation of four, reading included in both.

The part `large` has features of the size of SST-2 with LLaMA2-7B, 67,349 x 4 x 4,096, reading
excluded: ridge on each of four layers, one softmax regression (the penalty that of the middle of
its grid), and ten epochs of the paper's cooc on five layers.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold

from llmembed.train import FitConfig, SweepConfig, run_sweep
from llmembed.train.inputs.data import FitData, load_data
from llmembed.train.linear.closed import LinearMap, Ridge
from llmembed.train.linear.moments import Problem
from llmembed.train.linear.softmax import SoftmaxSolver
from llmembed.train.linear.solved import folds_of
from llmembed.train.verbs.fitting import train

N_FOLDS, EPOCHS = 5, 10
Measured = tuple[dict[str, Any], dict[str, float]]


def measure(configs: Sequence[FitConfig], one_layer: str, repeats: int) -> Measured:
    """Time all of it, on the first data set where one is enough.

    Args:
        configs: cache, source, pooling, and four layers of each data set.
        one_layer: layer where one is enough.
        repeats: of what takes seconds; medians are given. scikit-learn's searches run once.
    """
    layers: dict[str, Any] = {}
    for config in configs:
        of_layer = layers[Path(config.cache).stem] = {}
        for layer in str(config.layers).split(","):
            data = _read(config, layer)
            search = LogisticRegressionCV(
                Cs=10, cv=N_FOLDS, scoring="accuracy", l1_ratios=(0,), use_legacy_attributes=False
            )
            of_layer[layer] = {head: _solved(data, head, repeats) for head in ("ridge", "lda")}
            of_layer[layer]["logistic_regression_cv"] = _searched(search, data)
    one, four = (_read(configs[0], chosen) for chosen in (one_layer, configs[0].layers))
    alphas = [len(four.x) * strength for strength in Ridge.STRENGTHS]  # features have variance 1
    search = RidgeClassifierCV(alphas=alphas, cv=StratifiedKFold(N_FOLDS))
    result: dict[str, Any] = {
        "layers": layers,
        "ridge_of_four": _solved(four, "ridge", repeats),
        "ridge_classifier_cv": _searched(search, four),
        **_softmax(one, repeats),
        **_sweep(configs[0], repeats),
    }
    pairs = [
        (layer["lda"], layer["logistic_regression_cv"])
        for of_layer in layers.values()
        for layer in of_layer.values()
    ]
    ours, theirs = result["softmax"], result["logistic_regression"]
    gains = [100 * (ours["accuracy"] - theirs["accuracy"]) for ours, theirs in pairs]
    return result, {
        "LDA, times LogisticRegressionCV": statistics.median(b["s"] / a["s"] for a, b in pairs),
        "LDA over LogisticRegressionCV": statistics.mean(gains),
        "ridge, times RidgeClassifierCV": (
            result["ridge_classifier_cv"]["s"] / result["ridge_of_four"]["s"]
        ),
        "softmax, times LogisticRegression": theirs["s"] / ours["s"],
        "softmax, loss above LogisticRegression": ours["loss"] - theirs["loss"],
        "sweep of all layers over a concat fit": result["sweep_s"] / result["concat_s"],
    }


def _read(config: FitConfig, layers: str | None) -> FitData:
    return load_data(_options(config, layers, "auto").plan().reading)


def _options(config: FitConfig, layers: str | None, head: str) -> FitConfig:
    chosen: dict[str, Any] = {"source": config.source, "pooling": config.pooling, "head": head}
    chosen |= {"layers": layers, "fusion": "concat", "calibrate": "none", "accelerator": "cpu"}
    return FitConfig(cache=config.cache, **chosen)


def _solved(data: FitData, head: str, repeats: int) -> dict[str, float]:
    plan = _options(FitConfig(cache=""), None, head).plan()
    seconds, outcome = harness.median_s(functools.partial(train, plan, data), repeats)
    found = outcome.best.classifier.logits_all(data.x_eval).argmax(dim=1)
    return {"s": seconds, "accuracy": (found == data.y_eval).double().mean().item()}


def _searched(search: Any, data: FitData) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The least populated class")
        seconds, _ = harness.timed(lambda: search.fit(data.x.numpy(), data.y.numpy()))
    return {"s": seconds, "accuracy": search.score(data.x_eval.numpy(), data.y_eval.numpy())}


def _softmax(data: FitData, repeats: int) -> dict[str, Any]:
    """Fit with the penalty that LogisticRegression has as it comes, C = 1."""
    x, y, n_classes = data.x, data.y, len(data.labels)
    # With two classes scikit-learn penalises their difference, which is twice either's square.
    penalty = (2 if n_classes == 2 else 1) / len(x)
    unit = _problem(data).moments.total()
    variance = float((unit.gram.diagonal() / unit.n - unit.mean.square()).mean())
    ours_s, ours = harness.median_s(
        lambda: SoftmaxSolver(_problem(data)).solve(penalty / variance), repeats
    )
    regression = LogisticRegression(max_iter=10_000)
    theirs_s, _ = harness.median_s(lambda: regression.fit(x.numpy(), y.numpy()), repeats)
    weight, bias = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    if n_classes == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    theirs = LinearMap(weight=weight, bias=bias)
    return {
        "softmax": {"s": ours_s, "loss": _loss(ours, data, penalty)},
        "logistic_regression": {"s": theirs_s, "loss": _loss(theirs, data, penalty)},
    }


def _loss(linear: LinearMap, data: FitData, penalty: float) -> float:
    loss = torch.nn.functional.cross_entropy(linear.scores(data.x.double()), data.y)
    return (loss + penalty / 2 * linear.weight.double().square().sum()).item()


def _problem(data: FitData, device: str = "cpu") -> Problem:
    folds = folds_of(FitConfig(cache="", fusion="concat").plan().method, data, 0)
    folds, weights = [fold.to(device) for fold in folds], torch.ones(len(data.labels))
    return Problem(data.x.to(device), data.y.to(device), folds, weights.to(device))


def _sweep(config: FitConfig, repeats: int) -> dict[str, float]:
    def concat() -> None:
        plan = _options(config, config.layers, "lda").plan()
        train(plan, load_data(plan.reading))

    with tempfile.TemporaryDirectory() as folder:
        swept = SweepConfig(
            cache=config.cache, source=config.source, pooling=config.pooling, output=folder
        )
        sweep_s, _ = harness.median_s(lambda: run_sweep(swept), repeats)
    return {"sweep_s": sweep_s, "concat_s": harness.median_s(concat, repeats)[0]}


def measure_large(path: Path, device: str) -> Measured:
    """Time all three on a cache of five layers, the second time: the first is a warm-up."""
    accelerator = "gpu" if device == "cuda" else "cpu"
    common: dict[str, Any] = {"cache": str(path), "calibrate": "none", "accelerator": accelerator}
    ridges = [
        FitConfig(**common, layers=str(layer), fusion="single", head="ridge").plan()
        for layer in range(4)
    ]
    paper = FitConfig(**common, preset="paper", sigma=0.1, val_fraction=0, epochs=EPOCHS).plan()
    result: dict[str, Any] = {"device": device}
    if device == "cuda":
        result["device"] = torch.cuda.get_device_name()
    one, data = load_data(ridges[0].reading), load_data(paper.reading)
    result |= {"n_rows": len(one.x), "hidden_size": one.x.shape[1]}
    middle = SoftmaxSolver.STRENGTHS[len(SoftmaxSolver.STRENGTHS) // 2]
    for _ in range(2):
        each = [train(ridge, load_data(ridge.reading)).best.fit_s for ridge in ridges]
        solver = SoftmaxSolver(_problem(one, device))
        result["ridge_sweep_s"] = sum(each)
        result["softmax_s"] = harness.timed(functools.partial(solver.solve, middle))[0]
        result["paper_s"] = train(paper, data).best.fit_s
    return result, {
        "67,349 rows, ridge sweep, s": result["ridge_sweep_s"],
        "67,349 rows, softmax, s": result["softmax_s"],
        "67,349 rows, ten epochs of the paper's cooc, s": result["paper_s"],
    }
