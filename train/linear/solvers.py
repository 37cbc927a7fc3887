"""Heads that are solved, not trained: one interface for ridge, LDA and softmax regression.

A solver scores every training row by classifiers that have not seen its fold, for each of its
strengths; and it solves for one strength on all rows.

A row that is alone in its class cannot be held out: without it there is no such class. It is scored
by the classifier fitted to all rows. So it has no part in the held-out accuracy; losses and
temperatures count it, since without it the class would have no row at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from llmembed.train.inputs.weighing import mean_loss, weights_of
from llmembed.train.linear.closed import (
    LDA,
    LinearMap,
    Ridge,
    held_out_scores,
    unit_of,
    without_absent,
)
from llmembed.train.linear.gram import FoldMoments
from llmembed.train.linear.softmax import SoftmaxFits


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Rows to classify, divided into folds."""

    x: Tensor
    """float32 `[N, K]`, fused features."""
    y: Tensor
    """int64 `[N]`, classes."""
    folds: list[Tensor]
    """int64 `[n]` each, the rows of a fold; rows in none take no part."""
    class_weights: Tensor
    """float32 `[C]`, weight of each row of a class."""
    moments: FoldMoments
    """Moments of the same rows."""
    held_out: Tensor
    """int64 `[n]`, rows in folds that another row of their class can stand in for."""
    alone: Tensor
    """int64 `[n]`, the other rows in folds: each the only one of its class."""
    sample_weights: Tensor | None = None
    """float32 `[N]`, a factor of the weight of each row; None is 1."""

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor,
        folds: list[Tensor],
        class_weights: Tensor,
        moments: FoldMoments | None = None,
        sample_weights: Tensor | None = None,
    ) -> Problem:
        """Accumulate the moments in one pass, where they are not given."""
        if moments is None:
            moments = FoldMoments.of(x, y, folds, class_weights, sample_weights)
        held_out, alone = part_alone(y, folds)
        return cls(
            x=x,
            y=y,
            folds=folds,
            class_weights=class_weights,
            moments=moments,
            held_out=held_out,
            alone=alone,
            sample_weights=sample_weights,
        )

    def weights_of(self, rows: Tensor) -> Tensor:
        """Weigh some rows, float32 `[n]`."""
        return weights_of(self.y, rows, self.class_weights, self.sample_weights)


