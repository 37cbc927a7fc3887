"""Texts that stand in a split more than once are computed once, and share one feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute

from llmembed.extract.corpora import Examples


def first_occurrences(examples: Examples) -> npt.NDArray[np.int64]:
    """Find for each row the first row of the split with the same text.

    Equal hashes only nominate; the texts themselves decide.

    Returns:
        int64 `[N]`, at most the row itself.
    """
    _, first, inverse = np.unique(examples.text_hash, return_index=True, return_inverse=True)
    rows = np.arange(len(examples))
    originals = first[inverse]
    nominated = np.flatnonzero(originals != rows)
    if len(nominated):
        same = pyarrow.compute.equal(
            examples.texts.take(nominated), examples.texts.take(originals[nominated])
        )
        collided = nominated[~same.to_numpy()]
        originals[collided] = collided
    return originals


def spread(
    values: npt.NDArray[Any],
    rows: npt.NDArray[np.int64],
    originals: npt.NDArray[np.int64],
    read_earlier: Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]],
) -> npt.NDArray[Any]:
    """Give every row of a block the value of its original.

    Args:
        values: values of the rows that are their own original, `[M, H]`.
        rows: row numbers of the block, consecutive, int64 `[N]`.
        originals: row number of each row's original, int64 `[N]`.
        read_earlier: reads the values of rows before the block, `[K]` -> `[K, H]`.

    Returns:
        `[N, H]`.

    >>> rows, originals = np.array([4, 5, 6]), np.array([4, 1, 4])
    >>> spread(np.array([[40]]), rows, originals, lambda earlier: earlier[:, None] * 10).ravel()
    array([40, 10, 40])
    """
    spread_out = np.empty((len(rows), *values.shape[1:]), dtype=values.dtype)
    inside = originals >= rows[0]
    own = rows[originals == rows]
    spread_out[inside] = values[np.searchsorted(own, originals[inside])]
    if not inside.all():
        spread_out[~inside] = read_earlier(originals[~inside])
    return spread_out
