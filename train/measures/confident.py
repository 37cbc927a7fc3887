"""Which labels are likely wrong: confident learning, from probabilities of held-out rows.

After Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels",
JAIR 2021. A row counts as of class j where the probability of j is at least the mean of what the
rows labelled j are given for it; the counts by label and such class are the confident joint.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llmembed.train.measures.metrics import Floats, Labels

_ROUNDING = 1e-6  # of float32 probabilities
NO_CLASS = -1


class Joint(NamedTuple):
    """Labels against the classes that the rows seem to be of."""

    counts: Labels
    """int64 `[C, C]`, rows by label and class."""
    classes: Labels
    """int64 `[N]`, the class of each row, or -1 where it is none with confidence."""

    def calibrated(self, labels: Labels) -> Floats:
        """Estimate how many rows of each label are of each class, float64 `[C, C]`.

        Rows without confidence are shared out as the others of their label, and a label none of
        whose rows is of its own class is taken to have one (both as cleanlab does).
        """
        counts = self.counts.astype(np.float64)
        np.fill_diagonal(counts, counts.diagonal().clip(min=1))
        of_label = np.bincount(labels, minlength=len(counts))
        shared: Floats = counts / counts.sum(axis=1, keepdims=True) * of_label[:, None]
        return shared


def confident_joint(proba: Floats, labels: Labels) -> Joint:
    """Count rows by label and by the class that they are of with confidence (equations 1 and 2).

    Args:
        proba: float64 `[N, C]`, of classifiers that have not seen the row.
        labels: int64 `[N]`.

    >>> proba = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9]])
    >>> joint = confident_joint(proba, np.array([0, 0, 0, 1]))
    >>> joint.counts.tolist(), joint.classes.tolist()  # of 0 from 0.6 on, of 1 from 0.9 on
    ([[2, 0], [0, 1]], [0, 0, -1, 1])
    """
    n_classes = proba.shape[1]
    own = proba[np.arange(len(labels)), labels]
    n_rows = np.bincount(labels, minlength=n_classes)
    sums = np.bincount(labels, own, minlength=n_classes)
    thresholds = np.where(n_rows > 0, sums / n_rows.clip(min=1), np.inf)
    confident = np.where(proba >= thresholds - _ROUNDING, proba, -1.0)
    classes = np.where(confident.max(axis=1) >= 0, confident.argmax(axis=1), NO_CLASS)
    counts = np.zeros((n_classes, n_classes), dtype=np.int64)
    known = classes != NO_CLASS
    np.add.at(counts, (labels[known], classes[known]), 1)
    return Joint(counts, classes)


def doubts(proba: Floats, labels: Labels) -> Floats:
    """Give how much likelier the best other class is, 0 to 1, float64 `[N]`; 0.5 is a tie.

    It is one less the normalised margin.

    >>> doubts(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1])).round(6).tolist()
    [0.1, 0.9]
    """
    rows = np.arange(len(labels))
    others = proba.copy()
    others[rows, labels] = -np.inf
    found: Floats = (1 + others.max(axis=1) - proba[rows, labels]) / 2
    return found


def overlaps(joint: Floats) -> Floats:
    """Give how far each two classes are one, float64 `[C, C]`: 1 where labels are drawn by lot.

    It is twice the share of a label's rows that are of the other class, the smaller of the two.

    Args:
        joint: float64 `[C, C]`, calibrated.

    >>> overlaps(np.array([[30.0, 30.0], [2.0, 6.0]])).tolist()
    [[0.0, 0.5], [0.5, 0.0]]
    """
    shares = joint / joint.sum(axis=1, keepdims=True).clip(min=1e-12)
    both: Floats = 2 * np.minimum(shares, shares.T).clip(max=0.5)
    np.fill_diagonal(both, 0)
    return both
