"""Several labels a text: what is decided of each label, and how good the decisions are.

A text with C labels to choose from is C decisions of yes or no, each with a probability of its own
(a sigmoid, not a share of a softmax). A label is given from its threshold on: the one with the best
F1 on rows that were held out. Of few rows with the label the best one is noise, and of a label that
the features say nothing of it would give the label to every text (Lipton, Elkan and Naryanaswamy,
"Optimal thresholding of classifiers to maximize F1 measure", ECML 2014). So a label of few rows has
the threshold that serves all decisions together, and none lies below the label's share of the rows.

The figures are scikit-learn's, but that a text without labels of which none is predicted is right
(its F1 is 1), and that macro F1 is the mean over the labels that occur or are predicted.

Everywhere sets are `[N, C]`, 1 where a text has the label and 0 where not, and probabilities
float64 `[N, C]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmembed.train.measures.metrics import (
    FIGURES,
    Floats,
    Labels,
    ece,
    share,
    wilson_interval,
)

Sets = npt.NDArray[np.integer[Any]]
FIGURES_OF_SETS = (*FIGURES, "samples_f1", "ranking_precision")
_LEAST_POSITIVES = 10  # held-out rows with a label, for a threshold of its own
_HALF = 0.5


def find_thresholds(proba: Floats, sets: Sets, weights: Floats | None = None) -> Floats:
    """Find from which probability on each label is best given, float64 `[C]`, by held-out rows.

    >>> proba = np.array([[0.1], [0.2], [0.6], [0.4]] * 10)
    >>> find_thresholds(proba, np.array([[0], [0], [1], [1]] * 10)).round(2).tolist()
    [0.5]
    """
    n_rows, n_classes = sets.shape
    if not n_rows:
        return np.full(n_classes, _HALF)
    weights = np.ones(n_rows) if weights is None else weights.astype(np.float64)
    shared = _best_threshold(proba.ravel(), sets.ravel(), np.repeat(weights, n_classes))
    least = np.minimum(np.average(sets, axis=0, weights=weights), _HALF)
    found = np.maximum(shared, least)
    for k in np.flatnonzero((sets > 0).sum(axis=0) >= _LEAST_POSITIVES):
        found[k] = max(_best_threshold(proba[:, k], sets[:, k], weights, least[k]), least[k])
    return found


def _best_threshold(
    proba: Floats, has: npt.NDArray[Any], weights: Floats, least: float = 0.0
) -> float:
    """Find the probability with the best F1 of those from `least` on, half-way to the one below."""
    order = np.argsort(-proba, kind="stable")
    descending, weights = proba[order], weights[order]
    hits = np.cumsum(weights * has[order])
    f1 = 2 * hits / np.maximum(np.cumsum(weights) + hits[-1], np.finfo(np.float64).tiny)
    ends = np.append(descending[1:] < descending[:-1], True)  # equal ones are decided together
    ends &= descending >= least
    if not hits[-1]:
        return _HALF
    if not ends.any():
        return least
    best = int(np.argmax(np.where(ends, f1, -1)))
    below = descending[best + 1] if best + 1 < len(descending) else 0.0
    return float(descending[best] + below) / 2


def decided(proba: Floats, thresholds: Floats) -> Sets:
    """Give each text the labels whose probability reaches their threshold, int8 `[N, C]`.

    >>> decided(np.array([[0.5, 0.4]]), np.array([0.5, 0.5])).tolist()
    [[1, 0]]
    """
    found: Sets = (proba >= thresholds).astype(np.int8)
    return found


def share_right(proba: Floats, sets: npt.NDArray[Any], thresholds: Floats) -> float:
    """Give the share of texts of which all C decisions are right.

    >>> share_right(np.array([[0.5, 0.4], [0.6, 0.6]]), np.array([[1, 0], [1, 0]]), np.full(2, 0.5))
    0.5
    """
    return float((decided(proba, thresholds) == sets).all(axis=1).mean())


def names_of(sets: npt.NDArray[Any], labels: Sequence[str]) -> list[list[str]]:
    """Name the labels of each text, in the order of the classes.

    >>> names_of(np.array([[1, 0, 1], [0, 0, 0]]), ["a", "b", "c"])
    [['a', 'c'], []]
    """
    return [[labels[k] for k in np.flatnonzero(row).tolist()] for row in sets]


def likeliest_first(proba: Floats, thresholds: Floats) -> list[list[int]]:
    """List the labels that are given to each text, the most probable first.

    >>> likeliest_first(np.array([[0.6, 0.2, 0.7], [0.1, 0.1, 0.1]]), np.full(3, 0.5))
    [[2, 0], []]
    """
    given = decided(proba, thresholds).astype(bool)
    orders = np.argsort(-proba, axis=1, kind="stable")
    return [order[row[order]].tolist() for order, row in zip(orders, given, strict=True)]


def summarise_sets(
    log_proba: Floats, sets: Sets, class_names: Sequence[str], thresholds: Floats
) -> dict[str, Any]:
    """Compute every figure of a run of several labels a text; None where there are no rows.

    `accuracy` is the share of texts whose labels are all right and no other is given, `nll` and
    `ece` are those of the N C decisions, `ranking_precision` is the mean precision of the labels
    ranked above each label of a text.

    Args:
        log_proba: float64 `[N, C]`, log-probability that a text has the label.
        sets: `[N, C]`, the true labels.
        class_names: the C names, in the order of the columns.
        thresholds: float64 `[C]`.
    """
    proba, sets = np.exp(log_proba), sets.astype(np.int64)
    given = decided(proba, thresholds).astype(np.int64)
    hits, n, n_given = (given * sets).sum(axis=0), sets.sum(axis=0), given.sum(axis=0)
    per_class = {
        name: {
            "precision": share(tp, called),
            "recall": share(tp, has),
            "f1": share(2 * tp, has + called),
            "n": has,
            "n_predicted": called,
            "threshold": threshold,
        }
        for name, tp, has, called, threshold in zip(
            class_names, *(one.tolist() for one in (hits, n, n_given, thresholds)), strict=True
        )
    }
    of_classes = {
        "classes_without_rows": [name for name, row in per_class.items() if not row["n"]],
        "per_class": per_class,
    }
    if not len(sets):
        return {"n_eval": 0, **dict.fromkeys(FIGURES_OF_SETS), **of_classes}
    n_right = round(len(sets) * share_right(proba, sets, thresholds))
    occurring = [row["f1"] for row in per_class.values() if row["n"] or row["n_predicted"]]
    return {
        "n_eval": len(sets),
        "accuracy": n_right / len(sets),
        "accuracy_ci95": list(wilson_interval(n_right, len(sets))),
        "macro_f1": float(np.mean(occurring)) if occurring else 1.0,
        "micro_f1": _f1(hits.sum(), (n + n_given).sum()),
        "samples_f1": float(f1_of_rows(given, sets).mean()),
        "ranking_precision": float(ranking_precision(proba, sets).mean()),
        "nll": float(losses_of_rows(proba, sets).mean()),
        "ece": ece(*as_decisions(proba, sets)),
        **of_classes,
    }


def f1_of_rows(given: npt.NDArray[Any], sets: npt.NDArray[Any]) -> Floats:
    """Give the F1 of each text's labels, float64 `[N]`; 1 where there is none and none is given."""
    wanted = (given + sets).sum(axis=1)
    hits = (given * sets).sum(axis=1)
    found: Floats = np.where(wanted > 0, 2 * hits / np.maximum(wanted, 1), 1.0)
    return found


