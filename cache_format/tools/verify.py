"""Hash a cache again: name all that is not what was committed, or close it if all is.

Two proofs are checked. The crc32c of a chunk covers every bit of its file, padding included; the
xxh3-128 in the commit record proves that the rows are the committed ones. The documents that say
where the rows lie are parsed, and the records checked against the texts.

Writers that share a plan leave chunks and records only. One that was thought dead may have written
a chunk again after another one committed it; on the same hardware the bytes are the same, on other
hardware they need not be. So `finalize` hashes every chunk before it writes indexes. Blocks that
are not what was committed are withdrawn, and the writers are to be run again.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Self, TypeAlias

import numpy as np

from llmembed.cache_format.layout.arrays import (
    StoredArray,
    crc_holds,
    digest,
    in_parallel,
    read_column,
    require_rows,
)
from llmembed.cache_format.layout.commits import StoredSource, arrays_of, sources_of
from llmembed.cache_format.layout.documents import (
    DOCUMENT,
    JSON,
    array_document,
    dump,
    group_document,
)
from llmembed.cache_format.layout.schema import (
    N_TOKENS,
    TEXT_HASH,
    Header,
    require_header,
)
from llmembed.cache_format.stores import Store, open_store
from llmembed.cache_format.writing import (
    SHARED,
    CacheWriter,
    WriterLock,
    consolidated_metadata,
    holders,
)
from llmembed.common.errors import CacheCorruptError, CacheError, CacheIncompleteError, shown

_PART_BLOCKS = 256


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
    checks = _Checks(store)
    for split in sorted(header.splits):
        checks.check_columns(header, split)
    trusted = {}
    for split, info in header.splits.items():
        with checks.any_error(split):
            require_rows(store, split, info.n_rows)
            trusted[split] = info
    for source in sources_of(store, replace(header, splits=trusted)):
        with checks.any_error(source.key):
            checks.check_source(source)
            source.check_texts(read_column(store, header, source.split, TEXT_HASH))
    with checks.any_error(DOCUMENT):
        checks.check_root(header)
    return Verification(
        damage=tuple(checks.damage),
        n_chunks=checks.n_chunks,
        size_bytes=checks.size_bytes,
        incomplete=tuple(checks.incomplete),
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


class _Checks:
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
        if not header.is_newer:  # its digest holds, and what else it says is not known here
            self._check_document(DOCUMENT, header.document())
        # Between the last block and `finish` the metadata still show what was complete before.
        is_finished = not self.incomplete and not self._n_unindexed
        if is_finished and header.consolidated is not None:
            now = consolidated_metadata(self._store, header)
            if header.consolidated != now and not _is_earlier(header.consolidated, now):
                self._add(DOCUMENT, "its consolidated metadata differ from the documents below it")

    def check_columns(self, header: Header, split: str) -> None:
        self._check_document(f"{split}/{DOCUMENT}", group_document({}))
        for name in header.splits[split].columns:
            with self.any_error(f"{split}/{name}"):
                read_column(self._store, header, split, name)
                array = StoredArray(self._store, f"{split}/{name}", header.splits[split].n_rows)
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
            rows_key = f"{array.key} rows {index * array.block_rows}+"
            where = array.chunk_key(index) if array.info.plain else rows_key
            with self.any_error(where):
                rows = array.block(index)[: committed.rows[index]]
                self.n_chunks += 1
                self.size_bytes += rows.nbytes
                if digest(rows) != committed.hashes[index]:
                    self._add(where, "the rows are not those that were committed")
                elif name != N_TOKENS and not np.isfinite(rows).all():
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


def _is_earlier(metadata: Mapping[str, JSON], now: Mapping[str, JSON] | None) -> bool:
    """Tell whether consolidated metadata are those of a writer that ended before it renewed them.

    They list fewer documents, with fewer rows or arrays, and nothing that is not so.
    """
    listed, known = metadata.get("metadata"), (now or {}).get("metadata")
    if not (isinstance(listed, dict) and isinstance(known, dict)):
        return False
    return {**metadata, "metadata": known} == now and all(
        key in known and _grew(document, known[key]) for key, document in listed.items()
    )


def _grew(earlier: JSON, now: JSON, name: str = "") -> bool:
    """Tell whether a document differs from an earlier one by more rows or more arrays alone."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        same = earlier.keys() == now.keys()
        return same and all(_grew(value, now[key], key) for key, value in earlier.items())
    if isinstance(earlier, list) and isinstance(now, list) and earlier and now:
        if name == "arrays":
            return all(array in now for array in earlier)
        n_rows, n_now = earlier[0], now[0]
        if name == "shape" and isinstance(n_rows, int) and isinstance(n_now, int):
            return n_rows <= n_now and earlier[1:] == now[1:]
    return bool(earlier == now)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Neighbouring blocks of one array, to be hashed by one process, here or elsewhere."""

    key: str  # of the array
    n_rows: int  # N
    block_rows: int  # R
    first: int  # block
    hashes: Sequence[str | None]  # what was committed of each block

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


def finalize(
    path: str | os.PathLike[str], *, only_new: bool = False, check: Check | None = None
) -> int:
    """Hash every committed chunk, then write indexes and consolidated metadata.

    It may be run again at any time; a closed cache keeps its bytes.

    Args:
        path: the cache's folder or URL.
        only_new: leave alone arrays that have an index, or that lack rows.
        check: who hashes; None does it in this process.

    Returns:
        How many chunks were hashed.

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
    return sum(len(part.hashes) for part in parts)


def _parts(sources: Sequence[StoredSource], *, only_new: bool) -> Iterator[Part]:
    for source, name in arrays_of(sources):
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
    counts = {f"{one.key}/{name}": one.n_missing(name) for one, name in arrays_of(sources)}
    missing = [f"{n:,} rows of {key}" for key, n in counts.items() if n]
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
