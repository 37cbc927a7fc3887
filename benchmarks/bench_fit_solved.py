"""What solving saves: closed forms, softmax and the sweep against scikit-learn, on the same rows.

LDA with 10 strengths and 5 folds stands against LogisticRegressionCV(Cs=10, cv=5), as it comes (100
steps at most), on four layers of each of three data sets, one by one: on one layer two such
accuracies lie 0.3 points apart by chance (nine of MR's 3,554 rows), and up to 0.9 on SST-2's 872.
With R52's classes LogisticRegressionCV takes an hour. Ridge, as fast, stands there too; against
RidgeClassifierCV, with the same strengths and folds, on four layers together. A softmax regression
stands against LogisticRegression(), with the penalised loss that each reaches. The sweep over all
layers of one pooling stands against one fit on the concatenation of four, reading included in both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold

from llmembed.train.config import FitConfig, SweepConfig
from llmembed.train.fitting import train
from llmembed.train.inputs.data import FitData, load_data
from llmembed.train.linear.choice import choose_head
from llmembed.train.linear.closed import LinearMap, Ridge
from llmembed.train.linear.moments import Problem
from llmembed.train.linear.softmax import SoftmaxSolver
from llmembed.train.linear.solved import folds_of
from llmembed.train.sweeping import run_sweep

N_FOLDS = 5


def measure(configs: Sequence[FitConfig], one_layer: str, repeats: int) -> dict[str, Any]:
    """Time all of it, on the first data set where one is enough.

    Args:
        configs: cache, source, pooling, and four layers of each data set.
        one_layer: layer where one is enough.
        repeats: of what takes seconds; medians are given. scikit-learn's searches run once.
    """
    result: dict[str, Any] = {
        "layers": {Path(config.cache).stem: _layers(config, repeats) for config in configs}
    }
    config = configs[0]
    base = _base(config)
    one = load_data(FitConfig(**base, layers=one_layer))
    four = load_data(FitConfig(**base, layers=config.layers))
    result["ridge_of_four"] = _solved(four, "ridge", repeats)
    result["ridge_classifier_cv"] = _ridge_searched(four)
    result |= _softmax(one, repeats)
    return result | _sweep(config, base, repeats)


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Give what the bars are about; accuracies in points."""
    layers = [layer for one in result["layers"].values() for layer in one.values()]
    pairs = [(layer["lda"], layer["logistic_regression_cv"]) for layer in layers]
    return {
        "LDA, times LogisticRegressionCV": statistics.median(
            theirs["s"] / ours["s"] for ours, theirs in pairs
        ),
        "LDA over LogisticRegressionCV": statistics.mean(
            100 * (ours["accuracy"] - theirs["accuracy"]) for ours, theirs in pairs
        ),
        "ridge, times RidgeClassifierCV": (
            result["ridge_classifier_cv"]["s"] / result["ridge_of_four"]["s"]
        ),
        "softmax, times LogisticRegression": (
            result["logistic_regression"]["s"] / result["softmax"]["s"]
        ),
        "softmax, loss above LogisticRegression": (
            result["softmax"]["loss"] - result["logistic_regression"]["loss"]
        ),
        "sweep of all layers over a concat fit": result["sweep_s"] / result["concat_s"],
    }


def _base(config: FitConfig) -> dict[str, Any]:
    base = {"cache": config.cache, "source": config.source, "pooling": config.pooling}
    return base | {"fusion": "concat", "accelerator": "cpu"}


def _layers(config: FitConfig, repeats: int) -> dict[str, Any]:
    assert config.layers is not None
    found = {}
    for layer in config.layers.split(","):
        data = load_data(FitConfig(**_base(config), layers=layer))
        row = {head: _solved(data, head, repeats) for head in ("ridge", "lda")}
        found[layer] = {**row, "logistic_regression_cv": _searched(data)}
    return found


def median_of(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Call some times; give the median of the seconds, and the last result."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def _solved(data: FitData, head: str, repeats: int) -> dict[str, float]:
    def choose() -> Any:
        choice = choose_head(_problem(data), (head,))
        return choice, choice.solve()

    seconds, (choice, linear) = median_of(choose, repeats)
    found = linear.scores(data.x_eval).argmax(dim=1)
    accuracy = (found == data.y_eval).double().mean().item()
    return {"s": seconds, "accuracy": accuracy, "held_out_accuracy": choice.accuracy}


def _searched(data: FitData) -> dict[str, float]:
    search = LogisticRegressionCV(
        Cs=10, cv=N_FOLDS, scoring="accuracy", l1_ratios=(0,), use_legacy_attributes=False
    )
    return _timed_search(search, data)


def _ridge_searched(data: FitData) -> dict[str, float]:
    alphas = [len(data.x) * strength for strength in Ridge.STRENGTHS]  # features have variance 1
    return _timed_search(RidgeClassifierCV(alphas=alphas, cv=StratifiedKFold(N_FOLDS)), data)


def _timed_search(search: Any, data: FitData) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The least populated class")
        seconds, _ = median_of(lambda: search.fit(data.x.numpy(), data.y.numpy()), 1)
    return {"s": seconds, "accuracy": search.score(data.x_eval.numpy(), data.y_eval.numpy())}


def _softmax(data: FitData, repeats: int) -> dict[str, Any]:
    """Fit with the penalty that LogisticRegression has as it comes, C = 1."""
    x, y, n_classes = data.x, data.y, len(data.labels)
    # With two classes scikit-learn penalises their difference, which is twice either's square.
    penalty = (2 if n_classes == 2 else 1) / len(x)
    unit = _problem(data).moments.total()
    variance = float((unit.gram.diagonal() / unit.n - unit.mean.square()).mean())
    ours_s, ours = median_of(
        lambda: SoftmaxSolver(_problem(data)).solve(penalty / variance), repeats
    )
    regression = LogisticRegression(max_iter=10_000)
    theirs_s, _ = median_of(lambda: regression.fit(x.numpy(), y.numpy()), repeats)
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


def _sweep(config: FitConfig, base: dict[str, Any], repeats: int) -> dict[str, float]:
    def concat() -> None:
        options = FitConfig(**base, layers=config.layers, head="lda")
        train(options, load_data(options))

    with tempfile.TemporaryDirectory() as folder:
        swept = SweepConfig(
            cache=config.cache, source=config.source, pooling=config.pooling, output=folder
        )
        sweep_s, _ = median_of(lambda: run_sweep(swept), repeats)
    return {"sweep_s": sweep_s, "concat_s": median_of(concat, repeats)[0]}


def _problem(data: FitData) -> Problem:
    config = FitConfig(cache="", fusion="concat")
    folds = folds_of(config.plan().method, data, 0)
    return Problem(data.x, data.y, folds, torch.ones(len(data.labels)))
