"""Close a cache that several writers filled: prove every chunk, then index it.

Writers that share a plan leave chunks and records only. A writer that was thought dead may have
written a chunk again after another one committed it; on the same hardware the bytes are the same,
on other hardware they need not be. So every chunk is hashed once more. Blocks that are not what was
committed are withdrawn, and the writers are to be run again; that is the whole of the repair.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Self, TypeAlias

from llmembed.cache_format.layout.arrays import StoredArray, in_parallel
from llmembed.cache_format.layout.commits import StoredSource, sources_of
from llmembed.cache_format.layout.schema import require_header
from llmembed.cache_format.stores import Store, open_store
from llmembed.cache_format.writing import SHARED, CacheWriter, WriterLock, holders
from llmembed.common.errors import CacheCorruptError, CacheIncompleteError

_PART_BLOCKS = 256


@dataclass(frozen=True, kw_only=True)
class Part:
    """Neighbouring blocks of one array, to be hashed by one process, here or elsewhere."""

    key: str  # of the array
    n_rows: int  # N
    block_rows: int  # R
    first: int  # block
    hashes: tuple[str | None, ...]  # what was committed of each block

    def dumps(self) -> str:
        """Write the part as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Self:
        """Read what `dumps` wrote."""
        return cls(**json.loads(text))

    def bad_blocks(self, store: Store) -> list[int]:
        """List the blocks whose rows are not those that were committed."""
        hashes = dict(enumerate(self.hashes, self.first))
        rows = self.block_rows
        array = StoredArray(store, self.key, self.n_rows, block_rows=rows, hashes=hashes)
        bad = []

        def check(index: int) -> None:
            try:
                array.block(index)
            except CacheCorruptError:
                bad.append(index)

        in_parallel(store, check, list(hashes))
        return bad


Check: TypeAlias = Callable[[Sequence[Part]], Iterable[tuple[Part, list[int]]]]
"""Hashes parts, in any order: each with its blocks that are not what was committed."""


@dataclass(frozen=True, kw_only=True)
class Finalized:
    """What `finalize` closed: a cache, and how many chunks it hashed."""

    path: str
    n_chunks: int


def finalize(
    path: str | os.PathLike[str], *, only_new: bool = False, check: Check | None = None
) -> Finalized:
    """Re-hash every committed chunk, then write indexes and consolidated metadata.

    It may be run again at any time; a closed cache keeps its bytes.

    Args:
        path: the cache's folder or URL.
        only_new: leave alone arrays that have an index, or that lack rows.
        check: who hashes; None does it in this process.

    Raises:
        CacheIncompleteError: if rows are not committed; nothing was written.
        CacheCorruptError: if chunks are not what was committed; their blocks were withdrawn.
        CacheLockedError: if a writer is at work that shares the cache with nobody.
    """
    store = open_store(path)
    header = require_header(store)
    sources = list(sources_of(store, header))
    if not only_new:
        _refuse_incomplete(store, sources)
    parts = list(_parts(sources, only_new=only_new))
    checked = check(parts) if check else ((part, part.bad_blocks(store)) for part in parts)
    damaged = [(part, bad) for part, bad in checked if bad]
    if damaged:
        _withdraw(store, sources, damaged)
    for name in store.names(SHARED):  # all is committed: who still holds one is done, or a zombie
        store.delete(f"{SHARED}/{name}")
    with CacheWriter(path, dataset=header.dataset) as writer:
        for source in sources:
            writer.finish(source.split, source.source, source)
    return Finalized(path=os.fspath(path), n_chunks=sum(len(part.hashes) for part in parts))


def _parts(sources: Sequence[StoredSource], *, only_new: bool) -> Iterator[Part]:
    for source in sources:
        for name in source.layout.names:
            if only_new and (source.is_indexed(name) or not source.is_complete(name)):
                continue
            hashes = source.commits(name).hashes
            for first in range(0, len(hashes), _PART_BLOCKS):
                yield Part(
                    key=f"{source.key}/{name}",
                    n_rows=int(source.expected.sum()),
                    block_rows=source.block_rows,
                    first=first,
                    hashes=hashes[first : first + _PART_BLOCKS],
                )


def _refuse_incomplete(store: Store, sources: Sequence[StoredSource]) -> None:
    missing = []
    for source in sources:
        for name in source.layout.names:
            n_missing = source.n_missing(name)
            if n_missing:
                missing.append(f"{n_missing:,} rows of {source.key}/{name}")
    if missing:
        at_work = [f"{name} ({holder})" for name, holder in holders(store).items()]
        remedy = f"Wait for {at_work[0]}" if at_work else "Run the ranks again that did not end"
        raise CacheIncompleteError(
            f"{store.location} lacks {missing[0]} ({len(missing)} arrays in all). {remedy}, then "
            "finalize."
        )


def _withdraw(
    store: Store, sources: Sequence[StoredSource], damaged: Sequence[tuple[Part, list[int]]]
) -> None:
    lost: dict[str, set[int]] = {}
    for part, bad in damaged:
        lost.setdefault(part.key, set()).update(bad)
    with WriterLock(store):
        for source in sources:
            keys = {name: f"{source.key}/{name}" for name in source.layout.names}
            source.drop({name: lost[key] for name, key in keys.items() if key in lost})
    part, bad = damaged[0]
    raise CacheCorruptError(
        f"{store.location}/{part.key}: block {min(bad)} does not hold "
        f"what was committed ({sum(len(bad) for _, bad in damaged)} blocks in all). They were "
        "withdrawn: run the command again, or the ranks and then finalize."
    )
