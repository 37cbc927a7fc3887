"""Which rows of which array count: the commit records, and the index made from them.

A record is written last, after every chunk it names, and created only if absent; rows without one
do not exist. Records are the truth; the index repeats what they say about one complete array, so
that a reader need not open thousands of them. An index that does not fit the split is ignored.

The document of a source's group says which arrays it has in a split and how many rows a block has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmembed.cache_format.layout.arrays import StoredArray, digest, in_parallel, require_rows
from llmembed.cache_format.layout.documents import (
    DOCUMENT,
    FEATURE_DTYPES,
    JSON,
    Fields,
    dump,
    group_document,
    parse,
)
from llmembed.cache_format.layout.schema import (
    FORMAT_VERSION,
    MAX_BLOCK_ROWS,
    MAX_BLOCKS,
    N_TOKENS,
    ArrayKey,
    Header,
    SplitInfo,
    array_name,
    parse_array_name,
)
from llmembed.cache_format.stores import HIDDEN, Store
from llmembed.common.errors import CacheFormatError, CacheMismatchError, shown

COMMITS = f"{HIDDEN}/commits"
INDEX = f"{HIDDEN}/index"
_HEX_DIGITS = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One committed block of rows of one or more arrays."""

    split: str
    source: str
    start: int  # first row, a multiple of R
    stop: int
    texts: str  # xxh3-128 of `text_hash[start:stop]`
    arrays: Mapping[str, str]  # xxh3-128 of the rows of each array, by its name within the source

    def key(self, block_rows: int) -> str:
        """Key of the record: block, rows, and which arrays, so that no two records share one."""
        arrays = xxhash.xxh3_64_hexdigest("\n".join(sorted(self.arrays)).encode())[:8]
        name = f"{self.start // block_rows:08d}-{self.stop - self.start:04d}-{arrays}.json"
        return f"{COMMITS}/{self.split}/{self.source}/{name}"

    def document(self) -> dict[str, JSON]:
        """Make the JSON document."""
        return {"format": FORMAT_VERSION, **vars(self)}


@dataclass(frozen=True, kw_only=True)
class OldRows:
    """What is committed of one block of an array: its leading rows, and their xxh3-128."""

    n_rows: int
    hash: str


@dataclass(frozen=True, kw_only=True)
class ArrayCommits:
    """What is committed of one array: leading rows of each block `[n_blocks]`, their xxh3-128."""

    rows: NDArray[np.int64]
    hashes: Sequence[str | None]

    def block(self, index: int) -> OldRows | None:
        """Say what is committed of one block, None if nothing is."""
        n_rows, found = int(self.rows[index]), self.hashes[index]
        return OldRows(n_rows=n_rows, hash=found) if n_rows and found else None


