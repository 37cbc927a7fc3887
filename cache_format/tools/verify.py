"""Re-hash a cache and name everything that is not what was committed.

Two proofs are checked. The crc32c of a chunk covers every bit of its file, padding included; the
xxh3-128 in the commit record proves that the rows are the committed ones. The documents that say
where the rows lie are parsed, and the records checked against the texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from llmembed.cache_format.layout.arrays import StoredArray
from llmembed.cache_format.layout.chunks import crc_holds, digest
from llmembed.cache_format.layout.columns import LABEL, TEXT_HASH, read_column, require_rows
from llmembed.cache_format.layout.commits import BlockCommits, Commits
from llmembed.cache_format.layout.documents import DOCUMENT, array_document, dump, group_document
from llmembed.cache_format.layout.header import Header, require_header
from llmembed.cache_format.layout.schema import JSON, N_TOKENS
from llmembed.cache_format.layout.sources import SourceLayout, layouts
from llmembed.cache_format.stores.base import Store
from llmembed.cache_format.writing.consolidate import consolidated_metadata
from llmembed.common.errors import CacheCorruptError, CacheError, shown


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
        self.n_unindexed = 0
        self.n_chunks = 0
        self.size_bytes = 0

    def add(self, key: str, problem: str) -> None:
        self.damage.append(Damage(key=key, problem=problem))

    @contextmanager
    def any_error(self, key: str) -> Iterator[None]:
        try:
            yield
        except CacheError as error:
            self.add(key, str(error))

    def check_document(self, store: Store, key: str, document: Mapping[str, JSON]) -> None:
        if store.get(key) != dump(document):
            self.add(key, "the document is missing or not as it was written")

    def check_array_document(self, store: Store, array: StoredArray) -> None:
        if array.info.plain:
            self.check_document(store, f"{array.key}/{DOCUMENT}", array_document(array.info))


def verify(store: Store) -> Verification:
    """Check every chunk, record and document of a cache.

    Raises:
        CacheFormatError, CacheNotFoundError: if there is no readable root document.
    """
    header = require_header(store)
    found = _Found()
    for split in sorted(header.splits):
        _verify_columns(store, split, header, found)
    for split, source, layout, commits in layouts(store, _with_files(store, header, found)):
        with found.any_error(f"{split}/{source}"):
            _verify_source(store, f"{split}/{source}", layout, commits, found)
            commits.check_texts(read_column(store, split, TEXT_HASH, header.splits[split]))
    with found.any_error(DOCUMENT):
        _verify_root(store, header, found)
    return Verification(
        damage=tuple(found.damage),
        n_chunks=found.n_chunks,
        size_bytes=found.size_bytes,
        incomplete=tuple(found.incomplete),
    )


def _with_files(store: Store, header: Header, found: _Found) -> Header:
    """Leave out the splits whose claim of rows is not worth to be followed."""
    splits = {}
    for name, info in header.splits.items():
        with found.any_error(name):
            require_rows(store, name, info.n_rows)
            splits[name] = info
    return replace(header, splits=splits)


def require_sound(store: Store) -> None:
    """Verify a cache that was just written.

    Raises:
        CacheCorruptError: naming the first damage.
    """
    damage = verify(store).damage
    if damage:
        raise CacheCorruptError(
            f"{store.location} does not hold what was committed: {damage[0].key}: "
            f"{damage[0].problem} ({len(damage)} in all). Check the original with "
            "llmembed-cache verify, remove this one and try again."
        )


def _verify_root(store: Store, header: Header, found: _Found) -> None:
    found.check_document(store, DOCUMENT, header.document())
    # Between the last block and `finish` the metadata still show what was complete before.
    is_finished = not found.incomplete and not found.n_unindexed
    if is_finished and header.consolidated not in (None, consolidated_metadata(store, header)):
        found.add(DOCUMENT, "its consolidated metadata differ from the documents below it")


def _verify_columns(store: Store, split: str, header: Header, found: _Found) -> None:
    found.check_document(store, f"{split}/{DOCUMENT}", group_document({}))
    for name in (LABEL, TEXT_HASH):
        with found.any_error(f"{split}/{name}"):
            read_column(store, split, name, header.splits[split])
            array = StoredArray(store, f"{split}/{name}", header.splits[split].n_rows)
            found.check_array_document(store, array)
            for index in range(array.info.n_chunks):
                _check_crc(array, index, found)


def _verify_source(
    store: Store, key: str, layout: SourceLayout, commits: Commits, found: _Found
) -> None:
    found.check_document(store, f"{key}/{DOCUMENT}", layout.document())
    for pooling in sorted({pooling for pooling, _ in layout.arrays}):
        found.check_document(store, f"{key}/{pooling}/{DOCUMENT}", group_document({}))
    for record_key, record in commits.read_records():
        found.check_document(store, record_key, record.document())
    for record_key in commits.half_written:
        found.add(record_key, "the record is half-written; its block is redone on resume")
    for name in layout.names:
        with found.any_error(f"{key}/{name}"):
            _verify_array(store, f"{key}/{name}", name, layout, commits, found)


def _verify_array(
    store: Store, key: str, name: str, layout: SourceLayout, commits: Commits, found: _Found
) -> None:
    committed = commits.array(name)
    if not commits.is_complete(name):
        found.incomplete.append(key)
    elif not commits.is_indexed(name):
        found.n_unindexed += 1
    if not committed.rows.any():
        return
    n_rows = int(commits.expected.sum())
    array = StoredArray(store, key, n_rows, block_rows=layout.block_rows)
    found.check_array_document(store, array)
    if array.info.plain and not commits.index_agrees(name):
        found.add(commits.index_key(name), "the index differs from the commit records")
    for index in np.flatnonzero(committed.rows).tolist():
        _verify_block(array, name, index, committed, found)


def _verify_block(
    array: StoredArray, name: str, index: int, committed: BlockCommits, found: _Found
) -> None:
    where = _chunk_or_rows(array, index)
    with found.any_error(where):
        rows = array.block(index)[: committed.rows[index]]
        found.n_chunks += 1
        found.size_bytes += rows.nbytes
        if digest(rows) != committed.hashes[index]:
            found.add(where, "the rows are not those that were committed")
        elif name != N_TOKENS and not np.isfinite(rows).all():
            found.add(where, "features that are NaN or infinite")
        else:
            _check_crc(array, index, found)


def _check_crc(array: StoredArray, index: int, found: _Found) -> None:
    if array.info.plain:
        key = f"{array.key}/{array.info.chunk_key(index)}"
        if not crc_holds(array.info, array.store.view(key, array.info.chunk_bytes)):
            found.add(key, "the checksum of the chunk does not hold")


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
        yield shown(f"DAMAGED {damage.key}: {damage.problem}")
    for key in itertools.islice(result.incomplete, 20):
        yield f"incomplete {key}"
