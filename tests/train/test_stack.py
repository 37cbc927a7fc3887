from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from clustered import MakeCache, clustered, load

from llmembed.cache_format import open_cache
from llmembed.train import FitConfig, fit, load_run
from llmembed.train.inputs.data import read_features
from llmembed.train.linear.closed import LinearMap
from llmembed.train.linear.solved import grid_of, solve_base, train_stack
from llmembed.train.linear.stacking import average, pick, spread
from llmembed.train.linear.sweep import stack_of
from llmembed.train.verbs.sweeping import choose_fusion


def test_a_weak_member_that_knows_something_else_is_picked() -> None:
    """Of a strong member, its copy and a weak one that is right elsewhere, the copy stays out."""
    y = torch.tensor([0, 1] * 50)
    signs = torch.where(y == 0, 1.0, -1.0)
    strong = torch.where(torch.arange(100) < 80, 2.0, -1.0) * signs
    weak = torch.where(torch.arange(100) < 80, 0.1, 2.0) * signs
    scores = [torch.stack([one, -one], dim=1) for one in (strong, strong, weak)]
    shares = pick(scores, y)
    assert set(shares) == {0, 2}
    assert sum(shares.values()) == pytest.approx(1)


def test_an_average_of_maps_is_the_average_of_their_scores() -> None:
    """Members on a mean and on a concatenation become one map on all columns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 6, generator=generator)
    columns = [torch.arange(3), torch.arange(3, 6)]
    mean, concat = (
        LinearMap(weight=torch.randn(2, k, generator=generator), bias=torch.ones(2)) for k in (3, 6)
    )
    maps = [spread(mean, "mean", columns, 6), spread(concat, "concat", columns[::-1], 6)]
    expected = 0.5 * mean.scores((x[:, :3] + x[:, 3:]) / 2)
    expected = expected + 2 * concat.scores(torch.cat([x[:, 3:], x[:, :3]], dim=1))
    torch.testing.assert_close(average(maps, [0.5, 2.0]).scores(x), expected)


def test_the_base_is_solved_on_all_rows_and_held_out_on_each(make_cache: MakeCache) -> None:
    """Every training row has held-out logits, which the classifier of all rows would not give."""
    config = FitConfig(cache=str(make_cache()))
    data = load(config)
    base = solve_base(config.plan().method, data)
    seen = base.linear.scores(data.x)
    assert base.held_out.shape == seen.shape
    closest = (base.held_out - seen).abs().amax(dim=1).min()
    assert closest > 0
    assert (base.held_out.argmax(dim=1) == data.y).float().mean() > 0.8


@pytest.mark.parametrize(("n_rows", "folds"), [(90, 10), (2100, 5)])
def test_watched_rows_are_judged_by_as_many_rows_as_there_are(
    make_cache: MakeCache, n_rows: int, folds: int
) -> None:
    """Where folds hold out more than is watched, it is judged by a stack of all other rows."""
    cache = make_cache({"train": clustered(n_rows, 0), "test": clustered(60, 1)})
    config = FitConfig(cache=str(cache))
    data, method = load(config), config.plan().method
    shares = data.shares
    rows = np.concatenate([shares.train, shares.validation])
    whole = dataclasses.replace(shares, train=rows, validation=shares.validation[:0])
    grid = grid_of(method, dataclasses.replace(data, shares=whole), method.seed)
    assert len(grid.folds) == folds
    stack = stack_of(grid)
    expected = torch.stack([one.weight * found.scores for one, found in stack.items()]).sum(dim=0)
    if folds == 5:
        others = grid_of(method, data, method.seed)  # the rows that train
        maps = [
            spread(
                others.judge_again(one).solve(),
                one.fusion,
                [others.columns([k]) for k in one.features],
                data.x.shape[1],
            )
            for one in stack
        ]
        factors = [one.weight / found.temperature for one, found in stack.items()]
        expected[shares.validation] = (
            average(maps, factors).scores(data.x[shares.validation]).float()
        )
    found = solve_base(method, data).held_out
    ratio = expected[rows].norm() / found[rows].norm()  # the temperature
    torch.testing.assert_close(found[rows] * ratio, expected[rows], atol=1e-4, rtol=1e-4)


def test_the_base_predicts_where_nothing_is_held_out(make_cache: MakeCache) -> None:
    """A run of cooc with untrained co-occurrences is its base, and loads as such."""
    cache = make_cache({"train": clustered(90, 0), "test": clustered(60, 1)})
    output = str(cache.parent / "run")
    run = fit(FitConfig(cache=str(cache), output=output, epochs=1, lr=1e-9))
    classifier = load_run(run.path).classifier
    x = read_features(open_cache(cache)["test"], run.features)
    assert classifier.base is not None
    standardised = classifier.standardise(x)
    logits = classifier.base(standardised) / classifier.temperature
    torch.testing.assert_close(classifier(x), logits, atol=1e-4, rtol=1e-4)
    hits = (logits.argmax(dim=1).numpy() == open_cache(cache)["test"].labels).mean()
    assert run.metrics["accuracy"] == pytest.approx(np.float64(hits))


def test_what_a_stack_was_judged_as_holds_for_its_seed(make_cache: MakeCache) -> None:
    """Of two seeds the first has the stack that the sweep judged; the other judges it again."""
    cache = make_cache({"train": clustered(90, 0), "test": clustered(60, 1)})
    config = FitConfig(cache=str(cache), fusion="auto", n_seeds=2)
    data = load(config)
    method = config.plan().method
    chosen = choose_fusion(method, data)
    judged = [member.weight * one.scores for member, one in chosen.members.items()]
    first, second = (
        train_stack(chosen.method, chosen.data, chosen.members, seed) for seed in (0, 1)
    )
    held_out = torch.stack(judged).sum(dim=0).argmax(dim=1) == data.y
    assert first.details["held_out_accuracy"] == pytest.approx(held_out.float().mean().item())
    assert second.details["n_members"] == first.details["n_members"] == len(judged)
