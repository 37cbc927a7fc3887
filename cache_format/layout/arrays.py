"""The rows of one array: their bytes in a chunk, and reading them block by block, in parallel.

A chunk file is raw little-endian rows, padded to full size with the fill value, and four bytes of
crc32c: any Zarr reader decodes it, and we map it. What was committed is proved by the xxh3-128 of
its rows, which the commit record holds (28 GB/s on one core, where crc32c reaches 6); the crc
protects readers that know no records.

Exported arrays (sharded or compressed) are decoded by zarr-python. Everything above a block is the
same for both kinds, so both give the same answers and the same errors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import google_crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray

from llmembed.cache_format.layout.documents import CRC_BYTES, ArrayInfo, read_array_info
from llmembed.cache_format.layout.schema import (
    GROUP,
    LABEL,
    LABEL_SETS,
    MAX_COLUMN_ROWS,
    TEXT_HASH,
    WEIGHT,
    Header,
)
from llmembed.cache_format.stores import Buffer, LocalStore, Store
from llmembed.common.errors import CacheCorruptError, CacheError, CacheFormatError, ConfigError

Rows: TypeAlias = NDArray[Any]
RowSelection: TypeAlias = "slice | Sequence[int] | NDArray[Any]"
SHARD_BLOCKS = 64  # chunks of a shard of an archive
COLUMN_DTYPES = {
    LABEL: "int32",
    TEXT_HASH: "uint64",
    LABEL_SETS: "int8",
    WEIGHT: "float32",
    GROUP: "uint64",
}
_FREE_ROWS = SHARD_BLOCKS * MAX_COLUMN_ROWS  # may be claimed without a file: damage is named singly
_THREADS_PER_CORE = 2  # more than one: they wait for page faults (measured: 5.8 against 5.2 GB/s)
_MAX_THREADS = 16
_T = TypeVar("_T")
_R = TypeVar("_R")


def digest(rows: Rows) -> str:
    """xxh3-128 of the rows' bytes.

    >>> digest(np.zeros((0, 4), np.float16))
    '99aa06d3014798d86001c324468d497f'
    """
    return xxhash.xxh3_128_hexdigest(_bytes(rows))


def encode(info: ArrayInfo, rows: Rows) -> list[Buffer]:
    """Make the parts of a chunk: contiguous rows `[n, ...]` of the array's dtype, padding, crc."""
    shape = (info.chunk_rows - len(rows), *info.shape[1:])
    padding = np.full(shape, info.fill_value, info.numpy_dtype)
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


