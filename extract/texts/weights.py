"""Weights and groups of rows: how much each example counts, and which belong together."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from llmembed.cache_format.writing import check_weights
from llmembed.common.errors import DataError
from llmembed.common.scratch import column_array
from llmembed.extract.texts.columns import as_labels


def weights_of(split: str, name: str, column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Read a column of numbers, or of texts that are numbers, as weights, float32 `[N]`.

    Raises:
        DataError: a weight is missing, no number, negative, not finite, or all of them are 0.

    >>> weights_of("train", "w", pa.chunked_array([["1", "0.5"]])).tolist()
    [1.0, 0.5]
    """
    plain = as_labels(f"split {split!r}", name, column)
    numbers = column_array(len(plain), np.float64)
    row = 0
    for chunk in plain.chunks:
        for value in chunk.to_pylist():
            numbers[row] = _number(split, row, name, value)
            row += 1
    check_weights(split, numbers)
    return numbers.astype(np.float32)


def groups_of(split: str, name: str, column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Read a column of any single values as groups: xxh3-64 of each as text, uint64 `[N]`.

    Raises:
        DataError: a group is missing, or the column holds lists or objects.

    >>> groups = groups_of("train", "author", pa.chunked_array([["ann", "bob", "ann"]]))
    >>> (groups == groups[0]).tolist()
    [True, False, True]
    """
    plain = as_labels(f"split {split!r}", name, column)
    if pa.types.is_nested(plain.type):
        raise DataError(
            f"split {split!r}: column {name!r} holds {plain.type}; a group is one value, such as a "
            "text or a number. Name another column with --group-column."
        )
    groups, n_before = column_array(len(plain), np.uint64), 0
    for chunk in plain.chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        texts = [
            None if _is_nothing(value) else str(value) for value in encoded.dictionary.to_pylist()
        ]
        indices = encoded.indices.cast(pa.int64()).fill_null(len(texts)).to_numpy()
        is_missing = np.array([text is None for text in (*texts, None)])[indices]
        if is_missing.any():
            row = n_before + int(np.argmax(is_missing))
            raise DataError(
                f"split {split!r}, row {row}: the group in column {name!r} is missing. Give the "
                "row a group of its own, or leave it out."
            )
        hashes = [xxhash.xxh3_64_intdigest((text or "").encode()) for text in (*texts, None)]
        groups[n_before : n_before + len(chunk)] = np.array(hashes, np.uint64)[indices]
        n_before += len(chunk)
    return groups


def _number(split: str, row: int, name: str, value: object) -> float:
    if _is_nothing(value) and not isinstance(value, float):  # NaN is refused as what it is
        raise DataError(
            f"split {split!r}, row {row}: the weight in column {name!r} is missing. Write a "
            "number, such as 1."
        )
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise DataError(
        f"split {split!r}, row {row}: the weight in column {name!r} is {value!r}, which is no "
        "number. Write a number, or name another column with --weight-column."
    )


def _is_nothing(value: object) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (isinstance(value, str) and not value.strip())
