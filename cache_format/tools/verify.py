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

from llmembed.cache_format.layout.arrays import (
    StoredArray,
    crc_holds,
    digest,
    read_column,
    require_rows,
)
from llmembed.cache_format.layout.commits import ArrayCommits, StoredSource, sources_of
from llmembed.cache_format.layout.documents import (
    DOCUMENT,
    JSON,
    array_document,
    dump,
    group_document,
)
from llmembed.cache_format.layout.schema import (
    LABEL,
    N_TOKENS,
    TEXT_HASH,
    Header,
    SplitInfo,
    require_header,
)
from llmembed.cache_format.stores import Store
from llmembed.cache_format.writing import consolidated_metadata
from llmembed.common.errors import CacheCorruptError, CacheError, shown


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not as it was committed: its key, and what is wrong in one sentence."""

    key: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found."""

    damage: tuple[Damage, ...]
    n_chunks: int  # that were read
    size_bytes: int  # of them
    incomplete: tuple[str, ...]  # arrays with rows that are not committed yet; that is no damage


def verify(store: Store) -> Verification:
    """Check every chunk, record and document of a cache; without a readable root it raises."""
    header = require_header(store)
    found = _Found(store)
    for split, info in sorted(header.splits.items()):
        found.check_columns(split, info)
    trusted = {}
    for split, info in header.splits.items():
        with found.any_error(split):
            require_rows(store, split, info.n_rows)
            trusted[split] = info
    for source in sources_of(store, replace(header, splits=trusted)):
        with found.any_error(source.key):
            found.check_source(source)
            info = header.splits[source.split]
            source.check_texts(read_column(store, source.split, TEXT_HASH, info))
    with found.any_error(DOCUMENT):
        found.check_root(header)
    return Verification(
        damage=tuple(found.damage),
        n_chunks=found.n_chunks,
        size_bytes=found.size_bytes,
        incomplete=tuple(found.incomplete),
    )


def require_sound(store: Store) -> None:
    """Verify a cache that was just written; raise the first damage."""
    damage = verify(store).damage
    if damage:
        raise CacheCorruptError(
            f"{store.location} does not hold what was committed: {damage[0].key}: "
            f"{damage[0].problem} ({len(damage)} in all). Check the original with "
            "llmembed-cache verify, remove this one and try again."
        )


def summary(result: Verification, location: str) -> Iterator[str]:
    """Say in lines of text what was found."""
    counts = f"{result.n_chunks} chunks, {result.size_bytes / 1e6:.1f} MB"
    if not result.damage:
        yield f"{location}: {counts}, every hash holds"
    for damage in result.damage:
        yield shown(f"DAMAGED {damage.key}: {damage.problem}")
    for key in itertools.islice(result.incomplete, 20):
        yield f"incomplete {key}"


class _Found:
    """Checks the parts of a cache, and gathers what is wrong with them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._n_unindexed = 0
        self.damage: list[Damage] = []
        self.incomplete: list[str] = []
        self.n_chunks = 0
        self.size_bytes = 0

    @contextmanager
    def any_error(self, key: str) -> Iterator[None]:
        try:
            yield
        except CacheError as error:
            self._add(key, str(error))

    def check_root(self, header: Header) -> None:
        self._check_document(DOCUMENT, header.document())
        # Between the last block and `finish` the metadata still show what was complete before.
        is_finished = not self.incomplete and not self._n_unindexed
        metadata = header.consolidated
        if is_finished and metadata not in (None, consolidated_metadata(self._store, header)):
            self._add(DOCUMENT, "its consolidated metadata differ from the documents below it")

    def check_columns(self, split: str, info: SplitInfo) -> None:
        self._check_document(f"{split}/{DOCUMENT}", group_document({}))
        for name in (LABEL, TEXT_HASH):
            with self.any_error(f"{split}/{name}"):
                read_column(self._store, split, name, info)
                array = StoredArray(self._store, f"{split}/{name}", info.n_rows)
                self._check_array_document(array)
                for index in range(array.info.n_chunks):
                    self._check_crc(array, index)

    def check_source(self, source: StoredSource) -> None:
        self._check_document(f"{source.key}/{DOCUMENT}", source.layout.document())
        for pooling in sorted({pooling for pooling, _ in source.layout.arrays}):
            self._check_document(f"{source.key}/{pooling}/{DOCUMENT}", group_document({}))
        for record_key, record in source.records.items():
            self._check_document(record_key, record.document())
        for record_key in source.half_written:
            self._add(record_key, "the record is half-written; its block is redone on resume")
        for name in source.layout.names:
            with self.any_error(f"{source.key}/{name}"):
                self._check_array(source, name)

    def _check_array(self, source: StoredSource, name: str) -> None:
        committed = source.commits(name)
        if not source.is_complete(name):
            self.incomplete.append(f"{source.key}/{name}")
        elif not source.is_indexed(name):
            self._n_unindexed += 1
        if not committed.rows.any():
            return
        array = source.array(name)
        self._check_array_document(array)
        if array.info.plain and not source.index_agrees(name):
            self._add(source.index_key(name), "the index differs from the commit records")
        for index in np.flatnonzero(committed.rows).tolist():
            self._check_block(array, index, committed, is_feature=name != N_TOKENS)

    def _check_block(
        self, array: StoredArray, index: int, committed: ArrayCommits, *, is_feature: bool
    ) -> None:
        rows_key = f"{array.key} rows {index * array.block_rows}+"
        where = array.chunk_key(index) if array.info.plain else rows_key
        with self.any_error(where):
            rows = array.block(index)[: committed.rows[index]]
            self.n_chunks += 1
            self.size_bytes += rows.nbytes
            if digest(rows) != committed.hashes[index]:
                self._add(where, "the rows are not those that were committed")
            elif is_feature and not np.isfinite(rows).all():
                self._add(where, "features that are NaN or infinite")
            else:
                self._check_crc(array, index)

    def _check_crc(self, array: StoredArray, index: int) -> None:
        if array.info.plain:
            key = array.chunk_key(index)
            if not crc_holds(array.info, self._store.view(key, array.info.chunk_bytes)):
                self._add(key, "the checksum of the chunk does not hold")

    def _check_array_document(self, array: StoredArray) -> None:
        if array.info.plain:
            self._check_document(f"{array.key}/{DOCUMENT}", array_document(array.info))

    def _check_document(self, key: str, document: Mapping[str, JSON]) -> None:
        if self._store.get(key) != dump(document):
            self._add(key, "the document is missing or not as it was written")

    def _add(self, key: str, problem: str) -> None:
        self.damage.append(Damage(key=key, problem=problem))
