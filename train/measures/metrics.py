"""The figures of a run, in plain numpy: what they are is worth being able to read.

The 95 % interval of the accuracy is Wilson's score interval (E. B. Wilson, 1927): unlike the
normal approximation it stays inside [0, 1] and is not empty at 100 %. The calibration error is
ECE (Naeini, Cooper and Hauskrecht, 2015) with 15 bins of equal width over the confidence. F1 is
averaged over the classes that occur among the labels or the predictions, as scikit-learn does; a
class without an evaluation row is named, since nothing is known of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
ECE_BINS = 15
MOST_CONFUSED = 2000  # classes of a confusion matrix
FIGURES = ("accuracy", "accuracy_ci95", "macro_f1", "micro_f1", "nll", "ece")

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def summarise(log_proba: Floats, labels: Labels, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute every figure of a run from its predictions; None where there are no rows.

    `confusion` is None above 2,000 classes, too.

    Args:
        log_proba: float64 `[N, C]`, log-probability of each class.
        labels: int64 `[N]`, index of the true class.
        class_names: the C names, in the order of the columns.
    """
    n_rows, predicted = len(labels), log_proba.argmax(axis=1)
    per_class = dict(zip(class_names, _per_class(labels, predicted, len(class_names)), strict=True))
    of_classes = {
        "classes_without_rows": [name for name, row in per_class.items() if not row["n"]],
        "per_class": per_class,
        "confusion": _confusion(labels, predicted, len(class_names)),
    }
    if not n_rows:
        return {"n_eval": 0, **dict.fromkeys(FIGURES), **of_classes}
    n_correct = int((predicted == labels).sum())
    occurring = [row["f1"] for row in per_class.values() if row["n"] or row["n_predicted"]]
    return {
        "n_eval": n_rows,
        "accuracy": n_correct / n_rows,
        "accuracy_ci95": list(wilson_interval(n_correct, n_rows)),
        "macro_f1": float(np.mean(occurring)),
        "micro_f1": n_correct / n_rows,  # with one label an example, micro F1 is the accuracy
        "nll": float(0.0 - log_proba[np.arange(n_rows), labels].mean()),  # never -0.0
        "ece": ece(np.exp(log_proba), labels),
        **of_classes,
    }


def wilson_interval(n_correct: int, n: int) -> tuple[float, float]:
    """Give the 95 % interval of a share.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    >>> round(wilson_interval(10, 10)[0], 3)
    0.722
    """
    share, z2 = n_correct / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def ece(proba: Floats, labels: Labels) -> float:
    """Average the gap between confidence and accuracy over 15 bins, weighted by their counts.

    Args:
        proba: float64 `[N, C]`, probability of each class.
        labels: int64 `[N]`, index of the true class.

    >>> round(ece(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1])), 3)
    0.4
    """
    confidence = proba.max(axis=1)
    correct = proba.argmax(axis=1) == labels
    bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def _per_class(labels: Labels, predicted: Labels, n_classes: int) -> list[dict[str, Any]]:
    of_labels, of_predicted, of_hits = (
        np.bincount(classes, minlength=n_classes).tolist()
        for classes in (labels, predicted, labels[labels == predicted])
    )
    return [
        {
            "precision": share(hits, n_predicted),
            "recall": share(hits, n),
            "f1": share(2 * hits, n + n_predicted),
            "n": n,
            "n_predicted": n_predicted,
        }
        for hits, n, n_predicted in zip(of_hits, of_labels, of_predicted, strict=True)
    ]


def _confusion(labels: Labels, predicted: Labels, n_classes: int) -> list[list[int]] | None:
    """Count rows by true class and predicted class, `[C, C]`; None of so many that none reads it.

    With 10,000 classes it would be a gigabyte of zeros.
    """
    if n_classes > MOST_CONFUSED:
        return None
    cells = np.bincount(labels * n_classes + predicted, minlength=n_classes**2)
    counts: list[list[int]] = cells.reshape(n_classes, n_classes).tolist()
    return counts


def share(part: int, whole: int) -> float:
    """Give a part of a whole; 0 of nothing."""
    return part / whole if whole else 0.0
