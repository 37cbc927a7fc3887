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

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmembed.train.gram import FoldMoments, Moments
from llmembed.train.parallel import map_on_cores

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
        return self.leading(strength, (len(self.matrix),))[0]

    def leading(self, strength: float, widths: Sequence[int]) -> list[LinearMap]:
        """Solve for the first columns alone, with the shift of all: `[C, w]` for each width w."""
        counts, mean = self.moments.counts, self.moments.mean
        solved = []
        for solution in _solve(self.matrix, strength * self._unit, self.right, widths):
            weight = solution.T.double()
            bias = 2 * counts / self.moments.n - 1 - weight @ mean[: weight.shape[1]]
            solved.append(without_absent(weight, bias, counts))
        return solved


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
        return self.leading(strength, (len(self.matrix),))[0]

    def leading(self, strength: float, widths: Sequence[int]) -> list[LinearMap]:
        """Solve for the first columns alone, with the shift of all: `[C, w]` for each width w."""
        counts, kept = self.moments.counts, 1 - strength
        prior = (counts / self.moments.n).clamp(min=1e-12).log()
        right = (self.means.T / kept).to(self.matrix.dtype)
        solved = []
        for solution in _solve(self.matrix, strength / kept * self._unit, right, widths):
            weight = solution.T.double()
            bias = prior - (weight * self.means[:, : weight.shape[1]]).sum(dim=1) / 2
            solved.append(without_absent(weight, bias, counts))
        return solved


def held_out_scores(
    kind: type[Ridge | LDA],
    moments: FoldMoments,
    x: Tensor,
    folds: Sequence[Tensor],
    strengths: Sequence[float],
    widths: Sequence[int],
) -> list[Tensor]:
    """Score each row by the classifiers that were fitted without its fold.

    A Cholesky factor of all columns holds those of the first ones, so that classifiers on the first
    columns alone cost little more.

    Args:
        kind: what to fit.
        moments: of the same features, classes and folds.
        x: float32 `[N, K]`, features.
        folds: k tensors int64 `[n]`, the rows of each fold.
        strengths: S strengths.
        widths: numbers of first columns to fit.

    Returns:
        float32 `[S, N, C]` for each width; NaN in rows that are in no fold.
    """
    n_classes = moments.counts.shape[1]
    scores = [x.new_full((len(strengths), len(x), n_classes), math.nan) for _ in widths]

    def score(job: tuple[int, slice]) -> None:
        fold, tried = job
        rows, system = folds[fold], kind(moments.without(fold))
        solved = [system.leading(strength, widths) for strength in strengths[tried]]
        for of_width, maps in zip(scores, zip(*solved, strict=True), strict=True):
            together = LinearMap(
                weight=torch.cat([one.weight for one in maps]),
                bias=torch.cat([one.bias for one in maps]),
            )
            for chunk in torch.split(rows, _CHUNK_ROWS):
                held_out = x[:, : together.weight.shape[1]].index_select(0, chunk)
                of_chunk = torch.unflatten(together.scores(held_out), 1, (-1, n_classes))
                of_width[tried, chunk] = of_chunk.transpose(0, 1)  # [n, S, C] -> [S, n, C]

    # Cholesky factors gain little from a second thread: 1.2 times, of 576 columns nothing at all.
    # With five folds and two cores one would idle at the end, so each is done in two halves.
    middle = (len(strengths) + 1) // 2 if torch.get_num_threads() > 1 else len(strengths)
    halves = [tried for tried in (slice(middle), slice(middle, None)) if strengths[tried]]
    for _ in map_on_cores(score, itertools.product(range(len(folds)), halves), x.device):
        pass
    return scores


def _solve(matrix: Tensor, shift: Tensor, right: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Solve `(A + s I) W = B` for the leading block of each width."""
    for dtype in (matrix.dtype, torch.float64):
        shifted = matrix.to(dtype, copy=True)
        shifted.diagonal().add_(shift.to(dtype))
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            break
    return [torch.cholesky_solve(right[:w].to(dtype), factor[:w, :w]) for w in widths]


def without_absent(weight: Tensor, bias: Tensor, counts: Tensor) -> LinearMap:
    """Make a classifier that never predicts a class of which there was no example."""
    present = counts > 0
    return LinearMap(
        weight=torch.where(present[:, None], weight, 0.0),
        bias=torch.where(present, bias, ABSENT_BIAS),
    )
