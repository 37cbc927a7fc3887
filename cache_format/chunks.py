"""Rows to the bytes of a chunk and back.

A chunk file is raw little-endian rows, padded to full size with the fill value, and four bytes of
crc32c: any Zarr reader decodes it, and we map it. What was committed is proved by the xxh3-128 of
its rows, which the commit record holds (28 GB/s on one core, where crc32c reaches 6); the crc
protects readers that know no records.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray

from llmembed.cache_format.documents import CRC_BYTES, FILL_VALUES, ArrayInfo
from llmembed.cache_format.errors import CacheCorruptError
from llmembed.cache_format.store import Buffer, Store

Rows: TypeAlias = NDArray[Any]


def digest(rows: Rows) -> str:
    """xxh3-128 of the rows' bytes.

    >>> digest(np.zeros((0, 4), np.float16))
    '99aa06d3014798d86001c324468d497f'
    """
    return xxhash.xxh3_128_hexdigest(_bytes(rows))


def encode(info: ArrayInfo, rows: Rows) -> list[Buffer]:
    """Split a chunk into the parts to write: rows, padding, crc32c.

    Args:
        info: the array; its dtype is that of `rows`.
        rows: contiguous `[n, ...]` with n <= `info.chunk_rows`.
    """
    missing = info.chunk_rows - len(rows)
    fill = float("nan") if FILL_VALUES[info.dtype] == "NaN" else FILL_VALUES[info.dtype]
    padding = np.full((missing, *info.shape[1:]), fill, info.numpy_dtype)
    crc = google_crc32c.extend(google_crc32c.extend(0, rows), padding)
    return [_bytes(rows), _bytes(padding), int(crc).to_bytes(CRC_BYTES, "little")]


def decode(info: ArrayInfo, chunk: Buffer) -> Rows:
    """View a chunk's rows, padding included: `[chunk_rows, ...]`, read-only, no copy."""
    shape = (info.chunk_rows, *info.shape[1:])
    return np.frombuffer(chunk, info.numpy_dtype, count=math.prod(shape)).reshape(shape)


def crc_holds(info: ArrayInfo, chunk: Buffer) -> bool:
    """Tell whether a chunk's crc32c is that of its bytes, padding included."""
    stored = int.from_bytes(bytes(chunk[-CRC_BYTES:]), "little")
    return bool(google_crc32c.extend(0, decode(info, chunk)) == stored)


def read_rows(
    store: Store, key: str, info: ArrayInfo, n_rows: int, hashes: Sequence[str | None] | None = None
) -> Rows:
    """Read the first rows of a plain array.

    One chunk is returned as it is mapped; more are copied by several threads, since one core does
    not saturate the memory.

    Args:
        store: where the array lies.
        key: its key.
        info: its document.
        n_rows: how many rows to read.
        hashes: `digest` of each chunk's rows, to verify them; None to trust.

    Returns:
        `[n_rows, ...]` of the array's dtype; read-only if it is a view.

    Raises:
        CacheCorruptError: if a chunk is missing, truncated or not what was committed.
    """
    n_chunks = -(-n_rows // info.chunk_rows)
    if n_chunks == 1:
        rows = view_chunk(store, key, info, 0)[:n_rows]
        _check(store, key, info, 0, rows, hashes)
        return rows
    out = np.empty((n_rows, *info.shape[1:]), info.numpy_dtype)
    fill_rows(store, key, info, out, hashes)
    return out


def fill_rows(
    store: Store,
    key: str,
    info: ArrayInfo,
    out: Rows,
    hashes: Sequence[str | None] | None = None,
) -> None:
    """Copy the first rows of a plain array into a contiguous `out`, in parallel."""

    def copy(index: int) -> None:
        start = index * info.chunk_rows
        target = out[start : start + info.chunk_rows]
        target[...] = view_chunk(store, key, info, index)[: len(target)]
        _check(store, key, info, index, target, hashes)

    n_chunks = -(-len(out) // info.chunk_rows)
    with ThreadPoolExecutor(_n_threads(store)) as pool:
        for _ in pool.map(copy, range(n_chunks)):
            pass


def take_rows(
    store: Store,
    key: str,
    info: ArrayInfo,
    rows: NDArray[np.int64],
    hashes: Sequence[str | None] | None = None,
) -> Rows:
    """Copy chosen rows of a plain array, each touched chunk mapped once.

    Args:
        store: where the array lies.
        key: its key.
        info: its document.
        rows: row numbers >= 0, in any order.
        hashes: `digest` of each chunk's rows, to verify the touched ones.
    """
    out = np.empty((len(rows), *info.shape[1:]), info.numpy_dtype)
    chunk_of_row = rows // info.chunk_rows
    order = np.argsort(chunk_of_row, kind="stable")
    for index, places in _groups(chunk_of_row[order], order):
        chunk = view_chunk(store, key, info, index)
        if hashes is not None:
            stop = min(info.chunk_rows, info.shape[0] - index * info.chunk_rows)
            _check(store, key, info, index, chunk[:stop], hashes)
        out[places] = chunk[rows[places] - index * info.chunk_rows]
    return out


def view_chunk(store: Store, key: str, info: ArrayInfo, index: int) -> Rows:
    """View one chunk of a plain array, padding included."""
    return decode(info, store.view(f"{key}/{info.chunk_key(index)}", info.chunk_bytes))


def _groups(
    chunk_of_row: NDArray[np.int64], order: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    chunks, starts = np.unique(chunk_of_row, return_index=True)
    stops = [*starts[1:], len(order)]
    for index, start, stop in zip(chunks, starts, stops, strict=False):
        yield int(index), order[start:stop]


def _check(
    store: Store,
    key: str,
    info: ArrayInfo,
    index: int,
    rows: Rows,
    hashes: Sequence[str | None] | None,
) -> None:
    if hashes is not None and digest(rows) != hashes[index]:
        raise CacheCorruptError(
            f"{store.location}/{key}/{info.chunk_key(index)}: the bytes are not those that were "
            f"committed. Find all damage with `llmembed-cache verify {store.location}` and "
            "extract again what it names."
        )


def _bytes(rows: Rows) -> memoryview:
    flat: Any = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    return memoryview(flat)


def _n_threads(store: Store) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cores or 1)) if store.path is not None else 16
