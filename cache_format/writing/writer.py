"""Write a cache block by block, so that a kill at any moment costs at most one block.

The order is the whole trick: every chunk of a block, each atomically, then its commit record. A
split exists once the root names it, rows exist once a record names them; what is under neither is
leftover and is written again. There is one writer at a time, or several that share a plan: they
write blocks of arrays that were registered before, each its own, and change nothing else.

One that shares may have its blocks written by other processes. They take no lock but borrow that of
the planner: when it is gone, or another planner's, none of them writes another block.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llmembed.cache_format.layout.arrays import digest, read_column
from llmembed.cache_format.layout.commits import (
    ArrayCommits,
    StoredSource,
    is_half_written,
    read_source,
)
from llmembed.cache_format.layout.schema import (
    GROUP,
    LABEL,
    LABEL_SETS,
    N_TOKENS,
    TEXT_HASH,
    WEIGHT,
    ArrayKey,
    DatasetInfo,
    Header,
    SourceInfo,
    array_name,
    block_rows,
    check_name,
    read_header,
    read_own_header,
)
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.writing import register
from llmembed.cache_format.writing.blocks import sound_commits, write_block
from llmembed.cache_format.writing.columns import checked_columns, merged
from llmembed.cache_format.writing.lock import (
    SharedLock,
    WriterLock,
    borrowed_lock,
    is_abandoned,
    refuse_if_taken,
)
from llmembed.cache_format.writing.plan import Block, SplitPlan, checked_arrays, missing_blocks
from llmembed.common.errors import CacheError, CacheSpaceError, ConfigError, DataError


class CacheWriter:
    """Create a cache, or add what is missing to one: register, plan, write, finish.

    Args:
        path: the cache's folder or URL.
        dataset: what the cache is of; must agree with what is there.
        overwrite: replace a cache; anything else is never touched.
        dry_run: plan only; nothing is written and no lock is taken.
        shared: name of this writer among several; it only writes blocks of what is registered.
        fsync: survive a loss of power, not only of the process; about four times slower.

    Raises:
        CacheFormatError: if something else than a cache is there.
        CacheLockedError: if another writer is at work that does not share.
        CacheMismatchError: if the cache is of another data set.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dataset: DatasetInfo,
        overwrite: bool = False,
        dry_run: bool = False,
        shared: str | None = None,
        fsync: bool = False,
    ) -> None:
        self._store = open_store(path, fsync=fsync)
        self._dry_run = dry_run
        self._shared = shared
        self._registers = not dry_run and shared is None
        self._overwrite = overwrite
        self._is_open = False
        self._dataset = dataset
        self._header = Header.new(dataset)
        self._lock: WriterLock | SharedLock | None = None
        self._text_hash: dict[str, NDArray[np.uint64]] = {}
        self._plans: dict[tuple[str, str], SplitPlan] = {}

    def __enter__(self) -> Self:
        found = read_own_header(self._store)
        self._is_open = True
        try:
            if self._dry_run:
                self._take_up(found)
            elif self._shared is not None or found is not None:
                self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def sources(self) -> Mapping[str, SourceInfo]:
        """The backbones that the cache knows, and those added here, by name."""
        return self._header.sources

    def add_source(self, source: SourceInfo) -> None:
        """Register a backbone and its settings; registering it again changes nothing.

        Raises:
            CacheMismatchError: if the cache knows another source by that name.
        """
        if source.name not in self._header.sources:  # an older version may have allowed the name
            check_name("source", source.name)
        self._begin()
        register.check_free_name("source", source.name, self._header.sources)
        known = self._header.sources.get(source.name)
        if known is not None:
            register.check_source(known, source, self._store.location)
            merged = register.with_prompts(known, source, self._store.location)
            self._header.sources[source.name] = merged
            if merged != known and self._registers:
                self._header.save(self._store)
            return
        self._header.sources[source.name] = source
        if self._registers:
            register.add_source(self._store, self._header, source.name)

    def add_split(
        self,
        name: str,
        *,
        labels: NDArray[Any],
        text_hash: NDArray[Any],
        label_sets: NDArray[Any] | None = None,
        weights: NDArray[Any] | None = None,
        groups: NDArray[Any] | None = None,
    ) -> None:
        """Register a split with its labels and texts; more rows at the end extend it.

        Weights and groups are added to a split without them; one that has them keeps them.

        Args:
            name: "train", "test", ...
            labels: int32 `[N]`, class index, -1 where unlabelled, and where there are label sets.
            text_hash: uint64 `[N]`, xxh3-64 of the UTF-8 text.
            label_sets: int8 `[N, C]`, where a text may have several labels: 1 where it has the
                label, 0 where not; a row of -1 is unlabelled.
            weights: float32 `[N]`, finite and not negative: how much each example counts.
            groups: uint64 `[N]`: which examples belong together.

        Raises:
            CacheMismatchError: if the cache has other rows; the first differing one is named.
            DataError: if a label is no class, or another value is not allowed.
        """
        if name not in self._header.splits:
            check_name("split", name)
        given = {LABEL: labels, TEXT_HASH: text_hash, LABEL_SETS: label_sets}
        given |= {WEIGHT: weights, GROUP: groups}
        columns = checked_columns(name, len(self._header.dataset.labels), given)
        self._begin()
        register.check_free_name("split", name, self._header.splits)
        known = self._header.splits.get(name)
        info = merged(self._store, self._header, name, columns)
        self._text_hash[name] = columns[TEXT_HASH]
        if known == info:
            return
        self._header.splits[name] = info
        if known is not None and known.columns != info.columns:  # say where they came from
            told = {**self._dataset.provenance, **self._header.dataset.provenance}
            self._header.dataset = replace(self._header.dataset, provenance=told)
        if self._registers:
            register.add_split(self._store, self._header, name, columns, known)

    def plan(
        self, split: str, source: str, *, arrays: Iterable[ArrayKey], dtype: str = "float16"
    ) -> SplitPlan:
        """List the blocks of rows that lack any (pooling, layer), of a split and source added here.

        Raises:
            ConfigError: for a layer, pooling or dtype ("float16", "float32") that cannot be.
            CacheMismatchError: if the source is stored in another dtype.
        """
        splits, sources = self._header.splits, self._header.sources
        for kind, name, known in (("split", split, splits), ("source", source, sources)):
            if name not in known:
                raise ConfigError.unknown(kind, name, known, f"Call add_{kind} first.")
        keys = checked_arrays(sources[source], arrays, dtype)
        info, hidden_size = splits[split], sources[source].hidden_size
        if split not in self._text_hash:
            self._text_hash[split] = read_column(self._store, self._header, split, TEXT_HASH)
        text_hash = self._text_hash[split]
        will_be_empty = self._dry_run and self._overwrite
        stored = None if will_be_empty else read_source(self._store, split, info, source)
        committed: Mapping[str, ArrayCommits] = {}
        if stored is None:
            rows = block_rows(info.n_rows, hidden_size * np.dtype(dtype).itemsize)
        else:
            where = f"{self._store.location}/{stored.key}"
            register.check_dtype(stored.layout.dtype, dtype, where)
            rows = stored.block_rows
            names = [*map(array_name, keys), N_TOKENS]
            repair = self._registers
            committed = sound_commits(self._store, stored, names, text_hash, repair=repair)
        plan = SplitPlan(
            split=split,
            source=source,
            n_rows=info.n_rows,
            block_rows=rows,
            hidden_size=hidden_size,
            dtype=dtype,
            arrays=keys,
            blocks=tuple(missing_blocks(keys, rows, committed, text_hash)),
        )
        self._plans[split, source] = plan
        return plan

    def register(self) -> None:
        """Write the documents of all planned arrays, so that others can write their blocks."""
        for plan in self._plans.values():
            register.add_arrays(self._store, plan)

    @property
    def is_registered(self) -> bool:
        """Whether the cache names every source, split and array that was added and planned."""
        header = read_header(self._store)
        return (
            header is not None
            and header.splits == self._header.splits
            and header.sources.keys() == self._header.sources.keys()
            and all(header.sources[k].prompts == v.prompts for k, v in self._header.sources.items())
            and all(register.has_arrays(self._store, plan) for plan in self._plans.values())
        )

    def is_finished(self, plan: SplitPlan) -> bool:
        """Tell whether nothing is left to do for a plan: no block, no index, and no dead lock."""
        info = self._header.splits.get(plan.split)
        if info is None or plan.blocks or is_abandoned(self._store):
            return False
        stored = read_source(self._store, plan.split, info, plan.source)
        return (
            stored is not None
            and all(self._is_listed(f"{plan.split}/{name}", plan.n_rows) for name in info.columns)
            and all(
                stored.is_indexed(name) and self._is_listed(f"{stored.key}/{name}", plan.n_rows)
                for name in plan.names
            )
        )

    def _is_listed(self, name: str, n_rows: int) -> bool:
        """Tell whether plain Zarr readers see an array with so many rows: it may have grown."""
        document = (self._header.consolidated or {"metadata": {}})["metadata"].get(name)
        shape = document.get("shape") if isinstance(document, dict) else None
        return isinstance(shape, list) and shape[:1] == [n_rows]

    @property
    def free_bytes(self) -> int | None:
        """Bytes free where the cache lies; None where a store cannot tell."""
        return self._store.free_bytes()

    def check_space(self, size_bytes: int) -> None:
        """Refuse to start what cannot be finished, by a `CacheSpaceError`."""
        free = self.free_bytes
        if free is not None and size_bytes > free:
            raise CacheSpaceError(
                f"the features need {size_bytes / 1e9:.3f} GB, but {free / 1e9:.3f} GB are free at "
                f"{self._store.location}. Free some space, choose another --cache, or ask for "
                "fewer --layers or poolings."
            )

    def refuse_if_taken(self) -> None:
        """Refuse by a `CacheLockedError` what who shares nothing could not write now."""
        refuse_if_taken(self._store)

    def write(
        self,
        plan: SplitPlan,
        block: Block,
        *,
        n_tokens: NDArray[Any],
        features: Mapping[ArrayKey, NDArray[Any]],
    ) -> None:
        """Write rows `compute_from` to `stop` of a block of a plan, and commit it.

        Args:
            plan: where the block comes from.
            block: the block.
            n_tokens: int32 `[rows]`.
            features: `[rows, H]` for each of `block.missing`; cast to the plan's dtype.

        Raises:
            ExtractionError: if a feature is not finite in that dtype.
            CacheMismatchError: if the arrays are not those of the block.
            CacheSpaceError, CacheStorageError: if the store fails; what was committed is safe.
        """
        if self._lock is None:
            raise CacheError("a dry run or a closed writer writes nothing; open a CacheWriter.")
        self._lock.check()
        register.add_arrays(self._store, plan)
        write_block(self._store, plan, block, n_tokens, features)

    @property
    def lease(self) -> str:
        """What a `UnitWriter` of another process shows, so that it may write while this one may.

        Raises:
            CacheError: if this writer holds no lock.
        """
        if self._lock is None:
            raise CacheError("a dry run or a closed writer lends no lock; open a CacheWriter.")
        return self._lock.lease

    def finish(self, split: str, source: str, stored: StoredSource | None = None) -> None:
        """Index what is complete (`stored` spares a reading) and let plain Zarr readers see it."""
        plan = self._plans.get((split, source))
        if plan is not None and plan.n_rows == 0:
            register.add_arrays(self._store, plan)
        info = self._header.splits[split]
        stored = stored or read_source(self._store, split, info, source)
        if stored is not None:
            complete = filter(stored.is_complete, stored.layout.names)
            new = [name for name in complete if not stored.is_indexed(name)]
            if new:
                stored.delete_superseded()
            for name in new:
                stored.write_index(name)
        register.consolidate(self._store, self._header)

    def _begin(self) -> None:
        """Take the lock, unless it is held or nothing is to be written, and see what is there.

        Of a cache that does not exist this waits for the first source or split: what is refused
        before that leaves nothing behind, and so nothing has to be taken away from under others.
        """
        if self._dry_run or self._lock is not None:
            return
        if not self._is_open:
            raise CacheError("a closed writer writes nothing; open a CacheWriter.")
        share = self._shared
        self._lock = WriterLock(self._store) if share is None else SharedLock(self._store, share)
        self._take_up(read_header(self._store))

    def _take_up(self, found: Header | None) -> None:
        if found is not None and not self._overwrite:
            found.require_known(self._store.location)
            register.check_dataset(found.dataset, self._header.dataset, self._store.location)
            self._header = found
        elif found is not None and self._registers:
            register.empty(self._store, self._header)