def part_alone(y: Tensor, folds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Part the rows in folds into those that can be held out, and those alone in their class.

    >>> part_alone(torch.tensor([0, 0, 1]), [torch.tensor([0, 2]), torch.tensor([1])])
    (tensor([0, 1]), tensor([2]))
    """
    rows = torch.cat(list(folds))
    is_alone = torch.bincount(y[rows])[y[rows]] == 1
    return rows[~is_alone], rows[is_alone]


@dataclass(frozen=True, kw_only=True)
class Path:
    """Held-out scores along the strengths that were tried."""

    strengths: tuple[float, ...]
    """S strengths."""
    scores: Tensor
    """float32 `[S, N, C]`, not held out of rows alone in their class; NaN of those in no fold."""


class Solver(Protocol):
    """What a head in `--head` that is solved offers."""

    def held_out(self) -> Path:
        """Score each row by the classifiers that have not seen its fold."""

    def solve(self, strength: float) -> LinearMap:
        """Fit all rows with one strength."""


class ClosedSolver:
    """Ridge or LDA, from the moments."""

    def __init__(
        self, kind: type[Ridge | LDA], problem: Problem, strengths: tuple[float, ...] | None = None
    ) -> None:
        self.kind, self.problem = kind, problem
        self.strengths = strengths or kind.STRENGTHS

    def held_out(self) -> Path:
        """Score each row by the classifiers that have not seen its fold."""
        return self.held_out_of((self.problem.x.shape[1],))[0]

    def held_out_of(self, widths: Sequence[int]) -> list[Path]:
        """Score each row from the first columns alone, for each number of them."""
        problem = self.problem
        scores = held_out_scores(
            self.kind,
            problem.moments,
            problem.x,
            problem.folds,
            self.strengths,
            widths,
            problem.alone,
        )
        return [Path(strengths=self.strengths, scores=of_width) for of_width in scores]

    def solve(self, strength: float, width: int | None = None) -> LinearMap:
        """Fit all rows with one strength, in float64, on all columns or so many first ones."""
        system = self.kind(self.problem.moments.total())
        return system.leading(strength, (width or len(system.matrix),))[0]


class SoftmaxSolver:
    """Softmax regression; the penalty is strength times the mean variance of the features."""

    STRENGTHS: ClassVar = tuple(10 ** (k / 2 - 4) for k in range(10))  # 0.0001 to 3.16

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        total = problem.moments.total()
        self._mean, self._counts = total.mean, total.counts
        covariance = total.gram / total.n - torch.outer(total.mean, total.mean)
        self._covariance = covariance.float()
        self._unit = float(unit_of(covariance, total.gram.diagonal().mean() / total.n, total.n))

    def held_out(self) -> Path:
        """Score each row by the fits that have not seen its fold.

        The path goes from the strongest penalty to the weakest, each from the optimum before, and
        ends where the held-out loss has risen twice: the weak end takes most of the steps.
        """
        fits, theta, paths, losses = self._fold_fits(), None, [], []
        for strength in reversed(self.STRENGTHS):
            theta = fits.minimise(strength * self._unit, fits.start() if theta is None else theta)
            paths.append(self._of_own_fold(fits.scores(theta)))
            losses.append(self._loss(paths[-1]))
            if losses[-3:] == sorted(losses[-3:]) and len(losses) > 2:
                break
        tried = tuple(reversed(self.STRENGTHS))[: len(paths)]
        return Path(strengths=tried, scores=torch.stack(paths))

    def solve(self, strength: float) -> LinearMap:
        """Fit all rows with one strength."""
        masks = self.problem.x.new_zeros(len(self.problem.x), 1)
        masks[torch.cat(self.problem.folds)] = 1
        fits = self._fits(masks)
        theta = fits.minimise(strength * self._unit, fits.start())[0].double()
        weight = theta[:-1].T
        return without_absent(weight, theta[-1] - weight @ self._mean, self._counts)

    def _fold_fits(self) -> SoftmaxFits:
        """Make a fit without each fold, and one of all rows where some are alone in their class."""
        folds = self.problem.folds
        n_fits = len(folds) + bool(len(self.problem.alone))
        masks = self.problem.x.new_zeros(len(self.problem.x), n_fits)
        masks[torch.cat(folds)] = 1
        for fold, rows in enumerate(folds):
            masks[rows, fold] = 0
        return self._fits(masks)

    def _of_own_fold(self, of_fits: Tensor) -> Tensor:
        """Pick each row's scores by the fit without its fold, `[N, P, C]` -> `[N, C]`."""
        scores = torch.full_like(of_fits[:, 0], math.nan)
        for fold, rows in enumerate(self.problem.folds):
            scores[rows] = of_fits[rows, fold]
        scores[self.problem.alone] = of_fits[self.problem.alone, -1]
        return scores

    def _loss(self, scores: Tensor) -> float:
        rows = torch.cat(self.problem.folds)
        problem, own = self.problem, self.problem.sample_weights
        own = None if own is None else own[rows]
        return mean_loss(scores[rows], problem.y[rows], problem.class_weights, own).item()

    def _fits(self, masks: Tensor) -> SoftmaxFits:
        y, rows = self.problem.y, torch.cat(self.problem.folds)
        weights = torch.zeros_like(masks)
        weights[rows] = masks[rows] * self.problem.weights_of(rows)[:, None]
        return SoftmaxFits(
            x=self.problem.x,
            y=y,
            row_weights=weights / weights.sum(dim=0),
            mean=self._mean.float(),
            covariance=self._covariance,
            n_classes=len(self._counts),
        )


SOLVERS: dict[str, Callable[[Problem], Solver]] = {
    "ridge": functools.partial(ClosedSolver, Ridge),
    "lda": functools.partial(ClosedSolver, LDA),
    "linear": SoftmaxSolver,
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The head and strength that the folds chose."""

    head: str
    """Name of the head."""
    strength: float
    """Strength with the highest held-out accuracy; of equals the strongest that fits its rows."""
    accuracy: float
    """Held-out accuracy, weighted as the fit is; 0 where no row can be held out."""
    scores: Tensor
    """float32 `[N, C]`, held-out scores."""
    solver: Solver
    """What solves for that strength."""
    linear: LinearMap | None
    """The fit of all rows, where it was needed to choose."""


def choose_head(problem: Problem, heads: Sequence[str]) -> Choice:
    """Try all strengths of some heads; of equals the head that is named first wins."""
    choices = (choose_strength(problem, head, SOLVERS[head](problem)) for head in heads)
    return max(choices, key=lambda choice: choice.accuracy)


def choose_strength(problem: Problem, head: str, solver: Solver) -> Choice:
    """Try all strengths of a solver, and choose the one with the highest held-out accuracy."""
    return choose_from(problem, head, solver, solver.held_out())


def choose_from(
    problem: Problem,
    head: str,
    solver: Solver,
    path: Path,
    solve: Callable[[float], LinearMap] | None = None,
) -> Choice:
    """Choose the strength with the highest held-out accuracy.

    Args:
        problem: rows, folds and classes.
        head: name of the head.
        solver: what found the path.
        path: held-out scores of the strengths that were tried.
        solve: fits all rows; without it, what the solver does.
    """
    accuracies = _accuracies(problem, path.scores, problem.held_out)
    equals = [k for k, accuracy in enumerate(accuracies) if accuracy == max(accuracies)]
    equals.sort(key=lambda k: -path.strengths[k])
    best, linear = equals[0], None
    if len(equals) > 1:
        fits = ((solve or solver.solve)(path.strengths[k]) for k in equals)
        index, linear = _of_equals(problem, fits, accuracies[best])
        best = equals[index]
    return Choice(
        head=head,
        strength=path.strengths[best],
        accuracy=accuracies[best],
        scores=path.scores[best],
        solver=solver,
        linear=linear,
    )


def _of_equals(
    problem: Problem, fits: Iterable[LinearMap], accuracy: float
) -> tuple[int, LinearMap]:
    """Choose among strengths of one held-out accuracy, given their fits, the strongest first.

    The strongest wins if it does better on the rows that it is fitted to than on rows held out, as
    it does with hundreds of rows. Of a few, all strengths can have one accuracy, and the strongest
    may know no more than which class is the largest: then the one wins that does best on the rows
    that it is fitted to.
    """
    rows = torch.cat(problem.folds)
    best, best_linear, best_fitted = 0, None, -1.0
    for index, linear in enumerate(fits):
        scores = linear.scores(problem.x[:, : linear.weight.shape[1]])
        (fitted,) = _accuracies(problem, scores[None], rows)
        if fitted > best_fitted:
            best, best_linear, best_fitted = index, linear, fitted
        if best_fitted == 1 or (index == 0 and fitted > accuracy > 0):
            break
    assert best_linear is not None
    return best, best_linear


def _accuracies(problem: Problem, scores: Tensor, rows: Tensor) -> list[float]:
    """Give the weighted accuracy of each of `[S, N, C]` on some rows; 0 of no rows."""
    if not len(rows):
        return [0.0] * len(scores)
    hits = (scores[:, rows].argmax(dim=2) == problem.y[rows]).double()
    weights = problem.weights_of(rows).double()
    accuracies: list[float] = (hits @ weights / weights.sum()).tolist()
    return accuracies
