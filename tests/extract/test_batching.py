from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmembed.extract.batching import padding_share, plan_batches

LENGTHS = st.lists(st.integers(1, 600), max_size=200)
BUDGET = st.integers(1, 2048)


@given(LENGTHS, BUDGET)
def test_every_text_is_in_one_batch(lengths: list[int], budget: int) -> None:
    """The batches together hold each text exactly once."""
    batches = plan_batches(lengths, budget)
    chosen = sorted(int(index) for batch in batches for index in batch)
    assert chosen == list(range(len(lengths)))


@given(LENGTHS, BUDGET)
def test_a_batch_keeps_to_the_budget(lengths: list[int], budget: int) -> None:
    """Padded, a batch stays within the budget unless it is one text that alone exceeds it."""
    for batch in plan_batches(lengths, budget):
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1


@given(LENGTHS, BUDGET)
def test_the_longest_texts_come_first(lengths: list[int], budget: int) -> None:
    """Lengths never grow from one batch to the next, so memory runs out at once or not at all."""
    order = [lengths[index] for batch in plan_batches(lengths, budget) for index in batch]
    assert order == sorted(lengths, reverse=True)


def test_many_texts_are_padded_little() -> None:
    """2,000 texts of ordinary lengths leave less than 2 % of the positions to padding."""
    lengths = np.random.default_rng(0).lognormal(4.5, 0.7, 2000).astype(int).clip(1, 512).tolist()
    assert padding_share(lengths, plan_batches(lengths, 1024)) < 0.02
