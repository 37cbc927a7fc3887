"""Ridge and shrinkage LDA in closed form: every strength and every fold from one Gram matrix.

Both solve `(A + s I) W = B` for some shifts s. Ridge (Hoerl and Kennard, 1970) regresses +1 for
the class and -1 for the others on centred features: A is their scatter, s = strength * tr(A) / K.
LDA with a shrunk covariance (Friedman, 1989; Ledoit and Wolf, 2004) has as A the covariance within
the classes, shrunk to `(1 - strength) A + strength tr(A) / K I`, and as B the means of the classes.

Held-out rows choose the strength, with a Cholesky factor a fold and strength in float32, which for
grids of ten is cheaper than an eigendecomposition. The head that is kept is solved in float64.
Where there are far more columns than rows, all of it is done in the space that the rows span.

Where A vanishes (all texts of a class are the same, or all texts of all) the limit is meant: LDA
becomes the nearest mean, and without any difference between the means the shares of the classes. So
the mean variance that strengths multiply has a least value (`unit_of`); the right sides are
differences from a mean, which are zero together with A; and a shift is at least what the moments,
which are float32, leave unknown of A (`factorise`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from llmembed.train.fusions.tricks import map_on_cores
from llmembed.train.linear.moments import Moments, Problem, in_span

_CHUNK_ROWS = 8192
_WIDE = 2  # so many times more columns than rows: below, the space of the rows costs as much
_PART_BYTES = 2**30  # of held-out scores, of as many strengths as fit
_LEAST_VARIANCE = 1e-3  # share of the mean square; of real texts it is 0.3 within the classes
_ROUNDING = 2.0**-20  # of the trace: bound on the norm of the float32 error of a Gram matrix
ABSENT_BIAS = -30.0  # a class without an example is never predicted, at a finite loss


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """A linear classifier."""

    weight: Tensor  # `[C, K]`
    bias: Tensor  # `[C]`

    def scores(self, x: Tensor) -> Tensor:
        """Classify `[N, K]` -> `[N, C]`."""
        return torch.addmm(self.bias.to(x), x, self.weight.to(x).T)

    def scaled(self, scale: Tensor, offset: Tensor) -> LinearMap:
        """Multiply the scores of each class, and add to them: float `[C]` each."""
        scale, offset = scale.to(self.weight), offset.to(self.bias)
        return LinearMap(weight=self.weight * scale[:, None], bias=self.bias * scale + offset)

    def fill(self, layer: nn.Linear) -> None:
        """Copy it into a layer of a classifier."""
        layer.weight.data.copy_(self.weight)
        layer.bias.data.copy_(self.bias)


class Path(NamedTuple):
    """Held-out scores along the strengths that were tried."""

    strengths: tuple[float, ...]
    scores: Tensor  # float32 `[S, N, C]`, of rows alone in their class not held out; NaN in no fold


class ClosedForm:
    """A linear system `(A + s I) W = B` whose solution is a classifier."""

    STRENGTHS: ClassVar[tuple[float, ...]]  # those that are tried

    def __init__(
        self, moments: Moments, matrix: Tensor, share: Tensor | float, filled: float
    ) -> None:
        """Take A, `[K, K]`, the share of the Gram matrix that it is made from, and K's of columns.

        Args:
            moments: of features, or of their coordinates in the space that they span.
            matrix: A.
            share: of the Gram matrix.
            filled: K over the number of columns, over which the mean variance is taken.
        """
        self.moments, self.matrix = moments, matrix
        self._unit = filled * unit_of(matrix, share * moments.gram.diagonal().mean(), moments.n)
        self._trace = share * moments.gram.trace()

    def solve(self, strength: float) -> LinearMap:
        """Solve for one strength, of LDA below 1."""
        return self.leading(strength, (len(self.matrix),))[0]

    def leading(self, strength: float, widths: Sequence[int]) -> list[LinearMap]:
        """Solve for the first columns alone, with the shift of all: `[C, w]` for each width w."""
        shift, right = self._system(strength)
        factor = factorise(self.matrix, shift, self._trace)
        right, solved = right.to(self.matrix.dtype).to(factor), []
        for width in widths:
            weight = torch.cholesky_solve(right[:width], factor[:width, :width]).T.double()
            solved.append(self._finished(weight, self._bias(weight)))
        return solved

    def _finished(self, weight: Tensor, bias: Tensor) -> LinearMap:
        return without_absent(weight, bias, self.moments.counts)

    def _system(self, strength: float) -> tuple[Tensor, Tensor]:
        """Give the shift s and the right side B, float64 `[K, C]`."""
        raise NotImplementedError

    def _bias(self, weight: Tensor) -> Tensor:
        """Give the bias that belongs to a weight on the first columns."""
        raise NotImplementedError


class Ridge(ClosedForm):
    """Least squares on targets +1 and -1, with a penalty on the weights and none on the bias."""

    STRENGTHS = tuple(10 ** (k / 2 - 3) for k in range(10))  # 0.001 to 31.6

    def __init__(self, moments: Moments, filled: float = 1.0) -> None:
        self._mean = moments.mean
        centre = self._mean.to(moments.gram.dtype)
        self._right = 2 * (moments.class_sums - torch.outer(moments.counts, self._mean)).T
        matrix = torch.addr(moments.gram, centre, centre, alpha=-float(moments.n))
        super().__init__(moments, matrix, 1, filled)

    def _system(self, strength: float) -> tuple[Tensor, Tensor]:
        return strength * self._unit, self._right

    def _bias(self, weight: Tensor) -> Tensor:
        mean = self._mean[: weight.shape[1]]
        return 2 * self.moments.counts / self.moments.n - 1 - weight @ mean


class OneVsRestRidge(Ridge):
    """Least squares for each of several labels a text: no label excludes another.

    A label that no row has keeps its bias of -1: it is as improbable as that makes it.
    """

    def _finished(self, weight: Tensor, bias: Tensor) -> LinearMap:
        return LinearMap(weight=weight, bias=bias)


class LDA(ClosedForm):
    """Gaussian classes that share one covariance, shrunk towards a multiple of the identity.

    The log-posteriors are given less their mean over the classes that occur, which is linear too:
    so that `ABSENT_BIAS` lies below one of them everywhere.
    """

    STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)

    def __init__(self, moments: Moments, filled: float = 1.0) -> None:
        self._means = moments.class_sums / moments.counts.clamp(min=1e-12)[:, None]
        self._present = moments.counts > 0
        self._centre = self._means[self._present].mean(dim=0)
        gram, share = moments.gram, 1 / float(moments.n)
        means, sums = self._means.T.to(gram.dtype), moments.class_sums.to(gram.dtype)
        matrix = torch.addmm(gram, means, sums, beta=share, alpha=-share)
        super().__init__(moments, matrix, share, filled)

    def _system(self, strength: float) -> tuple[Tensor, Tensor]:
        kept = 1 - strength
        return strength / kept * self._unit, (self._means - self._centre).T / kept

    def _bias(self, weight: Tensor) -> Tensor:
        prior = (self.moments.counts / self.moments.n).clamp(min=1e-12).log()
        middle = (self._means + self._centre)[:, : weight.shape[1]]
        bias = prior - (weight * middle).sum(dim=1) / 2
        return bias - bias[self._present].mean()

    def distances(self, x: Tensor, strength: float) -> Tensor:
        """Squared Mahalanobis distance of rows `[n, K]` to the nearest mean of a class, `[n]`."""
        shift, _ = self._system(strength)
        factor = factorise(self.matrix, shift, self._trace)
        rows, means = (
            torch.linalg.solve_triangular(factor, one.T.to(factor), upper=False).T
            for one in (x, self._means[self._present])
        )
        return torch.cdist(rows, means).amin(dim=1).square() / (1 - strength)


@dataclass(frozen=True)
class Space:
    """Where a problem is solved: in its columns, or in the space that its rows span."""

    problem: Problem
    basis: Tensor | None = None
    """float32 `[K, r]`, of the coordinates; None are the columns themselves."""

    @property
    def filled(self) -> float:
        """Coordinates over columns."""
        return 1.0 if self.basis is None else self.basis.shape[1] / self.basis.shape[0]

    def in_columns(self, linear: LinearMap) -> LinearMap:
        """Write a classifier of coordinates as one of columns."""
        if self.basis is None:
            return linear
        return LinearMap(weight=linear.weight @ self.basis.T.to(linear.weight), bias=linear.bias)


def space_of(problem: Problem) -> Space:
    """Say where a problem is solved whose penalty is the same in all directions.

    Of far fewer rows than columns it is the space that they span, where nothing is lost.
    """
    if problem.summed is not None or problem.x.shape[1] <= _WIDE * len(problem.taking_part):
        return Space(problem)
    return Space(*in_span(problem))


class ClosedSolver:
    """Ridge or LDA of a problem: held-out scores for every strength, and a fit of all rows."""

    def __init__(
        self,
        kind: type[Ridge | LDA],
        problem: Problem,
        strengths: tuple[float, ...] | None = None,
    ) -> None:
        self.kind, self.problem = kind, problem
        self.strengths = strengths or kind.STRENGTHS

    @functools.cached_property
    def _space(self) -> Space:
        return space_of(self.problem)

    def _of_first(self, width: int) -> ClosedSolver:
        if width == self.problem.x.shape[1]:
            return self  # which has found its space
        first = dataclasses.replace(self.problem, x=self.problem.x[:, :width])
        return ClosedSolver(self.kind, first, self.strengths)

    def solve(self, strength: float, width: int | None = None) -> LinearMap:
        """Fit all rows with one strength, in float64, on all columns or so many first ones."""
        space, everything = self._space, self.problem.x.shape[1]
        width = everything if width is None else width
        if space.basis is not None and width < everything:
            return self._of_first(width).solve(strength)
        system = self.kind(space.problem.moments.total(), space.filled)
        if space.basis is not None:
            return space.in_columns(system.solve(strength))
        return system.leading(strength, (width,))[0]

    def held_out(self) -> Path:
        """Score each row by the classifiers that have not seen its fold."""
        return self._held_out(self.strengths)

    def held_out_parts(self) -> Iterator[Path]:
        """Give `held_out` some strengths at a time: of many rows and classes all have no room."""
        n_bytes = 4 * len(self.problem.x) * len(self.problem.class_weights)
        n_strengths = max(1, _PART_BYTES // max(1, n_bytes))
        for start in range(0, len(self.strengths), n_strengths):
            yield self._held_out(self.strengths[start : start + n_strengths])

    def held_out_of(self, widths: Sequence[int]) -> list[Path]:
        """Score each row from the first columns alone, for each number of them.

        A Cholesky factor of all columns holds those of the first ones, so that these cost little.
        """
        if self._space.basis is not None:
            return [self._of_first(width).held_out() for width in widths]
        return self._held_out_of(widths, self.strengths)

    def _held_out(self, strengths: tuple[float, ...]) -> Path:
        return self._held_out_of((self._space.problem.x.shape[1],), strengths)[0]

    def _held_out_of(self, widths: Sequence[int], strengths: tuple[float, ...]) -> list[Path]:
        problem, filled = self._space.problem, self._space.filled
        shape = (len(strengths), len(problem.x), len(problem.class_weights))
        scores = [problem.class_weights.new_full(shape, math.nan) for _ in widths]

        def score(moments: Moments, tried: slice, rows: Tensor) -> None:
            system = self.kind(moments, filled)
            solved = [system.leading(strength, widths) for strength in strengths[tried]]
            for of_width, maps in zip(scores, zip(*solved, strict=True), strict=True):
                _score(of_width[tried], maps, problem, rows)

        def score_fold(job: tuple[int, slice]) -> None:
            fold, tried = job
            score(problem.moments.without(fold), tried, problem.folds[fold])

        # With five folds and two cores one would idle at the end, so each is done in halves.
        middle = (len(strengths) + 1) // 2 if torch.get_num_threads() > 1 else len(strengths)
        halves = [tried for tried in (slice(middle), slice(middle, None)) if strengths[tried]]
        jobs = itertools.product(range(len(problem.folds)), halves)
        for _ in map_on_cores(score_fold, jobs, problem.device):
            pass
        if len(problem.alone):
            score(problem.moments.total(), slice(None), problem.alone)
        return [Path(strengths, of_width) for of_width in scores]


def _score(scores: Tensor, maps: Sequence[LinearMap], problem: Problem, rows: Tensor) -> None:
    """Fill `[S, N, C]` with the scores of some rows by S classifiers."""
    together = LinearMap(
        weight=torch.cat([one.weight for one in maps]), bias=torch.cat([one.bias for one in maps])
    )
    for chunk in torch.split(rows, _CHUNK_ROWS):
        held_out = problem.features_of(chunk, together.weight.shape[1])
        of_chunk = torch.unflatten(together.scores(held_out), 1, (len(maps), -1))
        scores[:, chunk] = of_chunk.transpose(0, 1)  # [n, S, C] -> [S, n, C]


def unit_of(matrix: Tensor, mean_square: Tensor, n: Tensor) -> Tensor:
    """Give the variance that a strength of 1 stands for: the mean one, or its least value.

    That n rows don't differ does not mean that the next one won't. The least value is what one row
    more would add whose class has nothing to do with its text, as the temperature counts one too;
    and a thousandth of the mean square, below which rounding begins to matter.

    Args:
        matrix: `[K, K]`, scatter or covariance.
        mean_square: of the same features, summed as the matrix is.
        n: number of rows.

    >>> square, n = torch.tensor(1.0), torch.tensor(3.0)
    >>> unit_of(torch.zeros(2, 2), square, n).item(), unit_of(torch.eye(2), square, n).item()
    (0.25, 1.0)
    """
    least = mean_square * (1 / (n + 1)).clamp(min=_LEAST_VARIANCE).to(mean_square)
    unit = torch.maximum(matrix.diagonal().mean(), least)
    return torch.where(unit > 0, unit, 1.0)


def factorise(matrix: Tensor, shift: Tensor, trace: Tensor) -> Tensor:
    """Factorise `A + s I`: in its own precision, in float64, or with s raised by the rounding.

    A is known to an error whose norm is at most 2^-20 of the trace of the Gram matrix it came from;
    with a shift larger than that it is positive definite.
    """
    factor: Tensor
    for dtype, more in ((matrix.dtype, 0), (torch.float64, 0), (torch.float64, _ROUNDING * trace)):
        shifted = matrix.to(dtype, copy=True)
        shifted.diagonal().add_((shift + more).to(dtype))
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            break
    return factor


def without_absent(weight: Tensor, bias: Tensor, counts: Tensor) -> LinearMap:
    """Make a classifier that never predicts a class of which there was no example."""
    present = counts > 0
    return LinearMap(
        weight=torch.where(present[:, None], weight, 0.0),
        bias=torch.where(present, bias, ABSENT_BIAS),
    )
