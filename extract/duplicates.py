"""Texts that stand in a block more than once are computed once, and share one feature."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmembed.extract.corpora import Examples


def first_occurrences(
    examples: Examples, rows: slice
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the different texts among consecutive rows.

    The texts themselves are compared, not their hashes.

    Args:
        examples: the split.
        rows: N of its rows.

    Returns:
        Offsets of the first of each text, int64 `[M]`, ascending; and for each of the N rows the
        place of its text among those, int64 `[N]`.

    >>> import pyarrow as pa
    >>> texts = pa.chunked_array([["x", "b", "a", "b"]])
    >>> examples = Examples(texts=texts, labels=np.zeros(4, np.int32))
    >>> first_occurrences(examples, slice(1, 4))
    (array([0, 1]), array([0, 1, 0]))
    """
    encoded = examples.texts[rows].combine_chunks().dictionary_encode()
    places = encoded.indices.to_numpy().astype(np.int64)  # numbered in order of appearance
    return np.unique(places, return_index=True)[1], places
