from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeClassifier
from torch import Tensor

from llmembed.train.inputs.shares import draw_folds
from llmembed.train.linear import closed
from llmembed.train.linear.closed import ABSENT_BIAS, LDA, ClosedSolver, Ridge
from llmembed.train.linear.moments import FoldMoments, Problem, in_span

N, WIDTH, N_CLASSES = 120, 12, 3
CLOSED_FORMS = {"ridge": Ridge, "lda": LDA}


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = np.random.default_rng(0)
    y = generator.integers(0, N_CLASSES, N)
    centres = generator.normal(size=(N_CLASSES, WIDTH))
    mixing = generator.normal(size=(WIDTH, WIDTH))
    x = ((centres[y] + generator.normal(size=(N, WIDTH))) @ mixing).astype(np.float32)
    folds = draw_folds(y, np.arange(N), 5, generator)
    return torch.from_numpy(x), torch.from_numpy(y), [torch.from_numpy(rows) for rows in folds]


def moments_of(problem: tuple[Tensor, Tensor, list[Tensor]]) -> FoldMoments:
    x, y, folds = problem
    return Problem(x, y, folds, torch.ones(N_CLASSES)).moments


def test_moments_equal_numpys_in_float64(problem: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    """Gram matrices, class sums and counts of the rows outside a fold are numpy's."""
    x, y, folds = problem
    weights = torch.tensor([1.0, 2.0, 0.5])
    moments = Problem(x, y, folds, weights).moments
    kept = np.setdiff1d(np.arange(N), folds[2].numpy())
    rows, classes = x.double().numpy()[kept], y.numpy()[kept]
    w = weights.double().numpy()[classes][:, None]
    without = moments.without(2)
    np.testing.assert_allclose(without.gram, rows.T @ (w * rows), rtol=1e-5, atol=1e-3)
    one_hot = np.eye(N_CLASSES)[classes]
    np.testing.assert_allclose(without.class_sums, one_hot.T @ (w * rows), rtol=1e-6)
    np.testing.assert_allclose(without.counts, (w * one_hot).sum(axis=0))
    everything = x.double().numpy()
    w = weights.double().numpy()[y.numpy()][:, None]
    np.testing.assert_allclose(moments.total().gram, everything.T @ (w * everything), rtol=1e-5)


def test_moments_of_many_rows_and_columns_equal_numpys() -> None:
    """Columns beyond a block and rows beyond a chunk are summed like the first ones."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(5000, 900)).astype(np.float32)
    y, weights = generator.integers(0, 2, 5000), torch.tensor([1.0, 2.0])
    moments = Problem(
        torch.from_numpy(x), torch.from_numpy(y), [torch.arange(5000)], weights
    ).moments.total()
    weighted = x.astype(np.float64) * weights.numpy()[y][:, None]
    np.testing.assert_allclose(moments.gram, weighted.T @ x, atol=1e-6 * len(x))
    np.testing.assert_array_equal(moments.gram, moments.gram.T)
    np.testing.assert_allclose(moments.class_sums[0], weighted[y == 0].sum(axis=0), atol=1e-3)


@pytest.mark.parametrize("strength", [0.01, 1.0])
@pytest.mark.parametrize("balanced", [False, True])
def test_ridge_is_scikit_learns(
    problem: tuple[Tensor, Tensor, list[Tensor]], strength: float, balanced: bool
) -> None:
    """Weights and biases are RidgeClassifier's for the same penalty, balanced or not."""
    x, y, folds = problem
    counts = torch.bincount(y)
    weights = N / (N_CLASSES * counts) if balanced else torch.ones(N_CLASSES)
    total = Problem(x, y, folds, weights).moments.total()
    ours = Ridge(total).solve(strength)
    rows, w = x.double(), weights[y].double()[:, None]
    centred = rows - (w * rows).sum(dim=0) / w.sum()
    alpha = strength * (w * centred.square()).sum().item() / WIDTH
    theirs = RidgeClassifier(alpha=alpha, class_weight="balanced" if balanced else None)
    theirs.fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose(ours.weight, theirs.coef_, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(ours.bias, theirs.intercept_, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strength", [0.01, 0.5])
def test_lda_is_scikit_learns(
    problem: tuple[Tensor, Tensor, list[Tensor]], strength: float
) -> None:
    """Posteriors are those of scikit-learn's LDA with the same shrinkage."""
    x, y, _ = problem
    ours = LDA(moments_of(problem).total()).solve(strength)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=strength)
    theirs.fit(x.double().numpy(), y.numpy())
    posteriors = ours.scores(x.double()).softmax(dim=1)
    np.testing.assert_allclose(posteriors, theirs.predict_proba(x.double().numpy()), atol=1e-4)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_held_out_rows_are_scored_without_their_fold(
    problem: tuple[Tensor, Tensor, list[Tensor]], name: str
) -> None:
    """Scores of a fold are those of a classifier fitted on the other rows alone."""
    x, y, folds = problem
    kind = CLOSED_FORMS[name]
    posed = Problem(x, y, folds, torch.ones(N_CLASSES))
    scores = ClosedSolver(kind, posed, (0.1, 0.5)).held_out().scores
    kept = torch.cat([rows for fold, rows in enumerate(folds) if fold != 3])
    alone = Problem(x, y, [kept], torch.ones(N_CLASSES)).moments.total()
    expected = kind(alone).solve(0.5).scores(x[folds[3]])
    torch.testing.assert_close(scores[1, folds[3]], expected, rtol=1e-3, atol=1e-3)
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_of_few_rows_the_space_that_they_span_gives_the_same(name: str) -> None:
    """Held-out scores and the fit of all rows are those of a system of all columns."""
    kind, generator = CLOSED_FORMS[name], torch.Generator().manual_seed(0)
    x = torch.randn(60, 400, generator=generator) @ torch.diag(torch.linspace(0.5, 2, 400))
    x[50:] = x[:10]  # rows that repeat: the space has fewer dimensions than there are rows
    y = torch.randint(0, 3, (60,), generator=generator)
    folds, weights = list(torch.randperm(60, generator=generator).split(12)), torch.rand(60) + 0.5
    posed = Problem(x, y, folds, torch.tensor([1.0, 2.0, 1.0]), weights)
    solver = ClosedSolver(kind, posed, (0.1, 0.5))
    narrow, wide = solver.held_out_of((100, 400))
    torch.testing.assert_close(wide.scores, solver.held_out().scores)
    for width, path in ((100, narrow), (400, wide)):
        whole = dataclasses.replace(posed, x=x[:, :width])
        for fold, rows in enumerate(folds):
            expected = kind(whole.moments.without(fold)).solve(0.5).scores(whole.x[rows])
            torch.testing.assert_close(path.scores[1, rows], expected, rtol=1e-3, atol=1e-3)
        of_all = kind(whole.moments.total()).solve(0.5)
        torch.testing.assert_close(
            solver.solve(0.5, width).scores(x[:, :width]),
            of_all.scores(x[:, :width]),
            rtol=1e-3,
            atol=1e-3,
        )


def test_the_space_of_all_columns_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wide pool each number of first columns has its space found once, all of them too."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 400, generator=generator), torch.arange(60) % 3
    solver = ClosedSolver(LDA, Problem(x, y, list(torch.arange(60).split(12)), torch.ones(3)))
    widths: list[int] = []

    def told(problem: Problem) -> tuple[Problem, Tensor]:
        widths.append(problem.x.shape[1])
        return in_span(problem)

    monkeypatch.setattr(closed, "in_span", told)
    solver.held_out_of((100, 200, 400))
    solver.solve(0.5)
    assert sorted(widths) == [200, 400]  # 100 columns are not wide enough


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_leading_columns_are_solved_as_if_alone(
    problem: tuple[Tensor, Tensor, list[Tensor]], name: str
) -> None:
    """Of one Cholesky factor come the classifiers on the first columns, with the shift of all."""
    kind, (x, y, folds) = CLOSED_FORMS[name], problem
    of_four = Problem(x[:, :4], y, folds, torch.ones(N_CLASSES)).moments
    system, alone = kind(moments_of(problem).total()), kind(of_four.total())
    first, everything = system.leading(0.3, (4, WIDTH))
    torch.testing.assert_close(everything.weight, system.solve(0.3).weight)
    ratio = float(system.matrix.diagonal().mean() / alone.matrix.diagonal().mean())
    strength = 0.3 * ratio if name == "ridge" else 0.3 * ratio / (0.7 + 0.3 * ratio)
    expected = alone.solve(strength)
    scale = 1 if name == "ridge" else (1 - strength) / 0.7  # LDA's means are divided by 1 - s
    torch.testing.assert_close(first.weight, expected.weight * scale)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_class_without_examples_is_never_predicted(
    problem: tuple[Tensor, Tensor, list[Tensor]], name: str
) -> None:
    """A class that only the label list has gets no weight and a bias far below the others."""
    x, y, folds = problem
    total = Problem(x, y, folds, torch.ones(N_CLASSES + 1)).moments.total()
    solved = CLOSED_FORMS[name](total).solve(0.5)
    assert solved.bias[N_CLASSES] == ABSENT_BIAS
    assert not (solved.scores(x).argmax(dim=1) == N_CLASSES).any()


def test_more_columns_than_rows() -> None:
    """A singular Gram matrix, constant columns included, is solved all the same."""
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    y = torch.arange(20) % 2
    folds = list(torch.arange(20).split(5))
    for kind in CLOSED_FORMS.values():
        solver = ClosedSolver(kind, Problem(x, y, folds, torch.ones(2)))
        assert solver.held_out().scores.isfinite().all()
