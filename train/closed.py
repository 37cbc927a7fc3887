"""Ridge and shrinkage LDA in closed form: every strength and every fold from one Gram matrix.

Both solve `(A + s I) W = B` for some shifts s. Ridge (Hoerl and Kennard, 1970) regresses +1 for
the class and -1 for the others on centred features: A is their scatter, s = strength * tr(A) / K.
LDA with a shrunk covariance (Friedman, 1989; Ledoit and Wolf, 2004) has as A the covariance within
the classes, shrunk to `(1 - strength) A + strength tr(A) / K I`, and as B the means of the classes.

Held-out rows choose the strength. A Cholesky factor a fold and strength is cheaper than one
eigendecomposition a fold for grids of ten; it is computed in float32, and in float64 where that
is not positive definite. The head that is kept is solved in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmembed.train.gram import FoldMoments, Moments

_CHUNK_ROWS = 8192
ABSENT_BIAS = -30.0  # a class without an example is never predicted, at a finite loss


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """A linear classifier."""

    weight: Tensor
    """`[C, K]`."""
    bias: Tensor
    """`[C]`."""

    def scores(self, x: Tensor) -> Tensor:
        """Classify `[N, K]` -> `[N, C]`."""
        return torch.addmm(self.bias.to(x), x, self.weight.to(x).T)


class Ridge:
    """Least squares on targets +1 and -1, with a penalty on the weights and none on the bias."""

    STRENGTHS = tuple(10 ** (k / 2 - 3) for k in range(10))  # 0.001 to 31.6

    def __init__(self, moments: Moments) -> None:
        self.moments, mean = moments, moments.mean
        dtype = moments.gram.dtype
        centre = mean.to(dtype)
        self.matrix = torch.addr(moments.gram, centre, centre, alpha=-float(moments.n))
        self.right = 2 * (moments.class_sums - torch.outer(moments.counts, mean)).T.to(dtype)
        self._unit = self.matrix.diagonal().mean()

    def solve(self, strength: float) -> LinearMap:
        """Solve for one strength."""
        weight = _solve(self.matrix, strength * self._unit, self.right).T.double()
        bias = 2 * self.moments.counts / self.moments.n - 1 - weight @ self.moments.mean
        return without_absent(weight, bias, self.moments.counts)


class LDA:
    """Gaussian classes that share one covariance, shrunk towards a multiple of the identity."""

    STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.means = moments.class_sums / moments.counts.clamp(min=1e-12)[:, None]
        dtype, share = moments.gram.dtype, 1 / float(moments.n)
        self.matrix = torch.addmm(
            moments.gram,
            self.means.T.to(dtype),
            moments.class_sums.to(dtype),
            beta=share,
            alpha=-share,
        )
        self._unit = self.matrix.diagonal().mean()

    def solve(self, strength: float) -> LinearMap:
        """Solve for one strength below 1."""
        kept = 1 - strength
        right = (self.means.T / kept).to(self.matrix.dtype)
        weight = _solve(self.matrix, strength / kept * self._unit, right).T.double()
        prior = (self.moments.counts / self.moments.n).clamp(min=1e-12).log()
        bias = prior - (weight * self.means).sum(dim=1) / 2
        return without_absent(weight, bias, self.moments.counts)


def held_out_scores(
    kind: type[Ridge | LDA],
    moments: FoldMoments,
    x: Tensor,
    folds: Sequence[Tensor],
    strengths: Sequence[float],
) -> Tensor:
    """Score each row by the classifiers that were fitted without its fold.

    Args:
        kind: what to fit.
        moments: of the same features, classes and folds.
        x: float32 `[N, K]`, features.
        folds: k tensors int64 `[n]`, the rows of each fold.
        strengths: S strengths.

    Returns:
        float32 `[S, N, C]`; NaN in rows that are in no fold.
    """
    n_classes = moments.counts.shape[1]
    scores = x.new_full((len(strengths), len(x), n_classes), math.nan)
    for fold, rows in enumerate(folds):
        system = kind(moments.without(fold))
        solved = [system.solve(strength) for strength in strengths]
        together = LinearMap(
            weight=torch.cat([one.weight for one in solved]),
            bias=torch.cat([one.bias for one in solved]),
        )
        for chunk in torch.split(rows, _CHUNK_ROWS):
            of_chunk = together.scores(x.index_select(0, chunk))  # [n, S C]
            scores[:, chunk] = torch.unflatten(of_chunk, 1, (-1, n_classes)).transpose(0, 1)
    return scores


def _solve(matrix: Tensor, shift: Tensor, right: Tensor) -> Tensor:
    for dtype in (matrix.dtype, torch.float64):
        shifted = matrix.to(dtype, copy=True)
        shifted.diagonal().add_(shift.to(dtype))
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            break
    return torch.cholesky_solve(right.to(dtype), factor)


def without_absent(weight: Tensor, bias: Tensor, counts: Tensor) -> LinearMap:
    """Make a classifier that never predicts a class of which there was no example."""
    present = counts > 0
    return LinearMap(
        weight=torch.where(present[:, None], weight, 0.0),
        bias=torch.where(present, bias, ABSENT_BIAS),
    )
