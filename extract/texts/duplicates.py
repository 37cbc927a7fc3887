"""Texts that stand in a split more than once are computed once, and share one feature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute

from llmembed.extract.texts.corpora import Examples


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentTexts:
    """The different texts of consecutive rows, and where each has its feature from."""

    earlier: npt.NDArray[np.int64]
    """Rows before these ones that have the feature of a text, int64 `[K]`."""
    own: npt.NDArray[np.int64]
    """Offsets of the rows to compute, one for every other text, int64 `[M]`."""
    places: npt.NDArray[np.int64]
    """For each row the place of its text among `earlier`, then `own`, int64 `[N]`."""

    @classmethod
    def among(cls, originals: npt.NDArray[np.int64], start: int, stop: int) -> DifferentTexts:
        """Find the different texts of rows `start` to `stop`.

        Args:
            originals: see `first_occurrences`.
            start: first row.
            stop: row after the last.

        >>> texts = DifferentTexts.among(np.array([0, 1, 1, 3, 0]), 2, 5)
        >>> texts.earlier, texts.own, texts.places
        (array([0, 1]), array([1]), array([1, 2, 0]))
        """
        rows, first, places = np.unique(
            originals[start:stop], return_index=True, return_inverse=True
        )
        n_earlier = int(np.searchsorted(rows, start))
        return cls(earlier=rows[:n_earlier], own=first[n_earlier:], places=places)

    def spread(
        self,
        values: npt.NDArray[Any],
        read_earlier: Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]],
    ) -> npt.NDArray[Any]:
        """Give every row the value of its text.

        Args:
            values: values of the rows to compute, `[M, H]`.
            read_earlier: reads the values of rows, `[K]` -> `[K, H]`.

        Returns:
            `[N, H]`.
        """
        if len(self.earlier):
            values = np.concatenate([read_earlier(self.earlier), values])
        return values[self.places]
