"""Which texts are computed together: batches of similar length, filled to a token budget.

The plan depends on nothing but the lengths of a block of rows: a resumed run computes the same
batches as an uninterrupted one, and so the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Batch = npt.NDArray[np.int64]
"""Indices of texts, longest first."""


def plan_batches(lengths: Sequence[int], token_budget: int, batch_cost: int = 0) -> list[Batch]:
    """Group texts of similar length so that no padded batch exceeds the budget.

    A text that alone exceeds the budget is a batch of its own. The longest come first: if memory
    is too small, that shows at once. `batch_cost` is how many padded tokens are worth one batch
    less; 0 pads nothing.

    >>> [batch.tolist() for batch in plan_batches([3, 9, 3, 1], token_budget=6, batch_cost=1)]
    [[1], [0, 2], [3]]
    """
    order = _longest_first(lengths)
    batches = []
    for start, stop in _buckets(np.asarray(lengths, dtype=np.int64), token_budget, batch_cost):
        step = max(1, token_budget // int(lengths[order[start]]))
        batches += [order[first : min(first + step, stop)] for first in range(start, stop, step)]
    return batches


def plan_packed(lengths: Sequence[int], token_budget: int) -> list[Batch]:
    """Group texts so that their real tokens fill the budget, for passes without pads.

    >>> [batch.tolist() for batch in plan_packed([3, 9, 3, 1], token_budget=7)]
    [[1], [0, 2, 3]]
    """
    batches: list[list[int]] = []
    free = 0
    for index in _longest_first(lengths):
        if lengths[index] > free:
            batches.append([])
            free = max(token_budget, lengths[index])
        batches[-1].append(int(index))
        free -= lengths[index]
    return [np.array(batch, dtype=np.int64) for batch in batches]


def _longest_first(lengths: Sequence[int]) -> Batch:
    return np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")


def _buckets(
    lengths: npt.NDArray[np.int64], token_budget: int, batch_cost: int
) -> Iterator[tuple[int, int]]:
    """Cut the sorted texts, longest first, where that costs least: (start, stop) of each bucket.

    Dynamic programming over the distinct lengths: the cheapest way to serve all texts longer than
    a length is the cheapest over where its last bucket begins.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    distinct = distinct[::-1]
    bounds = np.concatenate([[0], np.cumsum(counts[::-1])])  # texts before each distinct length
    cheapest = np.zeros(len(bounds))
    cheapest[1:] = np.inf
    begins = np.zeros(len(bounds), dtype=np.int64)
    for begin, longest in enumerate(distinct):
        n_texts = bounds[begin + 1 :] - bounds[begin]
        n_batches = -(-n_texts // max(1, token_budget // longest))
        cost = cheapest[begin] + n_texts * longest + batch_cost * n_batches
        better = np.flatnonzero(cost < cheapest[begin + 1 :]) + begin + 1
        cheapest[better] = cost[better - begin - 1]
        begins[better] = begin
    ends = [len(distinct)]
    while ends[-1] > 0:
        ends.append(int(begins[ends[-1]]))
    for end, begin in zip(ends[-2::-1], ends[:0:-1], strict=True):
        yield int(bounds[begin]), int(bounds[end])


def padding_share(lengths: Sequence[int], batches: Sequence[Batch]) -> float:
    """Compute which share of all computed positions is padding, in 0..1.

    >>> padding_share([2, 4], [np.array([1, 0])])
    0.25
    """
    counts = np.asarray(lengths)
    computed = sum(int(counts[batch].max()) * len(batch) for batch in batches)
    return 1 - int(counts.sum()) / computed if computed else 0.0
