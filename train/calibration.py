"""Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).

One number T divides the logits: it changes no prediction, only how sure the classifier says it
is. It is fitted on rows that the classifier was not fitted to: the validation share, or the
held-out scores of the folds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmembed.train.metrics import Floats, Labels

_LOWEST, _HIGHEST = 1e-3, 1e3  # of 1 / T; separable scores have their optimum at infinity
_HALVINGS = 60


def fit_temperature(logits: npt.NDArray[np.floating], labels: Labels) -> float:
    """Find the T > 0 that minimises the negative log-likelihood of `softmax(logits / T)`.

    The loss is convex in 1 / T, so bisection on the sign of its slope finds the minimum.

    Args:
        logits: `[N, C]`.
        labels: int64 `[N]`, index of the true class.

    >>> logits = np.log([[0.75, 0.25]] * 4)
    >>> round(fit_temperature(logits, np.array([0, 0, 0, 1])), 6)
    1.0
    >>> round(fit_temperature(2 * logits, np.array([0, 0, 0, 1])), 6)
    2.0
    """
    scores = logits.astype(np.float64)
    scores = scores - scores.max(axis=1, keepdims=True)
    true = scores[np.arange(len(labels)), labels]
    low, high = np.log(_LOWEST), np.log(_HIGHEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _slope(scores, true, float(np.exp(middle))) > 0:
            high = middle
        else:
            low = middle
    return float(np.exp(-(low + high) / 2))


def _slope(scores: Floats, true: Floats, inverse: float) -> float:
    """Slope of the mean loss in 1 / T: the expected score less the score of the true class."""
    weights = np.exp(inverse * scores)
    expected = (weights * scores).sum(axis=1) / weights.sum(axis=1)
    return float((expected - true).mean())
