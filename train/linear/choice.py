"""Which solved head, at which strength: held-out rows decide.

A solver scores every training row by classifiers that have not seen its fold, for each of its
strengths (`held_out`); and it solves for one strength on all rows (`solve`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmembed.train.linear.closed import (
    LDA,
    ClosedSolver,
    LinearMap,
    OneVsRestRidge,
    Path,
    Ridge,
)
from llmembed.train.linear.moments import Problem
from llmembed.train.linear.sigmoid import SigmoidSolver
from llmembed.train.linear.softmax import SoftmaxSolver
from llmembed.train.measures import calibrate_labels

SOLVERS: dict[str, Callable[[Problem], ClosedSolver | SoftmaxSolver]] = {
    "ridge": functools.partial(ClosedSolver, Ridge),
    "lda": functools.partial(ClosedSolver, LDA),
    "linear": SoftmaxSolver,
}
ONE_VS_REST: dict[str, Callable[[Problem], ClosedSolver | SoftmaxSolver]] = {
    "ridge": functools.partial(ClosedSolver, OneVsRestRidge),
    "linear": SigmoidSolver,
}
"""Those of several labels a text."""

_ROUNDING = 2**-16
"""Scores nearer than this part of the largest are a tie, which rounding decides either way."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The head and strength that the folds chose."""

    head: str
    """Name of the head."""
    strength: float
    """Strength with the highest held-out accuracy; of equals the strongest that fits its rows."""
    merit: float
    """Held-out accuracy, weighted as the fit is; 0 where no row can be held out. Of several labels
    a text the loss, less than 0 (`Problem.merits`)."""
    scores: Tensor
    """float32 `[N, C]`, held-out scores."""
    solve: Callable[[], LinearMap]
    """Fits all rows with that strength."""
    by_label: tuple[Tensor, Tensor] | None = None
    """Of several labels a text the scale and the offset of each, float32 `[C]`, that `scores` have
    and what is solved lacks."""

    def fit(self) -> LinearMap:
        """Fit all rows, and calibrate each label."""
        return scaled(self.solve(), self.by_label)


def scaled(linear: LinearMap, by_label: tuple[Tensor, Tensor] | None) -> LinearMap:
    """Give what was solved the scale and the offset of each label, if it has them."""
    return linear if by_label is None else linear.scaled(*by_label)


def choose_head(problem: Problem, heads: Sequence[str]) -> Choice:
    """Try all strengths of some heads; of equals the head that is named first wins."""
    choices = []
    for head in heads:
        solver = (ONE_VS_REST if problem.multilabel else SOLVERS)[head](problem)
        choices.append(choose_strength(problem, head, solver.held_out_parts(), solver.solve))
    return max(choices, key=lambda choice: choice.merit)


def choose_strength(
    problem: Problem, head: str, parts: Iterable[Path], solve: Callable[[float], LinearMap]
) -> Choice:
    """Choose the strength with the highest held-out accuracy.

    Of equals the strongest wins if it does better on the rows that it is fitted to than on rows
    held out, as it does with hundreds of rows, and if it is right about the rows that are never
    held out, each the only one of its class. Of a few rows, all strengths can have one accuracy,
    and the strongest may know no more than which class is the largest: then the one wins that
    does best on the rows that it is fitted to. A tie is not right.

    Args:
        problem: rows, folds and classes.
        head: name of the head.
        parts: held-out scores of the strengths that were tried, each of some of them.
        solve: fits all rows with a strength.
    """
    solve = functools.cache(solve)
    merit, scores_of = -math.inf, dict[float, Tensor]()
    for path in parts:
        merits = problem.merits(path.scores, problem.held_out)
        for strength, scores, found in zip(path.strengths, path.scores, merits, strict=True):
            if found > merit:
                merit, scores_of = found, {}
            if found == merit:
                scores_of[strength] = scores.clone()  # so that the others of the part can go
    equals = sorted(scores_of, reverse=True)
    best, best_fitted = equals[0], -1.0
    rows, alone = problem.taking_part, problem.alone
    for strength in equals if len(equals) > 1 and not problem.multilabel else []:
        linear = solve(strength)
        blocks = problem.blocks(linear.weight.shape[1])
        scores = torch.cat([linear.scores(x) for _, x in blocks])
        scores[rows, problem.y[rows]] -= _ROUNDING * scores[rows].abs().max()
        (fitted,) = problem.accuracies(scores[None], rows)
        if fitted > best_fitted:
            best, best_fitted = strength, fitted
        knows_alone = bool((scores[alone].argmax(dim=1) == problem.y[alone]).all())
        if best_fitted == 1 or (strength == equals[0] and fitted > merit > 0 and knows_alone):
            break
    choice = Choice(
        head=head,
        strength=best,
        merit=merit,
        scores=scores_of[best],
        solve=functools.partial(solve, best),
    )
    return _by_label(problem, choice) if problem.multilabel else choice


def _by_label(problem: Problem, choice: Choice) -> Choice:
    """Give each label a scale and an offset of its own, by its held-out scores."""
    found = problem.temperature(choice.scores, calibrate_labels)
    scale, offset = (torch.from_numpy(one).to(choice.scores) for one in found)
    scores = choice.scores * scale + offset
    return dataclasses.replace(
        choice,
        merit=problem.merits(scores[None], problem.held_out)[0],
        scores=scores,
        by_label=(scale, offset),
    )