@dataclass(frozen=True, kw_only=True)
class SourceLayout:
    """The attributes of `<split>/<source>/zarr.json`."""

    block_rows: int  # R: rows of a block, and of a chunk while the cache is not an export
    dtype: str  # of the features
    arrays: tuple[ArrayKey, ...]  # those that exist, complete or not, sorted

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all arrays within the source, n_tokens included."""
        return (*(array_name(key) for key in self.arrays), N_TOKENS)

    def document(self) -> dict[str, JSON]:
        """Make the group document."""
        arrays = [array_name(key) for key in self.arrays]
        return group_document({"llmembed": vars(self) | {"arrays": arrays}})


class StoredSource:
    """What a split holds of a source: its arrays, and which of their rows are committed."""

    def __init__(
        self, store: Store, split: str, info: SplitInfo, source: str, layout: SourceLayout
    ) -> None:
        if info.n_rows > MAX_BLOCKS * layout.block_rows:
            raise CacheFormatError(
                f"{store.location}: split {split!r} claims {info.n_rows} rows in blocks of "
                f"{layout.block_rows}, more than {MAX_BLOCKS} blocks. The cache is damaged."
            )
        self._store = store
        self._info = info
        self._records: dict[str, Record] | None = None
        self.split, self.source, self.key = split, source, f"{split}/{source}"
        self.layout, self.block_rows = layout, layout.block_rows
        self.half_written: list[str] = []  # keys of records, once they were read

    @cached_property
    def expected(self) -> NDArray[np.int64]:
        """int64 `[n_blocks]`: how many rows each block has."""
        starts = np.arange(0, self._info.n_rows, self.block_rows, dtype=np.int64)
        return np.minimum(self.block_rows, self._info.n_rows - starts)

    def array(self, name: str, hashes: Sequence[str | None] | None = None) -> StoredArray:
        """Open an array, to be verified by the hashes that were committed of its blocks."""
        key, n_rows, rows = f"{self.key}/{name}", self._info.n_rows, self.block_rows
        return StoredArray(self._store, key, n_rows, block_rows=rows, hashes=hashes)

    def commits(self, name: str) -> ArrayCommits:
        """Say what is committed of an array, by its index or else by the records."""
        return self._by_index(name) or self._by_records(name)

    def n_missing(self, name: str) -> int:
        """Count the rows of an array that are not committed."""
        return int((self.expected - self.commits(name).rows).sum())

    def is_complete(self, name: str) -> bool:
        """Tell whether every row of an array is committed."""
        return bool((self.commits(name).rows == self.expected).all())

    def is_indexed(self, name: str) -> bool:
        """Tell whether an array has an index that fits."""
        return self._by_index(name) is not None

    def write_index(self, name: str) -> None:
        """Write the index of a complete array."""
        self._store.put(self.index_key(name), [self._index(name)])

    def index_agrees(self, name: str) -> bool:
        """Tell whether an array has no index, or one that says what the records say."""
        return self._store.get(self.index_key(name)) in (None, self._index(name))

    def index_key(self, name: str) -> str:
        """Key of an array's index."""
        return f"{INDEX}/{self.key}/{name}.json"

    def check_texts(self, text_hash: NDArray[np.uint64]) -> None:
        """Refuse records of other texts, among those that had to be read."""
        for key, record in (self._records or {}).items():
            if record.texts != digest(text_hash[record.start : record.stop]):
                raise CacheMismatchError(
                    f"{self._store.location}/{key} was committed for other texts in rows "
                    f"{record.start}-{record.stop}. Delete it and extract again."
                )

    def drop(self, lost: Mapping[str, set[int]]) -> None:
        """Delete half-written records; withdraw blocks of arrays, but not what else they record."""
        for key in [*self.half_written, *(self.index_key(name) for name in lost)]:
            self._store.delete(key)
        for key, record in self.records.items() if lost else ():
            block = record.start // self.block_rows
            kept = {k: v for k, v in record.arrays.items() if block not in lost.get(k, ())}
            if len(kept) < len(record.arrays):
                if kept:
                    rest = replace(record, arrays=kept)
                    self._store.put(rest.key(self.block_rows), [dump(rest.document())])
                self._store.delete(key)
        self._records = None

    def delete_superseded(self) -> None:
        """Delete the records whose every array has more rows of the block by a later record."""
        names = {name for record in self.records.values() for name in record.arrays}
        rows = {name: self._by_records(name).rows for name in names}
        for key, record in self.records.items():
            block, n = record.start // self.block_rows, record.stop - record.start
            if all(rows[name][block] > n for name in record.arrays):
                self._store.delete(key)

    @property
    def records(self) -> dict[str, Record]:
        """Every record by its key, read once; a half-written one is left out with a warning."""
        if self._records is None:
            folder = f"{COMMITS}/{self.key}"
            keys = [f"{folder}/{name}" for name in self._store.names(folder)]
            found = dict(zip(keys, in_parallel(self._store, self._read_record, keys), strict=True))
            self.half_written = [key for key, record in found.items() if record is None]
            self._records = {key: one for key, one in found.items() if one is not None}
        return self._records

    def _read_record(self, key: str) -> Record | None:
        where = shown(f"{self._store.location}/{key}")
        data = self._store.get(key) or b""
        try:
            fields = parse(data, where)
        except CacheFormatError:
            _log.warning("%s is half-written; its block does not count and is redone.", where)
            return None
        record = _parse_record(fields)
        ours = record.split == self.split and record.source == self.source
        fits = record.start % self.block_rows == 0 and record.stop <= self._info.n_rows
        if not (ours and fits and record.key(self.block_rows) == key):
            raise CacheFormatError(
                f"{where} is a record of rows {record.start}-{record.stop} of "
                f"{record.split[:100]!r}, {record.source[:100]!r}, which does not belong there: "
                f"{self.split!r} has {self._info.n_rows} rows in blocks of {self.block_rows}. "
                "Was it copied from another cache? Delete it and extract again."
            )
        return record

    def _by_records(self, name: str) -> ArrayCommits:
        rows = np.zeros(len(self.expected), np.int64)
        hashes: list[str | None] = [None] * len(rows)
        for record in self.records.values():
            block, n = record.start // self.block_rows, record.stop - record.start
            if name in record.arrays and n > rows[block]:
                rows[block], hashes[block] = n, record.arrays[name]
        return ArrayCommits(rows=rows, hashes=hashes)

    def _by_index(self, name: str) -> ArrayCommits | None:
        data = self._store.get(self.index_key(name))
        if data is None:
            return None
        try:
            fields = parse(data, f"{self._store.location}/{self.index_key(name)}")
            joined = fields.get("hashes", str)
        except CacheFormatError as error:
            _log.warning("The commit records are read instead: %s", error)
            return None
        head = self._index_head()
        fits = {key: fields.value.get(key) for key in head} == head
        if not fits or len(joined) != _HEX_DIGITS * len(self.expected):
            return None
        cuts = range(0, len(joined), _HEX_DIGITS)
        hashes = [joined[cut : cut + _HEX_DIGITS] for cut in cuts]
        return ArrayCommits(rows=self.expected, hashes=hashes)

    def _index(self, name: str) -> bytes:
        hashes = "".join(h or "" for h in self._by_records(name).hashes)
        return dump(self._index_head() | {"hashes": hashes})

    def _index_head(self) -> dict[str, JSON]:
        return {
            "format": FORMAT_VERSION,
            "n_rows": self._info.n_rows,
            "block_rows": self.block_rows,
            "texts": self._info.texts,
        }


