"""Which solved head, at which strength: held-out rows decide.

A solver scores every training row by classifiers that have not seen its fold, for each of its
strengths (`held_out`); and it solves for one strength on all rows (`solve`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
    accuracy: float
    """Held-out accuracy, weighted as the fit is; 0 where no row can be held out. Of several labels
    a text the loss, less than 0 (`Problem.merits`)."""
    scores: Tensor
    """float32 `[N, C]`, held-out scores."""
    solve: Callable[[], LinearMap]
    """Fits all rows with that strength."""


def choose_head(problem: Problem, heads: Sequence[str]) -> Choice:
    """Try all strengths of some heads; of equals the head that is named first wins."""
    choices = []
    for head in heads:
        solver = (ONE_VS_REST if problem.multilabel else SOLVERS)[head](problem)
        choices.append(choose_strength(problem, head, solver.held_out(), solver.solve))
    return max(choices, key=lambda choice: choice.accuracy)


def choose_strength(
    problem: Problem, head: str, path: Path, solve: Callable[[float], LinearMap]
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
        path: held-out scores of the strengths that were tried.
        solve: fits all rows with a strength.
    """
    solve = functools.cache(solve)
    accuracies = problem.merits(path.scores, problem.held_out)
    accuracy = max(accuracies)
    equals = [k for k, found in enumerate(accuracies) if found == accuracy]
    equals.sort(key=lambda k: -path.strengths[k])
    best, best_fitted = equals[0], -1.0
    rows, alone = problem.taking_part, problem.alone
    for k in equals if len(equals) > 1 and not problem.multilabel else []:
        linear = solve(path.strengths[k])
        blocks = problem.blocks(linear.weight.shape[1])
        scores = torch.cat([linear.scores(x) for _, x in blocks])
        scores[rows, problem.y[rows]] -= _ROUNDING * scores[rows].abs().max()
        (fitted,) = problem.accuracies(scores[None], rows)
        if fitted > best_fitted:
            best, best_fitted = k, fitted
        knows_alone = bool((scores[alone].argmax(dim=1) == problem.y[alone]).all())
        if best_fitted == 1 or (k == equals[0] and fitted > accuracy > 0 and knows_alone):
            break
    return Choice(
        head=head,
        strength=path.strengths[best],
        accuracy=accuracy,
        scores=path.scores[best],
        solve=functools.partial(solve, path.strengths[best]),
    )
