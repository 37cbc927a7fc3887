from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmembed.extract.features.batching import (
    N_SHAPES,
    padding_share,
    plan_batches,
    plan_packed,
    positions_of,
    step_of,
)

LENGTHS = st.lists(st.integers(1, 600), max_size=200)
BUDGET = st.integers(1, 2048)
COST = st.integers(0, 300)
SST2 = [7, 9, 12, 9, 20, 11, 31, 3, 11, 14, 5, 20, 8, 7, 8, 3, 2, 7, 3, 33, 12, 26, 5, 10, 15, 12]
R8 = [70, 235, 59, 120, 53, 279, 227, 70, 72, 30, 74, 53, 95, 92, 446, 219, 73, 45, 27, 192, 512]
"""Tokens of the first texts, and of R8 one of those that are cut."""


@given(LENGTHS, BUDGET, COST)
def test_every_text_is_in_one_batch(lengths: list[int], budget: int, cost: int) -> None:
    """The batches together hold each text exactly once."""
    batches = plan_batches(lengths, budget, cost)
    chosen = sorted(int(index) for batch in batches for index in batch)
    assert chosen == list(range(len(lengths)))


@given(LENGTHS, BUDGET, COST)
def test_a_batch_keeps_to_the_budget(lengths: list[int], budget: int, cost: int) -> None:
    """Padded, a batch stays within the budget unless it is one text that alone exceeds it."""
    for batch in plan_batches(lengths, budget, cost):
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1


@given(LENGTHS, BUDGET, COST)
def test_the_longest_texts_come_first(lengths: list[int], budget: int, cost: int) -> None:
    """Lengths never grow from one batch to the next, so memory runs out at once or not at all."""
    order = [lengths[index] for batch in plan_batches(lengths, budget, cost) for index in batch]
    assert order == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 30), st.integers(0, 20))
def test_no_way_to_cut_the_sorted_texts_costs_less(
    lengths: list[int], budget: int, cost: int
) -> None:
    """Of all cuts between different lengths, each batch of a bucket padded to its longest."""
    batches = plan_batches(lengths, budget, cost)
    found = sum(len(batch) * max(lengths[index] for index in batch) + cost for batch in batches)
    order = sorted(lengths, reverse=True)
    inner = [at for at in range(1, len(order)) if order[at] != order[at - 1]]
    for chosen in itertools.product([False, True], repeat=len(inner)):
        cuts = [0, *itertools.compress(inner, chosen), len(order)]
        assert found <= sum(
            (stop - start) * order[start]
            + cost * math.ceil((stop - start) / max(1, budget // order[start]))
            for start, stop in itertools.pairwise(cuts)
        )


@pytest.mark.parametrize("budget", [512, 16_384])
def test_many_texts_are_padded_little(budget: int) -> None:
    """2,000 texts of ordinary lengths leave less than 2 % of the positions to padding."""
    lengths = np.random.default_rng(0).lognormal(4.5, 0.7, 2000).astype(int).clip(1, 512).tolist()
    assert padding_share(lengths, plan_batches(lengths, budget, 32)) < 0.02


def test_a_large_budget_does_not_pad_a_few_short_texts() -> None:
    """1,024 texts of 3 to 60 tokens: one batch of 16,384 tokens would be more than half padding."""
    lengths = np.random.default_rng(0).lognormal(2.4, 0.6, 1024).astype(int).clip(3, 60).tolist()
    batches = plan_batches(lengths, 16_384, 256)
    assert padding_share(lengths, batches) < 0.15
    assert len(batches) < 10


@given(LENGTHS, BUDGET, st.integers(1, 600))
def test_packs_keep_to_the_budget_and_hold_every_text(
    lengths: list[int], budget: int, step: int
) -> None:
    """Each text is in one pack, longest first; only a text that alone exceeds the budget does."""
    packs = plan_packed(lengths, budget, step)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        tokens = [lengths[index] for index in pack]
        assert tokens == sorted(tokens, reverse=True)
        assert sum(tokens) <= budget or len(pack) == 1
        assert sum(tokens) <= positions_of(sum(tokens), step) <= max(budget, 2 * sum(tokens))


@pytest.mark.parametrize("lengths", [SST2, R8])
@pytest.mark.parametrize("shrunk", [16_384, 8_150, 3_990, 1_024])
def test_compiled_passes_compute_little_for_nothing(lengths: list[int], shrunk: int) -> None:
    """A block of rows takes below 1.1 of its tokens, in two numbers of positions.

    Also of a budget that memory has halved, whose numbers the first one has, too.
    """
    step, draw = step_of(16_384), np.random.default_rng(0).choice
    for n_rows in (1024,) * 20 + (700,):
        block = draw(lengths, n_rows).tolist()
        packs = plan_packed(block, shrunk, step)
        computed = [positions_of(sum(block[index] for index in pack), step) for pack in packs]
        assert sum(computed) < 1.1 * sum(block)
        assert len(set(computed)) <= 2
        assert {size % step for size in computed} == {0}
        assert max(computed) <= step * N_SHAPES
