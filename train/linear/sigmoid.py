"""Logistic regression for each of several labels a text, to the optimum, all labels at once.

One label against the rest is a softmax of two classes, so this is that solver with a fit for every
label of every fold: each has a search of its own, and they share the matrix products and the
factor of the bound, `1/4 X^T X / n + penalty I` (Boehning, 1992, of two classes).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmembed.train.linear.closed import LinearMap
from llmembed.train.linear.softmax import SoftmaxSolver


class SigmoidSolver(SoftmaxSolver):
    """One label against the rest; weights of P fits are float32 `[P C, K + 1, 1]`."""

    def solve(self, strength: float) -> LinearMap:
        """Fit all rows with one strength."""
        theta = self._minimise(self._masks(1), strength)[:, :, 0].double()  # [C, K + 1]
        weight = theta[:, :-1]
        bias = theta[:, -1] - weight @ self._exact_mean
        return self._space.in_columns(LinearMap(weight=weight, bias=bias))

    def _minimise(self, masks: Tensor, strength: float, theta: Tensor | None = None) -> Tensor:
        """Find the optimum of each label in each fit."""
        n_classes = len(self._counts)
        return super()._minimise(masks.repeat_interleave(n_classes, dim=1), strength, theta)

    def _guess_curvature(self) -> float:
        return 0.25

    def _shape(self, n_fits: int) -> tuple[int, int, int]:
        return n_fits, len(self._mean) + 1, 1

    def _scores(self, theta: Tensor) -> Tensor:
        """Classify all rows by all fits: float32 `[N, P, C]`."""
        scores = super()._scores(theta)  # [N, P C, 1]
        return scores.reshape(len(scores), -1, len(self._counts))

    def _losses(self, scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        has = y.repeat(1, scores.shape[1] // y.shape[1]).to(scores)  # [n, C] -> [n, P C]
        z = scores[:, :, 0]
        return F.softplus(z) - has * z, (torch.sigmoid(z) - has)[:, :, None]
