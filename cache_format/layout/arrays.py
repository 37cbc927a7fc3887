"""Read the rows of one array, block by block, in parallel.

Two kinds exist: plain arrays, whose chunk is a block and is mapped, and exported ones (sharded or
compressed), which zarr-python decodes. Everything above a block is the same for both, so both give
the same answers and the same errors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmembed.cache_format.layout.chunks import Rows, decode, digest
from llmembed.cache_format.layout.documents import ArrayInfo, read_array_info
from llmembed.cache_format.stores.base import Store
from llmembed.cache_format.stores.mapping import can_map
from llmembed.common.errors import (
    CacheCorruptError,
    CacheError,
    CacheFormatError,
    ConfigError,
)

RowSelection: TypeAlias = "slice | Sequence[int] | NDArray[Any]"
_THREADS_PER_CORE = 2  # more than one: they wait for page faults (measured: 5.8 against 5.2 GB/s)
_MAX_THREADS = 16
_FEW = 8  # below an eighth of a block, reading rows costs less than mapping it
_REMOTE_THREADS = 16


class StoredArray:
    """One array of a cache.

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
        self._hashes = hashes
        if self.info.plain and self.info.chunk_rows != self.block_rows:
            raise CacheCorruptError(
                f"{store.location}/{key} has chunks of {self.info.chunk_rows} rows, but was "
                f"committed in blocks of {self.block_rows}. Extract the cache again."
            )

    @property
    def n_blocks(self) -> int:
        """Blocks of the array."""
        return -(-self.n_rows // self.block_rows)

    def require(self, dtype: str, width: tuple[int, ...]) -> None:
        """Refuse an array of another dtype or shape than its group states.

        Raises:
            CacheCorruptError: naming both.
        """
        expected = (self.n_rows, *width)
        if (self.info.dtype, self.info.shape) != (dtype, expected):
            raise CacheCorruptError(
                f"{self.store.location}/{self.key} is {self.info.dtype} {self.info.shape}, but the "
                f"cache states {dtype} {expected}. Extract the cache again."
            )

    def read(self, rows: RowSelection | None = None) -> Rows:
        """Read rows.

        Returns:
            `[n, ...]`: a read-only view of the files where the selection is contiguous and the
            blocks fill whole pages, otherwise a copy.

        Raises:
            CacheCorruptError: if a chunk is missing, truncated or not what was committed.
        """
        if rows is None:
            return self._read_range(0, self.n_rows)
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(self.n_rows)
            return self._read_range(start, max(start, stop))
        return self._take(self._row_numbers(rows))

    def read_into(self, out: Rows, start: int = 0) -> None:
        """Copy rows from `start` on into a contiguous `out`, with several threads.

        One core does not saturate the memory.
        """

        def copy(index: int) -> None:
            first = index * self.block_rows
            low, high = max(first, start), min(first + self.block_rows, start + len(out))
            target = out[low - start : high - start]
            target[...] = self._view(index)[low - first : high - first]
            self._check(index, target)

        indices = range(start // self.block_rows, -(-(start + len(out)) // self.block_rows))
        in_parallel(self.store, copy, indices)

    def block(self, index: int) -> Rows:
        """View the rows of a block, verified if hashes were given."""
        rows = self._view(index)
        self._check(index, rows)
        return rows

    def allocate(self, n_rows: int) -> Rows:
        """Make an uninitialised array for that many rows.

        Raises:
            CacheFormatError: if they exceed the memory.
        """
        return allocate((n_rows, *self.info.shape[1:]), self.info, self.store.location)

    def _read_range(self, start: int, stop: int) -> Rows:
        index = start // self.block_rows
        if start < stop <= (index + 1) * self.block_rows:
            first = index * self.block_rows
            return self.block(index)[start - first : stop - first]
        stop_index = -(-stop // self.block_rows)
        mapped = self._mapped(index, stop_index) if start < stop else None
        if mapped is not None:
            return mapped[start - index * self.block_rows : stop - index * self.block_rows]
        out = self.allocate(stop - start)
        self.read_into(out, start)
        return out

    def _mapped(self, start_index: int, stop_index: int) -> Rows | None:
        """View several blocks, padding included, as one array; None where that cannot be."""
        head_bytes = self.block_rows * self.info.row_bytes
        if not (self.info.plain and can_map(stop_index - start_index, head_bytes)):
            return None
        indices = range(start_index, stop_index)
        keys = [f"{self.key}/{self.info.chunk_key(index)}" for index in indices]
        data = self.store.view_together(keys, self.info.chunk_bytes, head_bytes)
        if not data:
            return None
        rows = np.frombuffer(data, self.info.numpy_dtype).reshape(-1, *self.info.shape[1:])

        def check(index: int) -> None:
            first = (index - start_index) * self.block_rows
            n = min(self.block_rows, self.n_rows - index * self.block_rows)
            self._check(index, rows[first : first + n])

        if self._hashes is not None:
            in_parallel(self.store, check, range(start_index, stop_index))
        return rows

    def _take(self, rows: NDArray[np.int64]) -> Rows:
        out = self.allocate(len(rows))
        block_of_row = rows // self.block_rows
        order = np.argsort(block_of_row, kind="stable")
        for index, places in _groups(block_of_row[order], order):
            wanted = rows[places] - index * self.block_rows
            few = len(wanted) * _FEW < self.block_rows
            if few and self.info.plain and self._hashes is None:
                self._read_few(index, wanted, out, places)
            else:
                out[places] = self.block(index)[wanted]
        return out

    def _read_few(
        self, index: int, wanted: NDArray[np.int64], out: Rows, places: NDArray[np.int64]
    ) -> None:
        row_bytes = out.nbytes // len(out)
        flat = out.data.cast("B")
        starts = (places * row_bytes).tolist()
        self.store.read_pieces(
            f"{self.key}/{self.info.chunk_key(index)}",
            self.info.chunk_bytes,
            (
                (offset, flat[start : start + row_bytes])
                for offset, start in zip((wanted * row_bytes).tolist(), starts, strict=True)
            ),
        )

    def _row_numbers(self, rows: RowSelection) -> NDArray[np.int64]:
        try:
            numbers = np.arange(self.n_rows, dtype=np.int64)[rows]
        except IndexError as error:
            raise ConfigError(
                f"the rows selected of {self.key} do not exist: {error}. It has rows 0 to "
                f"{self.n_rows - 1}."
            ) from error
        return numbers.reshape(-1)

    def _view(self, index: int) -> Rows:
        start = index * self.block_rows
        stop = min(start + self.block_rows, self.n_rows)
        if not self.info.plain:
            return self._decoded(start, stop)
        chunk = self.store.view(f"{self.key}/{self.info.chunk_key(index)}", self.info.chunk_bytes)
        return decode(self.info, chunk)[: stop - start]

    def _decoded(self, start: int, stop: int) -> Rows:
        try:
            rows = np.asarray(self._zarr_array[start:stop])
        except CacheError:
            raise
        except Exception as error:
            # Whatever zarr-python and its codecs come upon in damaged metadata and chunks.
            raise CacheCorruptError(
                f"{self.store.location}/{self.key}, rows {start}-{stop}, cannot be decoded: "
                f"{type(error).__name__}: {str(error)[:200]}. Export the cache again."
            ) from error
        if rows.dtype.kind == "f" and np.isnan(rows).any():  # what a missing shard is filled with
            raise CacheCorruptError(
                f"{self.store.location}/{self.key}, rows {start}-{stop}, holds rows that were not "
                "written: a shard is missing. Export the cache again."
            )
        return rows

    @cached_property
    def _zarr_array(self) -> Any:
        return self.store.open_zarr(self.key)

    def _check(self, index: int, rows: Rows) -> None:
        n = min(self.block_rows, self.n_rows - index * self.block_rows)
        if self._hashes is None:
            return
        whole = rows if len(rows) == n else self._view(index)
        if digest(whole) != self._hashes[index]:
            raise CacheCorruptError(
                f"{self.store.location}/{self.key}, rows {index * self.block_rows}-"
                f"{index * self.block_rows + n}: the bytes are not those that were committed. Find "
                f"all damage with `llmembed-cache verify {self.store.location}` and extract again "
                "what it names."
            )


def allocate(shape: tuple[int, ...], info: ArrayInfo, location: str) -> Rows:
    """Make an uninitialised array; numpy asks for huge pages where torch does not.

    Raises:
        CacheFormatError: if it exceeds the memory.
    """
    try:
        return np.empty(shape, info.numpy_dtype)
    except (MemoryError, ValueError) as error:
        raise CacheFormatError(
            f"{location} states an array of shape {shape}, which does not fit into memory. Read "
            "fewer rows or layers at once, or distrust the cache."
        ) from error


def in_parallel(store: Store, work: Callable[[int], None], indices: Sequence[int]) -> None:
    """Do work for each index, in as many threads as serve the store best.

    Each thread takes every n-th index: a queue of millions of them would fill the memory.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    n_threads = (
        min(_MAX_THREADS, _THREADS_PER_CORE * (cores or 1))
        if store.path is not None
        else _REMOTE_THREADS
    )

    def take_turns(first: int) -> None:
        for index in indices[first::n_threads]:
            work(index)

    with ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(take_turns, range(n_threads)):
            pass


def _groups(
    block_of_row: NDArray[np.int64], order: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    blocks, starts = np.unique(block_of_row, return_index=True)
    stops = [*starts, len(order)][1:]
    for index, start, stop in zip(blocks, starts, stops, strict=True):
        yield int(index), order[start:stop]
