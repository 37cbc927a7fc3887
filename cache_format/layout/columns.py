"""The two columns a split starts with: class labels and text hashes.

They are written whole before any feature and proved by the digests in the root document.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmembed.cache_format.layout.arrays import StoredArray
from llmembed.cache_format.layout.chunks import digest, encode
from llmembed.cache_format.layout.documents import (
    DOCUMENT,
    ArrayInfo,
    array_document,
    group_document,
    parse_array,
    put_document,
)
from llmembed.cache_format.layout.schema import MAX_COLUMN_ROWS, SplitInfo, column_rows
from llmembed.cache_format.stores.base import Store
from llmembed.common.errors import CacheCorruptError, CacheMismatchError, DataError

LABEL = "label"
TEXT_HASH = "text_hash"
SHARD_BLOCKS = 64
"""Chunks of a shard of an archive."""
_FREE_ROWS = SHARD_BLOCKS * MAX_COLUMN_ROWS
"""4,194,304: what may be claimed without a file, so that damage is named one by one."""
_DTYPES = {LABEL: "int32", TEXT_HASH: "uint64"}


def split_info(labels: NDArray[np.int32], text_hash: NDArray[np.uint64]) -> SplitInfo:
    """Describe a split by its columns."""
    return SplitInfo(n_rows=len(labels), texts=digest(text_hash), labels=digest(labels))


def checked_columns(
    split: str, labels: NDArray[Any], text_hash: NDArray[Any], n_classes: int
) -> dict[str, NDArray[Any]]:
    """Validate the columns of a split.

    Returns:
        label int32 `[N]` and text_hash uint64 `[N]`, little-endian.

    Raises:
        DataError: if their lengths differ or a label is out of range.
    """
    labels, text_hash = np.asarray(labels), np.asarray(text_hash)
    if labels.ndim != 1 or labels.shape != text_hash.shape:
        raise DataError(
            f"split {split!r} has labels of shape {labels.shape} and text hashes of shape "
            f"{text_hash.shape}; one of each belongs to every example. Pass equal lengths."
        )
    if len(labels) and not -1 <= labels.min() <= labels.max() < n_classes:
        wrong = np.flatnonzero((labels < -1) | (labels >= n_classes))
        raise DataError(
            f"split {split!r} has label {labels[wrong[0]]} in row {wrong[0]}; with {n_classes} "
            f"classes, 0 to {n_classes - 1} are allowed, and -1 for unlabelled. Correct the label."
        )
    return {
        LABEL: labels.astype("<i4", copy=False),
        TEXT_HASH: text_hash.astype("<u8", copy=False),
    }


def require_rows(store: Store, split: str, n_rows: int) -> None:
    """Refuse a claim of millions of rows for which there are no files, before work is done for it.

    Raises:
        CacheCorruptError: naming both numbers.
    """
    if n_rows <= _FREE_ROWS:
        return
    key = f"{split}/{TEXT_HASH}"
    n_chunks, n_shards = len(store.sizes(key)), len(store.sizes(f"{key}/c"))
    most = _FREE_ROWS + MAX_COLUMN_ROWS * (n_chunks + SHARD_BLOCKS * n_shards)
    if n_rows > most:
        raise CacheCorruptError(
            f"{store.location}: split {split!r} claims {n_rows:,} rows, and the files of "
            f"{TEXT_HASH} hold {most:,} at most. Restore the cache from a copy, or extract it "
            "again."
        )


def read_column(store: Store, split: str, name: str, info: SplitInfo) -> NDArray[Any]:
    """Read label or text_hash, `[N]`, verified by its digest.

    Raises:
        CacheCorruptError: if the values are not those the root document states.
    """
    require_rows(store, split, info.n_rows)
    key = f"{split}/{name}"
    array = StoredArray(store, key, info.n_rows)
    if array.info.dtype != _DTYPES[name] or len(array.info.shape) != 1:
        array.require(_DTYPES[name], ())
    values = array.read()
    if digest(values) != (info.labels if name == LABEL else info.texts):
        raise CacheCorruptError(
            f"{store.location}/{key}: the values are not those that zarr.json states. Extract the "
            "cache again."
        )
    return values


def write_columns(
    store: Store, split: str, columns: dict[str, NDArray[Any]], n_rows_before: int
) -> None:
    """Write label and text_hash from the first chunk that changes.

    Args:
        store: where the cache lies.
        split: the split's name.
        columns: the whole columns.
        n_rows_before: rows that are there already, 0 for a new split.
    """
    for name, values in columns.items():
        key = f"{split}/{name}"
        info = _column_info(store, key, name, len(values))
        first = n_rows_before // info.chunk_rows
        for index in range(first, info.n_chunks):
            rows = values[index * info.chunk_rows : (index + 1) * info.chunk_rows]
            store.put(f"{key}/{info.chunk_key(index)}", encode(info, rows))
        put_document(store, f"{key}/{DOCUMENT}", array_document(info))
    put_document(store, f"{split}/{DOCUMENT}", group_document({}))


def check_prefix(store: Store, split: str, info: SplitInfo, given: dict[str, NDArray[Any]]) -> None:
    """Refuse columns that do not begin with the stored ones.

    Raises:
        CacheMismatchError: naming the first differing row and both values.
    """
    if len(given[LABEL]) < info.n_rows:
        raise CacheMismatchError(
            f"split {split!r} of {store.location} has {info.n_rows} rows, but "
            f"{len(given[LABEL])} were given. Give the same data set, with more rows at its end "
            "if it grew, or use another --cache."
        )
    for name, values in given.items():
        stored = read_column(store, split, name, info)
        differing = np.flatnonzero(stored != values[: info.n_rows])
        if len(differing):
            row = int(differing[0])
            raise CacheMismatchError(
                f"row {row} of split {split!r}: {store.location} has {name} {stored[row]}, but "
                f"{values[row]} was given ({len(differing)} of {info.n_rows} rows differ). Give "
                "the same data set in the same order, or use another --cache."
            )


def _column_info(store: Store, key: str, name: str, n_rows: int) -> ArrayInfo:
    data = store.get(f"{key}/{DOCUMENT}")
    if data is not None:
        return replace(parse_array(data, f"{store.location}/{key}/{DOCUMENT}"), shape=(n_rows,))
    return ArrayInfo(shape=(n_rows,), chunk_rows=column_rows(n_rows), dtype=_DTYPES[name])
