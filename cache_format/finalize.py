"""Close a cache that several writers filled: prove every chunk, then index it.

Writers that share a plan leave chunks and records only. A writer that was thought dead may have
written a chunk again after another one committed it; on the same hardware the bytes are the same,
on other hardware they need not be. So every chunk is hashed once more. Blocks that are not what was
committed are withdrawn, and the writers are to be run again; that is the whole of the repair.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from llmembed.cache_format.arrays import StoredArray, in_parallel
from llmembed.cache_format.commits import Commits
from llmembed.cache_format.errors import CacheCorruptError, CacheIncompleteError
from llmembed.cache_format.header import require_header
from llmembed.cache_format.layout import SourceLayout, layouts
from llmembed.cache_format.lock import SHARED, WriterLock, holders
from llmembed.cache_format.store import Store, open_store
from llmembed.cache_format.writer import CacheWriter

Damaged: TypeAlias = dict[tuple[str, str], dict[str, set[int]]]
"""(split, source) -> array name -> blocks."""
Layouts: TypeAlias = list[tuple[str, str, SourceLayout, Commits]]
"""Split, source, its arrays and what is committed of them; the records are read once."""


@dataclass(frozen=True, kw_only=True)
class Finalized:
    """What `finalize` closed."""

    path: str
    """The cache."""
    n_chunks: int
    """Chunks that were hashed."""


def finalize(path: str | os.PathLike[str], *, only_new: bool = False) -> Finalized:
    """Re-hash every committed chunk, then write indexes and consolidated metadata.

    It may be run again at any time; a closed cache keeps its bytes.

    Args:
        path: the cache's folder or URL.
        only_new: leave alone arrays that have an index, or that lack rows.

    Raises:
        CacheNotFoundError, CacheFormatError: if there is no cache.
        CacheIncompleteError: if rows are not committed; nothing was written.
        CacheCorruptError: if chunks are not what was committed; their blocks were withdrawn.
        CacheLockedError: if a writer is at work that shares the cache with nobody.
    """
    store = open_store(path)
    header = require_header(store)
    found = list(layouts(store, header))
    if not only_new:
        _refuse_incomplete(store, found)
    n_chunks = 0
    damaged: Damaged = {}
    for split, source, layout, commits in found:
        for name in layout.names:
            if only_new and (commits.is_indexed(name) or not commits.is_complete(name)):
                continue
            n_chunks += len(commits.expected)
            bad = _damaged_blocks(store, f"{split}/{source}/{name}", name, layout, commits)
            if bad:
                damaged.setdefault((split, source), {})[name] = bad
    if damaged:
        _withdraw(store, found, damaged)
    for name in holders(store):  # all is committed: who still holds one is done, or a zombie
        store.delete(f"{SHARED}/{name}")
    with CacheWriter(path, dataset=header.dataset) as writer:
        for split, source, _, _ in found:
            writer.finish(split, source)
    return Finalized(path=os.fspath(path), n_chunks=n_chunks)


def _refuse_incomplete(store: Store, found: Layouts) -> None:
    missing = []
    for split, source, layout, commits in found:
        for name in layout.names:
            n_missing = int((commits.expected - commits.array(name).rows).sum())
            if n_missing:
                missing.append(f"{n_missing:,} rows of {split}/{source}/{name}")
    if missing:
        at_work = [f"{name} ({holder})" for name, holder in holders(store).items()]
        remedy = f"Wait for {at_work[0]}" if at_work else "Run the ranks again that did not end"
        raise CacheIncompleteError(
            f"{store.location} lacks {missing[0]} ({len(missing)} arrays in all). {remedy}, then "
            "finalize."
        )


def _damaged_blocks(
    store: Store, key: str, name: str, layout: SourceLayout, commits: Commits
) -> set[int]:
    """List the blocks of an array whose rows are not those that were committed."""
    hashes = commits.array(name).hashes
    n_rows = int(commits.expected.sum())
    array = StoredArray(store, key, n_rows, block_rows=layout.block_rows, hashes=hashes)
    bad: set[int] = set()

    def check(index: int) -> None:
        try:
            array.block(index)
        except CacheCorruptError:
            bad.add(index)

    in_parallel(store, check, np.arange(array.n_blocks).tolist())
    return bad


def _withdraw(store: Store, found: Layouts, damaged: Damaged) -> None:
    lock = WriterLock(store)
    try:
        for split, source, _, commits in found:
            commits.drop(damaged.get((split, source), {}))
    finally:
        lock.release()
    (split, source), names = next(iter(damaged.items()))
    name, blocks = next(iter(names.items()))
    n_blocks = sum(len(bad) for arrays in damaged.values() for bad in arrays.values())
    raise CacheCorruptError(
        f"{store.location}/{split}/{source}/{name}: block {min(blocks)} does not hold what was "
        f"committed ({n_blocks} blocks in all). They were withdrawn: run the ranks again, then "
        "finalize."
    )
