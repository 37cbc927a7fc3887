from __future__ import annotations

import numpy as np
import pytest
import torch

from llmembed.train.inputs.shares import draw_folds
from llmembed.train.linear.closed import LinearMap
from llmembed.train.linear.sweep import Candidate, Grid, best_of, sweep

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
    assert best.accuracy > max(one.accuracy for one in singles) + 0.2


def test_a_subset_is_judged_as_if_alone() -> None:
    """A concatenation judged from the pool's Gram matrix equals one judged from its columns."""
    grid = make_grid()
    pair = next(one for one in sweep(grid) if len(one.features) == 2)
    alone = grid.choose("concat", pair.features, strengths=(pair.strength,))
    assert alone.accuracy == pytest.approx(pair.accuracy)


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
            strength=1,
            accuracy=0.5,
            scores=torch.zeros(1, 2),
            temperature=1,
            solve=lambda: LinearMap(weight=torch.zeros(2, 1), bias=torch.zeros(2)),
        )
        for features in ((0, 1, 2), (1, 2))
    )
    assert best_of([many, few]) is few
