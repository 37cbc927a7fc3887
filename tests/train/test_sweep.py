from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from llmembed.train.inputs.shares import draw_folds
from llmembed.train.linear import sweep as sweeping
from llmembed.train.linear.closed import LinearMap
from llmembed.train.linear.sweep import Candidate, Grid, best_of, stack_of, sweep

N, WIDTH = 240, 6


def make_grid(head: str = "lda") -> Grid:
    """Four features: noise, two that know two bits of the class, and one that knows one worse."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 4, N)
    x = generator.normal(size=(N, 4, WIDTH))
    x[:, 1, 0] += 3 * (y % 2)
    x[:, 2, 0] += 3 * (y // 2)
    x[:, 3, 0] += 2 * (y % 2)
    folds = [torch.from_numpy(rows) for rows in draw_folds(y, np.arange(N), 5, generator)]
    return Grid(
        x=torch.from_numpy(x.reshape(N, -1).astype(np.float32)),
        y=torch.from_numpy(y),
        widths=(WIDTH,) * 4,
        deep=(2, 3),
        folds=folds,
        class_weights=torch.ones(4),
        head=head,
    )


@pytest.mark.parametrize("head", ["ridge", "lda"])
def test_features_that_complete_each_other_are_found(head: str) -> None:
    """The two features that know different things about the class are in the best subset."""
    candidates = sweep(make_grid(head))
    singles = [one for one in candidates if one.fusion == "single"]
    assert [one.features for one in singles] == [(0,), (1,), (2,), (3,)]
    best = best_of(candidates)
    assert best.fusion == "concat"
    assert {1, 2} <= set(best.features)
    assert best.merit > max(one.merit for one in singles) + 0.2


def test_a_subset_is_judged_as_if_alone() -> None:
    """A concatenation judged from the pool's Gram matrix equals one judged from its columns."""
    grid = make_grid()
    pair = next(one for one in sweep(grid) if len(one.features) == 2)
    alone = grid.choose("concat", pair.features, strengths=(pair.strength,))
    assert alone.merit == pytest.approx(pair.merit)


def test_a_candidate_solves_for_what_it_was_judged_as() -> None:
    """Alone on its columns and with its strength, the same classifier comes out."""
    grid = make_grid()
    for candidate in sweep(grid):
        fused = grid.fuse(candidate.fusion, candidate.features)
        alone = grid.solve(candidate.fusion, candidate.features, candidate.strength)
        found = candidate.solve().scores(fused)
        # A concatenation's strength is relative to the pool's variance, here a tenth off its own.
        torch.testing.assert_close(found, alone.scores(fused), rtol=0.05, atol=0.05)


def test_features_of_different_widths_have_no_mean() -> None:
    """With features of different widths the mean is left out, and the others are judged."""
    grid = make_grid()
    candidates = sweep(Grid(**{**vars(grid), "widths": (WIDTH, 2 * WIDTH, WIDTH)}))
    assert {one.fusion for one in candidates} == {"single", "concat"}


def test_of_equals_the_smaller_is_best() -> None:
    """Of candidates with one accuracy the one with the fewest features is taken."""
    many, few = (
        Candidate(
            fusion="concat",
            features=features,
            head="lda",
            strength=1,
            merit=0.5,
            scores=torch.zeros(1, 2),
            temperature=1,
            solve=lambda: LinearMap(weight=torch.zeros(2, 1), bias=torch.zeros(2)),
        )
        for features in ((0, 1, 2), (1, 2))
    )
    assert best_of([many, few]) is few


def softened() -> Grid:
    return dataclasses.replace(make_grid(), is_softened=True)


def softmax_heads(grid: Grid) -> list[Candidate]:
    return [one for one in sweep(grid) if one.head == "linear"]


def test_a_stack_is_picked_from_softmax_heads_too() -> None:
    """One stands on the best single feature, one on the pool; a sweep alone has none."""
    single, wide = softmax_heads(softened())
    closed = sweep(make_grid())
    best = best_of([one for one in closed if one.fusion == "single"])
    assert (single.fusion, single.features) == ("single", best.features)
    assert (wide.fusion, len(wide.features)) == ("concat", 4)
    assert {one.head for one in closed} == {"lda"}


def test_a_softmax_head_is_near_scikit_learns_optimum() -> None:
    """Its loss, penalty included, is within its tolerance of LogisticRegression's."""
    grid = softened()
    for one in softmax_heads(grid):
        x = grid.fuse(one.fusion, one.features).double()
        penalty = one.strength * x.var(dim=0, correction=0).mean()
        theirs = LogisticRegression(C=1 / (penalty.item() * N), max_iter=10_000, tol=1e-8)
        theirs.fit(x.numpy(), grid.y.numpy())
        linear = one.solve()

        def loss_of(weight: np.ndarray, bias: np.ndarray) -> float:
            w, b = torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
            loss = torch.nn.functional.cross_entropy(x @ w.T + b, grid.y)  # noqa: B023
            return (loss + penalty / 2 * w.square().sum()).item()  # noqa: B023

        optimum = loss_of(theirs.coef_, theirs.intercept_)
        assert optimum - 1e-6 <= loss_of(linear.weight.numpy(), linear.bias.numpy())
        assert loss_of(linear.weight.numpy(), linear.bias.numpy()) < optimum + 1e-3


def test_the_first_member_has_the_lowest_held_out_loss_of_all() -> None:
    """Whatever its head is: a look at every candidate finds the same."""
    grid = softened()
    candidates = sweep(grid)
    losses = [
        torch.nn.functional.cross_entropy(one.scores[grid.taking_part], grid.y[grid.taking_part])
        for one in candidates
    ]
    first = next(iter(stack_of(grid, candidates).values()))
    assert first is candidates[int(torch.stack(losses).argmin())]


def test_a_member_judged_again_is_what_it_was() -> None:
    """On the same folds, whatever its head is."""
    grid = softened()
    for member, judged in stack_of(grid, sweep(grid)).items():
        again = grid.judge_again(member)
        assert (again.head, again.features) == (judged.head, judged.features)
        assert again.merit == pytest.approx(judged.merit, abs=0.01)


@pytest.mark.parametrize(("most", "n_features"), [(N * WIDTH * 4 * 5 * 2, [1, 2]), (1, [])])
def test_dear_softmax_heads_are_left_out(
    most: int, n_features: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is cut where a step takes too many products, and none is fitted where one does."""
    monkeypatch.setattr(sweeping, "_MOST_PRODUCTS", most)
    assert [len(one.features) for one in softmax_heads(softened())] == n_features