class UnitWriter:
    """Writes the blocks of a unit, a part of a plan, for the writer that gave its lease."""

    def __init__(self, path: str | os.PathLike[str], unit: SplitPlan, lease: str) -> None:
        self._store = open_store(path)
        self._lock = borrowed_lock(self._store, lease)
        self._unit = unit

    def left(self) -> SplitPlan:
        """List the blocks without those that an earlier attempt at this unit committed."""
        return self._unit.part(b for b in self._unit.blocks if not self._is_committed(b))

    def check_texts(self, block: Block, text_hash: NDArray[Any]) -> None:
        """Refuse text_hash uint64 `[rows]` of a block that is not that of the planner."""
        if digest(text_hash) != block.texts:
            raise DataError(
                f"rows {block.start}-{block.stop} of split {self._unit.split!r} are other "
                "texts for this worker than for the process that planned the work. Put the same "
                "file where every machine reads --dataset."
            )

    def write(
        self,
        plan: SplitPlan,
        block: Block,
        *,
        n_tokens: NDArray[Any],
        features: Mapping[ArrayKey, NDArray[Any]],
    ) -> None:
        """Write a block and commit it, as `CacheWriter.write` does, while that one may."""
        self._lock.check()
        write_block(self._store, plan, block, n_tokens, features)

    def _is_committed(self, block: Block) -> bool:
        record = self._unit.record(block, dict.fromkeys(block.names, ""))
        found = self._store.get(record.key(self._unit.block_rows))
        return found is not None and not is_half_written(found)