class StoredArray:
    """One array of a cache; a chunk that is missing or not what was committed is an error.

    Args:
        store: where the cache lies.
        key: the array's key.
        n_rows: N, as the root document states it.
        block_rows: R; None takes the array's own chunks, for columns.
        hashes: `digest` of each block's rows, by its number, to verify what is read; None to trust.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        n_rows: int,
        *,
        block_rows: int | None = None,
        hashes: Sequence[str | None] | Mapping[int, str | None] | None = None,
    ) -> None:
        self.store = store
        self.key = key
        self.info = read_array_info(store, key)
        self.n_rows = n_rows
        self.block_rows = block_rows or self.info.chunk_rows
        self.n_blocks = -(-n_rows // self.block_rows)
        self._hashes = hashes
        if self.info.plain and self.info.chunk_rows != self.block_rows:
            raise CacheCorruptError(
                f"{store.location}/{key} has chunks of {self.info.chunk_rows} rows, but was "
                f"committed in blocks of {self.block_rows}. Extract the cache again."
            )

    def require(self, dtype: str, width: tuple[int, ...]) -> None:
        """Refuse an array of another dtype or shape than its group states, naming both."""
        expected = (self.n_rows, *width)
        if (self.info.dtype, self.info.shape) != (dtype, expected):
            raise CacheCorruptError(
                f"{self.store.location}/{self.key} is {self.info.dtype} {self.info.shape}, but the "
                f"cache states {dtype} {expected}. Extract the cache again."
            )

    def read(self, rows: RowSelection | None = None) -> Rows:
        """Read rows `[n, ...]`, None is all: a read-only view where they lie in whole pages."""
        if rows is None:
            return self._read_range(0, self.n_rows)
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(self.n_rows)
            return self._read_range(start, max(start, stop))
        try:
            numbers = np.arange(self.n_rows, dtype=np.int64)[rows]
        except IndexError as error:
            raise ConfigError(
                f"the rows selected of {self.key} do not exist: {error}. It has rows 0 to "
                f"{self.n_rows - 1}."
            ) from error
        return self._take(numbers.reshape(-1))

    def block(self, index: int) -> Rows:
        """View the rows of a block, verified if hashes were given."""
        rows = self._view(index)
        self._check(index, rows)
        return rows

    def chunk_key(self, index: int) -> str:
        """Key of a chunk."""
        return f"{self.key}/{self.info.chunk_key(index)}"

    def _read_range(self, start: int, stop: int) -> Rows:
        indices = range(start // self.block_rows, -(-stop // self.block_rows))
        begin = indices.start * self.block_rows
        if start < stop and len(indices) == 1:
            return self.block(indices.start)[start - begin : stop - begin]
        mapped = self._mapped(indices) if start < stop else None
        if mapped is None:
            return self._take(np.arange(start, stop))
        return mapped[start - begin : stop - begin]

    def _mapped(self, indices: range) -> Rows | None:
        """View several blocks, padding included, as one array; None where that cannot be."""
        if not (self.info.plain and isinstance(self.store, LocalStore)):
            return None
        keys = [self.chunk_key(index) for index in indices]
        head_bytes = self.block_rows * self.info.row_bytes
        data = self.store.view_together(keys, self.info.chunk_bytes, head_bytes)
        if not data:
            return None
        rows = np.frombuffer(data, self.info.numpy_dtype).reshape(-1, *self.info.shape[1:])

        def check(index: int) -> None:
            first = (index - indices.start) * self.block_rows
            self._check(index, rows[first : first + self._n_rows_of(index)])

        if self._hashes is not None:
            in_parallel(self.store, check, indices)
        return rows

    def _take(self, rows: NDArray[np.int64]) -> Rows:
        out = allocate((len(rows), *self.info.shape[1:]), self.info, self.store.location)
        if not len(rows):
            return out
        order = np.argsort(rows, kind="stable")
        indices, starts = np.unique(rows[order] // self.block_rows, return_index=True)
        places = np.split(order, starts[1:])

        def copy(number: int) -> None:
            wanted = rows[places[number]] - indices[number] * self.block_rows
            out[places[number]] = self.block(int(indices[number]))[wanted]

        in_parallel(self.store, copy, range(len(places)))
        return out

    def _n_rows_of(self, index: int) -> int:
        return min(self.block_rows, self.n_rows - index * self.block_rows)

    def _view(self, index: int) -> Rows:
        start, n = index * self.block_rows, self._n_rows_of(index)
        if self.info.plain:
            chunk = self.store.view(self.chunk_key(index), self.info.chunk_bytes)
            return decode(self.info, chunk)[:n]
        where = f"{self.store.location}/{self.key}, rows {start}-{start + n}"
        try:
            rows = np.asarray(self._zarr_array[start : start + n])
        except CacheError:
            raise
        except Exception as error:
            # Whatever zarr-python and its codecs come upon in damaged metadata and chunks.
            raise CacheCorruptError(
                f"{where}, cannot be decoded: {type(error).__name__}: {str(error)[:200]}. Export "
                "the cache again."
            ) from error
        if rows.dtype.kind == "f" and np.isnan(rows).any():  # what a missing shard is filled with
            raise CacheCorruptError(
                f"{where}, holds rows that were not written: a shard is missing. Export the cache "
                "again."
            )
        return rows

    @cached_property
    def _zarr_array(self) -> Any:
        return self.store.open_zarr(self.key)

    def _check(self, index: int, rows: Rows) -> None:
        if self._hashes is not None and digest(rows) != self._hashes[index]:
            start, location = index * self.block_rows, self.store.location
            raise CacheCorruptError(
                f"{location}/{self.key}, rows {start}-{start + len(rows)}: the bytes are not those "
                f"that were committed. Find all damage with `llmembed-cache verify {location}` and "
                "extract again what it names."
            )


def allocate(shape: tuple[int, ...], info: ArrayInfo, location: str) -> Rows:
    """Make an uninitialised array."""
    try:
        return np.empty(shape, info.numpy_dtype)
    except (MemoryError, ValueError) as error:
        raise CacheFormatError(
            f"{location} states an array of shape {shape}, which does not fit into memory. Read "
            "fewer rows or layers at once, or distrust the cache."
        ) from error


def in_parallel(store: Store, work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Do work for each item, in as many threads as serve the store best."""
    n_threads = _MAX_THREADS
    if store.path is not None:
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        n_threads = min(_MAX_THREADS, _THREADS_PER_CORE * (cores or 1))

    def take_turns(first: int) -> list[_R]:  # a queue of millions of items would fill the memory
        return [work(item) for item in items[first::n_threads]]

    with ThreadPoolExecutor(n_threads) as pool:
        turns = list(pool.map(take_turns, range(n_threads)))
    return [turns[index % n_threads][index // n_threads] for index in range(len(items))]


def require_rows(store: Store, split: str, n_rows: int) -> None:
    """Refuse a claim of millions of rows without files, before work is done for it."""
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


def read_column(store: Store, header: Header, split: str, name: str) -> Rows:
    """Read a column, `[N]` or `[N, C]`, verified by the digest that the root document states."""
    info = header.splits[split]
    require_rows(store, split, info.n_rows)
    array = StoredArray(store, f"{split}/{name}", info.n_rows)
    width = (len(header.dataset.labels),) if name == LABEL_SETS else ()
    if (array.info.dtype, *array.info.shape[1:]) != (COLUMN_DTYPES[name], *width):
        array.require(COLUMN_DTYPES[name], width)
    values = array.read()
    if digest(values) != info.hash_of(name):
        raise CacheCorruptError(
            f"{store.location}/{array.key}: the values are not those that zarr.json states. "
            "Extract the cache again."
        )
    return values


def _bytes(rows: Rows) -> memoryview:
    flat: Any = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    return memoryview(flat)
