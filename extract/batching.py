"""Which texts are computed together: batches of similar length, filled to a token budget.

Within a block of rows texts are sorted by their number of tokens, so that a batch is padded little
and the plan depends on nothing but the lengths of that block: a resumed run computes the same
batches as an uninterrupted one, and so the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[npt.NDArray[np.int64]]:
    """Group texts of similar length so that no padded batch exceeds the budget.

    A text that alone exceeds the budget is a batch of its own. The longest come first: if memory
    is too small, that shows at once.

    Args:
        lengths: tokens of each text, each at least 1.
        token_budget: tokens a batch, pads included.

    Returns:
        Indices into `lengths`, int64, one array a batch; together each index once.

    >>> [batch.tolist() for batch in plan_batches([2, 9, 3, 1], token_budget=6)]
    [[1], [2, 0], [3]]
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        stop = start + max(1, token_budget // longest)
        batches.append(order[start:stop])
        start = stop
    return batches


def padding_share(lengths: Sequence[int], batches: Sequence[npt.NDArray[np.int64]]) -> float:
    """Compute which share of all computed positions is padding, in 0..1.

    >>> padding_share([2, 4], [np.array([1, 0])])
    0.25
    """
    counts = np.asarray(lengths)
    computed = sum(int(counts[batch].max()) * len(batch) for batch in batches)
    return 1 - int(counts.sum()) / computed if computed else 0.0
