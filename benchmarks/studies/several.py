"""Several labels a text: what a fit reaches and takes, against one-vs-rest LogisticRegressionCV.

scikit-learn's has each label's strength of its own, by 5 folds, on the single layer that our own
sweep of the training rows likes best; it gives a label from one half on. Beside it stand the same
models with thresholds as ours are found, by probabilities of folds: the difference is what
thresholds are worth. Both are timed in this process on the same features, reading left out, in CPU
seconds, for other work on the machine hits both. What takes the time is products with all features:
some hundred of them here, and there as many for every label, strength and fold.

    python benchmarks several --cache goemotions.zarr [--fusion auto] [--rows 10000] [--output FILE]
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import harness
import numpy as np
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import f1_score

from llmembed.train import FitConfig
from llmembed.train.config import Plan
from llmembed.train.inputs import columns_of, draw_folds, strata_of
from llmembed.train.inputs.data import FitData, load_data
from llmembed.train.linear.solved import grid_of
from llmembed.train.linear.sweep import best_of, sweep
from llmembed.train.measures import decided, find_thresholds, summarise_sets
from llmembed.train.measures.sets import FIGURES_OF_SETS
from llmembed.train.verbs.fitting import train

N_FOLDS, MAX_STEPS = 5, 100
BARS = {
    "macro_f1_gain": harness.least(0.0),
    "times_as_fast": harness.least(20.0),
}


@harness.known_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Fit both, and print a table, the bars and the JSON line."""
    parser = harness.command_line(__doc__)
    add = parser.add_argument
    add("--cache", required=True, help="of several labels a text, with a test split")
    add("--fusion", default="auto")
    add("--head", default="auto")
    add("--rows", type=int, help="training rows, drawn by lot; all without it")
    options = parser.parse_args(arguments)
    plan = FitConfig(cache=options.cache, fusion=options.fusion, head=options.head).plan()
    data = some_of(load_data(plan.reading), options.rows)
    document: dict[str, Any] = {
        "n_train": len(data.shares.train),
        "n_test": len(data.x_eval),
        "labels": len(data.labels),
        "fusion": options.fusion,
        "head": options.head,
        "ways": {"ours": ours(plan, data), **theirs(plan, data)},
        **harness.load(),
    }
    print("| way | macro F1 | micro F1 | samples F1 | exact | LRAP | NLL | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    shown = ("macro_f1", "micro_f1", "samples_f1", "accuracy", "ranking_precision", "nll")
    for name, found in document["ways"].items():
        print(harness.row(name, *(f"{found[one]:.4f}" for one in shown), f"{found['s']:.1f}"))
    our, their = document["ways"]["ours"], document["ways"]["one-vs-rest"]
    document["bars"] = {
        "macro_f1_gain": our["macro_f1"] - their["macro_f1"],
        "times_as_fast": their["s"] / our["s"],
    }
    for name, figure in document["bars"].items():
        print(BARS[name].line(name, figure))
    harness.finish(document, options.output)
    return 0


def some_of(data: FitData, n_rows: int | None) -> FitData:
    """Keep some of the training rows."""
    rows = np.random.default_rng(0).permutation(data.shares.train)[:n_rows]
    return dataclasses.replace(data, shares=dataclasses.replace(data.shares, train=np.sort(rows)))


def ours(plan: Plan, data: FitData) -> dict[str, Any]:
    """Choose, solve, calibrate and find thresholds, as a fit does."""
    seconds, outcome = harness.cpu_seconds(lambda: train(plan, data))
    classifier = outcome.best.classifier
    assert classifier.thresholds is not None
    log_proba = classifier.log_proba(classifier.logits_all(outcome.data.x_eval)).numpy()
    return judged(log_proba, data, classifier.thresholds.double().numpy(), seconds)


def theirs(plan: Plan, data: FitData) -> dict[str, dict[str, Any]]:
    """Fit scikit-learn's to the best layer: as it comes, and with thresholds by folds."""
    method = dataclasses.replace(plan.method, head="auto")
    layers = [one for one in sweep(grid_of(method, data, 0)) if one.fusion == "single"]
    best = best_of(layers).features
    columns = columns_of([one.hidden_size for one in data.features], best)
    rows, y = data.shares.train, data.y.numpy()[data.shares.train]
    x, x_eval = data.x[:, columns].numpy()[rows], data.x_eval[:, columns].numpy()
    learnable = np.flatnonzero(y.sum(axis=0) >= N_FOLDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        seconds, models = harness.cpu_seconds(lambda: [searched(x, y[:, k]) for k in learnable])
        proba = np.full((len(x_eval), y.shape[1]), 1 / len(x))
        for k, model in zip(learnable, models, strict=True):
            proba[:, k] = model.predict_proba(x_eval)[:, 1]
        more, held_out = harness.cpu_seconds(lambda: out_of_fold(x, y, learnable, models))
    log_proba, halves = np.log(proba), np.full(y.shape[1], 0.5)
    check(proba, data, halves)
    layer = str(data.features[best[0]])
    return {
        "one-vs-rest": {**judged(log_proba, data, halves, seconds), "layer": layer},
        "one-vs-rest, thresholds": judged(
            log_proba, data, find_thresholds(held_out, y), seconds + more
        ),
    }


def searched(x: np.ndarray, y: np.ndarray) -> Any:
    """Fit one label against the rest, of ten strengths the best by folds."""
    model = LogisticRegressionCV(
        Cs=10,
        cv=N_FOLDS,
        max_iter=MAX_STEPS,
        scoring="neg_log_loss",
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )
    return model.fit(x, y)


def out_of_fold(
    x: np.ndarray, y: np.ndarray, learnable: np.ndarray, models: Sequence[Any]
) -> np.ndarray:
    """Give the probabilities of folds at the strengths that were found, `[n, C]`."""
    folds = draw_folds(strata_of(y), np.arange(len(y)), N_FOLDS, np.random.default_rng(0))
    found = np.full(y.shape, 1 / len(x))
    for k, model in zip(learnable, models, strict=True):
        one = LogisticRegression(C=float(np.ravel(model.C_)[0]), max_iter=MAX_STEPS)
        for fold in folds:
            others = np.setdiff1d(np.arange(len(y)), fold)
            if len(np.unique(y[others, k])) == 2:
                found[fold, k] = (
                    clone(one).fit(x[others], y[others, k]).predict_proba(x[fold])[:, 1]
                )
    return found


def judged(
    log_proba: np.ndarray, data: FitData, thresholds: np.ndarray, seconds: float
) -> dict[str, Any]:
    """Compute the figures on the evaluation rows."""
    found = summarise_sets(log_proba, data.y_eval.numpy(), data.labels, thresholds)
    return {**{name: found[name] for name in FIGURES_OF_SETS}, "s": seconds}


def check(proba: np.ndarray, data: FitData, thresholds: np.ndarray) -> None:
    """Compare our micro F1 with scikit-learn's own."""
    y = data.y_eval.numpy()
    own = summarise_sets(np.log(proba), y, data.labels, thresholds)["micro_f1"]
    if abs(own - f1_score(y, decided(proba, thresholds), average="micro", zero_division=1)) > 1e-9:
        raise AssertionError("micro F1 is not scikit-learn's")