def is_half_written(data: bytes) -> bool:
    """Tell whether a record is no JSON document, so that it does not count."""
    try:
        parse(data, "")
    except CacheFormatError:
        return True
    return False


def _parse_record(fields: Fields) -> Record:
    fields.integer("format", FORMAT_VERSION, FORMAT_VERSION)
    start = fields.integer("start", 0, 2**53)
    arrays = fields.fields("arrays")
    for name in arrays.value:
        arrays.get(name, str)
        if name != N_TOKENS:
            parse_array_name(name, fields.where)
    return Record(
        split=fields.get("split", str),
        source=fields.get("source", str),
        start=start,
        stop=fields.integer("stop", start + 1, start + MAX_BLOCK_ROWS),
        texts=fields.get("texts", str),
        arrays=arrays.value,
    )


def read_source(store: Store, split: str, info: SplitInfo, source: str) -> StoredSource | None:
    """Read which arrays a source has in a split; None if it has none."""
    layout = read_layout(store, split, source)
    if layout is None:
        return None
    require_rows(store, split, info.n_rows)
    return StoredSource(store, split, info, source, layout)


def read_layout(store: Store, split: str, source: str) -> SourceLayout | None:
    """Read the document of a source's group; None if there is none."""
    key = f"{split}/{source}/{DOCUMENT}"
    data = store.get(key)
    if data is None:
        return None
    where = f"{store.location}/{key}"
    fields = parse(data, where).fields("attributes").fields("llmembed")
    dtype = fields.get("dtype", str)
    if dtype not in FEATURE_DTYPES:
        raise CacheFormatError(f"{where}: dtype {dtype[:40]!r} is none of {FEATURE_DTYPES}.")
    return SourceLayout(
        block_rows=fields.integer("block_rows", 1, MAX_BLOCK_ROWS),
        dtype=dtype,
        arrays=tuple(sorted(parse_array_name(name, where) for name in fields.strings("arrays"))),
    )


def sources_of(store: Store, header: Header) -> Iterator[StoredSource]:
    """Yield everything a cache holds: the sources of each split."""
    for split, info in sorted(header.splits.items()):
        for source in sorted(header.sources):
            found = read_source(store, split, info, source)
            if found is not None:
                yield found


def arrays_of(sources: Iterable[StoredSource]) -> Iterator[tuple[StoredSource, str]]:
    """Yield each source with the name of each of its arrays."""
    return ((source, name) for source in sources for name in source.layout.names)


def purge(store: Store, below: str) -> None:
    """Delete what lies under a split, or a source of a split, that the root does not name."""
    for place in places(below):
        store.delete_below(place)


def places(below: str) -> tuple[str, str, str]:
    """Say where everything lies that is of a split, or of a source of a split."""
    return f"{COMMITS}/{below}", f"{INDEX}/{below}", below
