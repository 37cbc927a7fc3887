from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from llmembed.train.inputs.shares import draw_folds
from llmembed.train.linear import closed
from llmembed.train.linear.choice import choose_head
from llmembed.train.linear.closed import ABSENT_BIAS
from llmembed.train.linear.moments import Problem
from llmembed.train.linear.sigmoid import SigmoidSolver
from llmembed.train.linear.softmax import SoftmaxSolver

N, WIDTH = 150, 10


def make_problem(n_classes: int, *, n_absent: int = 0, shift: float = 0) -> Problem:
    generator = np.random.default_rng(n_classes)
    y = np.arange(N) % n_classes
    noise = 2 * generator.normal(size=(N, WIDTH))
    x = (generator.normal(size=(n_classes, WIDTH))[y] + noise) @ generator.normal(
        size=(WIDTH, WIDTH)
    )
    folds = draw_folds(y, np.arange(N), 5, generator)
    return Problem(
        torch.from_numpy((x + shift).astype(np.float32)),
        torch.from_numpy(y),
        [torch.from_numpy(rows) for rows in folds],
        torch.ones(n_classes + n_absent),
    )


def scikit_learns(x: Tensor, y: Tensor, penalty: float) -> LogisticRegression:
    model = LogisticRegression(C=1 / (penalty * len(y)), max_iter=10_000, tol=1e-8)
    return model.fit(x.double().numpy(), y.numpy())


def unit(problem: Problem) -> float:
    return problem.x.double().var(dim=0, correction=0).mean().item()


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("strength", [0.001, 0.1])
@pytest.mark.parametrize("shift", [0, 5])
def test_the_optimum_is_scikit_learns(n_classes: int, strength: float, shift: float) -> None:
    """Probabilities are LogisticRegression's for the same penalty, wherever the features lie."""
    problem = make_problem(n_classes, shift=shift)
    ours = SoftmaxSolver(problem).solve(strength).scores(problem.x.double()).softmax(dim=1)
    # Two classes: one weight vector of scikit-learn's is the difference of two of half its size.
    penalty = strength * unit(problem) / (2 if n_classes == 2 else 1)
    theirs = scikit_learns(problem.x, problem.y, penalty)
    np.testing.assert_allclose(ours, theirs.predict_proba(problem.x.double().numpy()), atol=5e-3)


def test_folds_are_fitted_at_once_as_alone() -> None:
    """Held-out scores are those of a fit on the other rows alone, for every strength."""
    problem = make_problem(3)
    solver = SoftmaxSolver(problem)
    path = solver.held_out()
    assert path.strengths[:2] == solver.STRENGTHS[:-3:-1]
    rows = torch.cat(problem.folds[1:])
    for strength, scores in zip(path.strengths, path.scores, strict=True):
        penalty = strength * unit(problem)
        theirs = scikit_learns(problem.x[rows], problem.y[rows], penalty)
        expected = theirs.predict_proba(problem.x[problem.folds[0]].double().numpy())
        ours = scores[problem.folds[0]].softmax(dim=1)
        np.testing.assert_allclose(ours, expected, atol=5e-3)


def test_a_class_without_examples_is_never_predicted() -> None:
    """A class that only the label list has gets a bias far below the others."""
    problem = make_problem(2, n_absent=1)
    assert SoftmaxSolver(problem).solve(0.1).bias[2] == ABSENT_BIAS


def test_separable_classes_have_an_optimum() -> None:
    """Where classes are separable the penalty keeps the weights finite."""
    x = torch.cat([torch.full((20, 3), 1.0), torch.full((20, 3), -1.0)])
    y = torch.arange(40) // 20
    folds = [torch.arange(start, 40, 4) for start in range(4)]
    solver = SoftmaxSolver(Problem(x, y, folds, torch.ones(2)))
    assert solver.held_out().scores.isfinite().all()
    assert (solver.solve(1e-4).scores(x).argmax(dim=1) == y).all()


def test_the_best_head_is_chosen_by_held_out_accuracy() -> None:
    """Of several heads the one with the highest held-out accuracy is taken, with its strength."""
    problem = make_problem(3)
    choices = {head: choose_head(problem, (head,)) for head in ("ridge", "lda", "linear")}
    best = choose_head(problem, tuple(choices))
    assert best.merit == max(choice.merit for choice in choices.values())
    assert best.strength == choices[best.head].strength
    predicted = best.scores.argmax(dim=1)
    assert (predicted == problem.y).double().mean().item() == pytest.approx(best.merit)


@pytest.mark.parametrize("solver", [SoftmaxSolver, SigmoidSolver])
def test_of_few_rows_the_space_that_they_span_gives_the_same(
    solver: type[SoftmaxSolver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out scores and the fit of all rows are those of all columns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 400, generator=generator) @ torch.diag(torch.linspace(0.5, 2, 400))
    y = torch.randint(0, 3, (60,), generator=generator)
    folds = list(torch.randperm(60, generator=generator).split(12))
    targets = torch.nn.functional.one_hot(y, 3) if solver is SigmoidSolver else y
    problem = Problem(x, targets, folds, torch.tensor([1.0, 2.0, 1.0]))
    strengths = (0.1, 0.01)
    of_rows = solver(problem, strengths, tolerance=1e-10)
    monkeypatch.setattr(closed, "_WIDE", 100)
    of_columns = solver(problem, strengths, tolerance=1e-10)
    assert of_rows.problem.x.shape[1] < of_columns.problem.x.shape[1]
    close = functools.partial(torch.testing.assert_close, rtol=1e-2, atol=1e-2)
    close(of_rows.held_out().scores, of_columns.held_out().scores)
    close(of_rows.solve(0.1).scores(x), of_columns.solve(0.1).scores(x))