def losses_of_rows(proba: Floats, sets: npt.NDArray[Any]) -> Floats:
    """Give the mean surprise at each text's C decisions, float64 `[N]`, in nats."""
    true = np.where(sets > 0, proba, 1 - proba)
    surprise = 0.0 - np.log(np.maximum(true, np.finfo(np.float64).tiny))
    found: Floats = surprise.mean(axis=1)
    return found


def ranking_precision(proba: Floats, sets: npt.NDArray[Any]) -> Floats:
    """Give the label ranking average precision of each text, float64 `[N]`; 1 without labels.

    Of the labels at least as probable as a label of the text, how many are the text's: the mean
    over its labels (Schapire and Singer, "BoosTexter", 2000).

    >>> ranking_precision(np.array([[0.9, 0.8, 0.7]]), np.array([[1, 0, 1]])).round(3).tolist()
    [0.833]
    """
    from scipy import stats

    has = sets > 0
    ranks = stats.rankdata(-proba, method="max", axis=1)
    among = stats.rankdata(np.where(has, -proba, np.inf), method="max", axis=1)
    n = has.sum(axis=1)
    sums = np.where(has, among / ranks, 0.0).sum(axis=1)
    found: Floats = np.where(n > 0, sums / np.maximum(n, 1), 1.0)
    return found


def as_decisions(proba: Floats, sets: npt.NDArray[Any]) -> tuple[Floats, Labels]:
    """View the decisions as rows of two classes, no and yes: `[N C, 2]` and their labels `[N C]`.

    >>> [one.tolist() for one in as_decisions(np.array([[0.25, 1.0]]), np.array([[0, 1]]))]
    [[[0.75, 0.25], [0.0, 1.0]], [0, 1]]
    """
    yes = proba.reshape(-1)
    return np.stack([1 - yes, yes], axis=1), sets.reshape(-1).astype(np.int64)


def _f1(hits: Any, wanted: Any) -> float:
    return float(2 * hits / wanted) if wanted else 1.0
