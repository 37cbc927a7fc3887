"""Which texts are computed together: batches of similar length, filled to a token budget.

The plan depends on nothing but the lengths of a block of rows: a resumed run computes the same
batches as an uninterrupted one, and so the same bits.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Batch = npt.NDArray[np.int64]
"""Indices of texts, longest first."""
N_SHAPES = 32
"""Numbers of positions that passes are compiled for, at most, beside those of a few tokens."""


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


def step_of(token_budget: int) -> int:
    """Choose of which number of tokens the positions of compiled passes are multiples.

    It stays the same when the budget shrinks, so that nothing is compiled anew.
    """
    return max(1, token_budget // N_SHAPES)


def plan_packed(lengths: Sequence[int], token_budget: int, step: int = 1) -> list[Batch]:
    """Group texts so that their real tokens fill the budget, for passes without pads.

    Batches are as few as can be, and each is to fill a multiple of `step` tokens, of which there
    are two next to each other: so a compiled pass has few shapes, and they are full.

    >>> [batch.tolist() for batch in plan_packed([3, 9, 3, 1], token_budget=7)]
    [[1], [0, 2, 3]]
    """
    while step > token_budget:
        step = max(1, step // 2)
    whole = token_budget // step
    order = _longest_first(lengths).tolist()
    n_alone = sum(length > whole * step for length in lengths)
    alone, others = order[:n_alone], order[n_alone:]
    n_steps = -(-sum(lengths[index] for index in others) // step)
    for spare in range(4):
        filled = _fill(others, lengths, n_steps + spare * (1 + n_steps // 100), whole, step)
        if filled is not None:
            break
    else:
        filled = _one_by_one(others, lengths, whole * step)
    batches = [[index] for index in alone] + filled
    return [np.array(batch, dtype=np.int64) for batch in batches if batch]


def _one_by_one(order: Sequence[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    """Fill a batch, then the next: for texts of which a few take most of a batch."""
    batches: list[list[int]] = []
    free = 0
    for index in order:
        if lengths[index] > free:
            batches.append([])
            free = room
        batches[-1].append(index)
        free -= lengths[index]
    return batches


def _fill(
    order: Sequence[int], lengths: Sequence[int], n_steps: int, whole: int, step: int
) -> list[list[int]] | None:
    """Share so many steps among batches of `whole` steps at most; None if the texts do not fit.

    Each text goes where most is free: the last and shortest even out what the long ones left.
    """
    n_batches = -(-n_steps // whole)
    batches: list[list[int]] = [[] for _ in range(n_batches)]
    free = [
        (-step * (n_steps // n_batches + (at < n_steps % n_batches)), at) for at in range(n_batches)
    ]
    for index in order:
        most, at = free[0]
        if lengths[index] > -most:
            return None
        heapq.heapreplace(free, (most + lengths[index], at))
        batches[at].append(index)
    return batches


def positions_of(n_tokens: int, step: int) -> int:
    """Round tokens up to a multiple of `step`, or to a half, quarter ... of one: few numbers.

    >>> [positions_of(n, 128) for n in (3, 60, 65, 129, 1000)]
    [4, 64, 128, 256, 1024]
    """
    while step // 2 >= n_tokens:
        step //= 2
    return -(-n_tokens // step) * step


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
