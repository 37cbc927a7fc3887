"""Re-hash a cache and name everything that is not what was committed.

Two proofs are checked. The crc32c of a chunk covers every bit of its file, padding included; the
xxh3-128 in the commit record proves that the rows are the committed ones. The documents that say
where the rows lie are parsed, and the records checked against the texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmembed.cache_format.arrays import StoredArray
from llmembed.cache_format.chunks import crc_holds, decode, digest
from llmembed.cache_format.columns import LABEL, TEXT_HASH, read_column
from llmembed.cache_format.commits import Commits
from llmembed.cache_format.documents import DOCUMENT, ArrayInfo, array_document, dump
from llmembed.cache_format.errors import CacheError
from llmembed.cache_format.header import require_header
from llmembed.cache_format.layout import SourceLayout, layouts
from llmembed.cache_format.schema import N_TOKENS
from llmembed.cache_format.store import Store


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not as it was committed."""

    key: str
    """Its key within the cache."""
    problem: str
    """What is wrong with it, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found."""

    damage: tuple[Damage, ...]
    """Empty if all is well."""
    n_chunks: int
    """Chunks that were read."""
    size_bytes: int
    """Their bytes."""
    incomplete: tuple[str, ...]
    """Arrays with rows that are not committed yet; that is no damage."""


class _Found:
    def __init__(self) -> None:
        self.damage: list[Damage] = []
        self.incomplete: list[str] = []
        self.n_chunks = 0
        self.size_bytes = 0

    def add(self, key: str, problem: str) -> None:
        self.damage.append(Damage(key=key, problem=problem))


def verify(store: Store) -> Verification:
    """Check every chunk, record and document of a cache.

    Raises:
        CacheFormatError, CacheNotFoundError: if there is no readable root document.
    """
    header = require_header(store)
    found = _Found()
    for split, info in sorted(header.splits.items()):
        for name in (LABEL, TEXT_HASH):
            try:
                read_column(store, split, name, info)
                array = StoredArray(store, f"{split}/{name}", info.n_rows)
                _check_chunks(store, array.key, array.info, range(array.info.n_chunks), found)
            except CacheError as error:
                found.add(f"{split}/{name}", str(error))
    try:
        for split, source, layout, commits in layouts(store, header):
            _verify_source(store, f"{split}/{source}", layout, commits, found)
            if not any(d.key == f"{split}/{TEXT_HASH}" for d in found.damage):
                commits.check_texts(read_column(store, split, TEXT_HASH, header.splits[split]))
    except CacheError as error:
        found.add(DOCUMENT, str(error))
    return Verification(
        damage=tuple(found.damage),
        n_chunks=found.n_chunks,
        size_bytes=found.size_bytes,
        incomplete=tuple(found.incomplete),
    )


def _verify_source(
    store: Store, key: str, layout: SourceLayout, commits: Commits, found: _Found
) -> None:
    for name in layout.names:
        try:
            _verify_array(store, f"{key}/{name}", name, layout, commits, found)
        except CacheError as error:
            found.add(f"{key}/{name}", str(error))


def _verify_array(
    store: Store, key: str, name: str, layout: SourceLayout, commits: Commits, found: _Found
) -> None:
    committed = commits.array(name)
    if not commits.is_complete(name):
        found.incomplete.append(key)
    if not committed.rows.any():
        return
    n_rows = int(commits.expected.sum())
    array = StoredArray(store, key, n_rows, block_rows=layout.block_rows)
    if array.info.plain and store.get(f"{key}/{DOCUMENT}") != dump(array_document(array.info)):
        found.add(f"{key}/{DOCUMENT}", "the document is not as it was written")
    for index in np.flatnonzero(committed.rows).tolist():
        try:
            rows = array.block(index)[: committed.rows[index]]
        except CacheError as error:
            found.add(f"{key}/{array.info.chunk_key(index)}", str(error))
            continue
        if digest(rows) != committed.hashes[index]:
            found.add(_chunk_or_rows(array, index), "the rows are not those that were committed")
        elif name != N_TOKENS and not np.isfinite(rows).all():
            found.add(_chunk_or_rows(array, index), "features that are NaN or infinite")
        elif array.info.plain:
            _check_chunks(store, key, array.info, [index], found)
        found.n_chunks += 1
        found.size_bytes += rows.nbytes


def _check_chunks(
    store: Store, key: str, info: ArrayInfo, indices: range | list[int], found: _Found
) -> None:
    if not info.plain:
        return
    for index in indices:
        chunk_key = f"{key}/{info.chunk_key(index)}"
        if not crc_holds(info, store.view(chunk_key, info.chunk_bytes)):
            found.add(chunk_key, "the checksum of the chunk does not hold")


def _chunk_or_rows(array: StoredArray, index: int) -> str:
    if array.info.plain:
        return f"{array.key}/{array.info.chunk_key(index)}"
    return f"{array.key} rows {index * array.block_rows}+"


def summary(result: Verification, location: str) -> Iterator[str]:
    """Say in lines of text what was found."""
    counts = f"{result.n_chunks} chunks, {result.size_bytes / 1e6:.1f} MB"
    if not result.damage:
        yield f"{location}: {counts}, every hash holds"
    for damage in result.damage:
        yield f"DAMAGED {ascii(damage.key)[1:-1]}: {damage.problem}"
    for key in itertools.islice(result.incomplete, 20):
        yield f"incomplete {key}"
