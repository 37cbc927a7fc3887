"""Read a cache: numpy out, mapped where the chunks allow, and never a row that was not committed.

`open_cache` reads one small document. Arrays as the writer leaves them (one chunk, one file of raw
rows) are mapped and copied by several threads; sharded or compressed exports go through
zarr-python, which is imported for them alone.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmembed.cache_format.layout.arrays import RowSelection, StoredArray, allocate, read_column
from llmembed.cache_format.layout.commits import SourceLayout, StoredSource, read_source
from llmembed.cache_format.layout.schema import (
    GROUP,
    LABEL,
    LABEL_SETS,
    N_TOKENS,
    TEXT_HASH,
    WEIGHT,
    ArrayKey,
    Header,
    array_name,
    require_header,
)
from llmembed.cache_format.stores import Store, open_store
from llmembed.common.errors import CacheError, CacheIncompleteError, ConfigError, hidden, shown

_MOST_SHOWN = 10  # splits


class Cache(Mapping[str, "Split"]):
    """A cache: a mapping of its splits, `cache["train"]` being one. Made by `open_cache`.

    Printed, it shows what it holds: a line a split.

    Attributes:
        path: the folder, or the URL of a remote cache.
        dataset: the `DatasetInfo`.
        labels: class names.
        splits: names of the splits, sorted.
        sources: `SourceInfo` by name.
        created: when the cache was created, ISO 8601.
        versions: of the software that created the cache.
        multilabel: whether a text may have several labels: `Split.label_sets`.
    """

    def __init__(self, store: Store, header: Header) -> None:
        self._store = store
        self._header = header
        self.path = store.path or store.location
        self.dataset = header.dataset
        self.labels = header.dataset.labels
        self.splits = tuple(sorted(header.splits))
        self.sources = dict(sorted(header.sources.items()))
        self.created = header.created
        self.versions = header.versions
        self.multilabel = any(split.label_sets for split in header.splits.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the features depend on: texts, labels, and the sources' identities."""
        return self._header.fingerprint()

    def fingerprint_of(self, *, splits: Collection[str], sources: Collection[str]) -> str:
        """Fingerprint that a cache of these splits and sources alone would have."""
        return self._header.fingerprint(splits, sources)

    def __getitem__(self, split: str) -> Split:
        if split not in self:
            where = f"{self._store.location} holds these splits."
            raise ConfigError.unknown("split", str(split), self.splits, where)
        return Split(self._store, self._header, split)

    def get(self, split: str, default: Any = None) -> Any:
        """Give a split, or what stands for one that does not exist."""
        try:
            return self[split]
        except ConfigError:
            return default

    def __contains__(self, split: object) -> bool:
        return split in self.splits

    def __iter__(self) -> Iterator[str]:
        return iter(self.splits)

    def __len__(self) -> int:
        return len(self.splits)

    def __bool__(self) -> bool:
        return True

    # As other objects, not by its content.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        classes = _counted(len(self.labels), "class")
        lines = [f"Cache {self._store.location}: {self.dataset.name}, {classes}"]
        lines += [f"  {self[name].summary}" for name in self.splits[:_MOST_SHOWN]]
        if len(self) > _MOST_SHOWN:
            lines.append(f"  and {len(self) - _MOST_SHOWN:,} more")
        return "\n".join(shown(hidden(line)) for line in lines)


class Split:
    """The rows of a split. Made by `cache[name]`.

    Attributes:
        name: such as "train".
        n_rows: N.
    """

    def __init__(self, store: Store, header: Header, name: str) -> None:
        self._store = store
        self._header = header
        self._info = header.splits[name]
        self.name = name
        self.n_rows = self._info.n_rows
        self._sources: dict[str, StoredSource] = {}  # once they were found

    def __len__(self) -> int:
        return self.n_rows

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return shown(hidden(f"Split {self.summary} ({self._store.location})"))

    @property
    def summary(self) -> str:
        """Name, rows, and the poolings and layers of each source, complete or not, in one line."""
        try:
            told = [f"{name}: {_told(layout)}" for name, layout in self.layouts.items()]
        except CacheError as error:
            told = [str(error)]
        features = "; ".join(told) or "no features"
        return f"{self.name}: {_counted(self.n_rows, 'row')}; {features}"

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """int32 `[N]`: class index, -1 where unlabelled, and where there are `label_sets`."""
        return self._column(LABEL)

    @cached_property
    def text_hash(self) -> NDArray[np.uint64]:
        """uint64 `[N]`: xxh3-64 of the texts."""
        return self._column(TEXT_HASH)

    @cached_property
    def label_sets(self) -> NDArray[np.int8] | None:
        """int8 `[N, C]`: 1 where a text has the label, 0 where not, a row of -1 is unlabelled.

        None where each text has one label.
        """
        return self._column(LABEL_SETS) if self._info.label_sets else None

    @cached_property
    def weights(self) -> NDArray[np.float32] | None:
        """float32 `[N]`: how much each example counts, at least 0; None if all count the same."""
        return self._column(WEIGHT) if self._info.weights else None

    @cached_property
    def groups(self) -> NDArray[np.uint64] | None:
        """uint64 `[N]`: examples that belong together have the same; None if none do.

        It is the xxh3-64 of the group's text.
        """
        return self._column(GROUP) if self._info.groups else None

    @cached_property
    def arrays(self) -> Mapping[tuple[str, str, int], int]:
        """Committed rows of each (source, pooling, layer); complete where they are `n_rows`."""
        return {
            (source, *key): self.n_rows - self._sources[source].n_missing(array_name(key))
            for source, layout in self.layouts.items()
            for key in layout.arrays
        }

    @property
    def layouts(self) -> Mapping[str, SourceLayout]:
        """Which arrays each source has in this split, complete or not."""
        found = ((name, self._find(name)) for name in sorted(self._header.sources))
        return {name: source.layout for name, source in found if source is not None}

    def committed(
        self, source: str, arrays: Sequence[ArrayKey], rows: slice
    ) -> tuple[NDArray[np.int32], dict[ArrayKey, NDArray[Any]]] | None:
        """Read n_tokens int32 `[n]` and features `[n, H]` of several arrays, verified.

        None unless all of these rows are committed.
        """
        stored = self._require(source)
        blocks = slice(rows.start // stored.block_rows, -(-rows.stop // stored.block_rows))
        read = []
        for name in (N_TOKENS, *(array_name(key) for key in arrays)):
            found = stored.commits(name)
            if (found.rows[blocks] < stored.expected[blocks]).any():
                return None
            read.append(stored.array(name, found.hashes).read(rows))
        return read[0], dict(zip(arrays, read[1:], strict=True))

    def layers(self, source: str | None = None, pooling: str | None = None) -> tuple[int, ...]:
        """List the complete layers of a source and pooling, ascending."""
        stored, pooling = self._resolve(source, pooling)
        return tuple(
            layer
            for (s, p, layer), n in self.arrays.items()
            if (s, p) == (stored.source, pooling) and n == self.n_rows
        )

    def n_tokens(self, source: str | None = None) -> NDArray[np.int32]:
        """int32 `[N]`: tokens of each text as the source's tokenizer and max_length give them."""
        return self._complete(self._require(source), N_TOKENS).read().copy()

    def features(
        self,
        layer: int,
        source: str | None = None,
        pooling: str | None = None,
        rows: RowSelection | None = None,
        *,
        verify: bool = False,
        allow_partial: bool = False,
    ) -> NDArray[Any]:
        """Read the features of one layer; 0 is the embedding.

        Args:
            layer: the number of the layer.
            source: None is the only one.
            pooling: None is the only one.
            rows: a slice, row numbers or a boolean mask; None is all.
            verify: hash what is read against what was committed.
            allow_partial: give NaN for rows that are not committed, instead of an error.

        Returns:
            `[N, H]` in the stored dtype (float16 unless asked otherwise), read-only where it is a
            view of the file.

        Raises:
            CacheIncompleteError: if rows are not committed.
            CacheCorruptError: if a chunk is missing, truncated, or not what was committed.
            ConfigError: for a source, pooling or layer that does not exist.
        """
        stored, pooling = self._resolve(source, pooling)
        name = self._array(stored, pooling, layer)
        if allow_partial:
            return self._partial(stored, name, rows)
        return self._complete(stored, name, verify=verify).read(rows)

    def _column(self, name: str) -> NDArray[Any]:
        return read_column(self._store, self._header, self.name, name).copy()

    def _complete(self, stored: StoredSource, name: str, *, verify: bool = False) -> StoredArray:
        found = stored.commits(name)
        missing = self.n_rows - int(found.rows.sum())
        if missing:
            raise CacheIncompleteError(
                f"{missing} of {self.n_rows} rows of {stored.key}/{name} in "
                f"{self._store.location} are not committed. Run llmembed-extract again with the "
                "same options to complete them, or pass allow_partial=True to get NaN for them."
            )
        array = stored.array(name, found.hashes if verify else None)
        is_count = name == N_TOKENS
        width = () if is_count else (self._hidden_size(stored),)
        array.require("int32" if is_count else stored.layout.dtype, width)
        return array

    def _partial(self, stored: StoredSource, name: str, rows: RowSelection | None) -> NDArray[Any]:
        layout, committed, array = stored.layout, stored.commits(name).rows, stored.array(name)
        width = self._hidden_size(stored)
        if (array.info.dtype, *array.info.shape[1:]) != (layout.dtype, width):
            array.require(layout.dtype, (width,))
        numbers = np.arange(self.n_rows)[slice(None) if rows is None else rows]
        block, offset = np.divmod(numbers, layout.block_rows)
        is_committed = offset < committed[block]
        out = allocate((len(numbers), width), array.info, self._store.location)
        out.fill(np.nan)
        out[is_committed] = array.read(numbers[is_committed])
        return out

    def _find(self, source: str) -> StoredSource | None:
        found = self._sources.get(source)
        found = found or read_source(self._store, self.name, self._info, source)
        if found is not None:
            self._sources[source] = found
        return found

    def _require(self, source: str | None) -> StoredSource:
        source = _only("source", source, sorted(self._header.sources), self._store.location)
        found = self._find(source)
        if found is None:
            raise CacheIncompleteError(
                f"source {source!r} has no features in split {self.name!r} of "
                f"{self._store.location} yet. Run llmembed-extract with --split {self.name}."
            )
        return found

    def _hidden_size(self, stored: StoredSource) -> int:
        return self._header.sources[stored.source].hidden_size

    def _resolve(self, source: str | None, pooling: str | None) -> tuple[StoredSource, str]:
        stored = self._require(source)
        poolings = sorted({p for p, _ in stored.layout.arrays})
        where = f"{self._store.location}, {stored.key}"
        return stored, _only("pooling", pooling, poolings, where)

    def _array(self, stored: StoredSource, pooling: str, layer: int) -> str:
        arrays = stored.layout.arrays
        if (pooling, layer) not in arrays:
            known = ", ".join(str(k) for p, k in arrays if p == pooling)
            raise ConfigError(
                f"layer {layer} of pooling {pooling!r} is not in {self._store.location}, "
                f"{stored.key}, which has layers {known}. Choose among them, or add it "
                f"with llmembed-extract --layers {layer}."
            )
        return array_name((pooling, layer))


def open_cache(path: str | os.PathLike[str]) -> Cache:
    """Open the cache in a folder or at a URL for reading.

    Raises:
        CacheNotFoundError: if nothing is there.
        CacheFormatError: if it is not a cache, or one of a newer format.
    """
    store = open_store(path)
    return Cache(store, require_header(store))


def _told(layout: SourceLayout) -> str:
    """Write which layers there are of which poolings, those of the same layers together."""
    layers: dict[str, list[str]] = {}
    for pooling, layer in layout.arrays:
        layers.setdefault(pooling, []).append(str(layer))
    poolings: dict[tuple[str, ...], list[str]] = {}
    for pooling, own in layers.items():
        poolings.setdefault(tuple(own), []).append(pooling)
    return " and ".join(
        f"{', '.join(names)} of layer{'s' * (len(own) > 1)} {', '.join(own)}"
        for own, names in poolings.items()
    )


def _counted(n: int, what: str) -> str:
    """Write a number of things.

    >>> _counted(1, "row"), _counted(2189, "row"), _counted(8, "class")
    ('1 row', '2,189 rows', '8 classes')
    """
    plural = "es" if what.endswith("s") else "s"
    return f"{n:,} {what}{plural if n != 1 else ''}"


def _only(kind: str, name: str | None, known: list[str], where: str) -> str:
    if name is None and len(known) == 1:
        return known[0]
    if name is None:
        raise ConfigError(
            f"{where} has {len(known)} {kind}s ({', '.join(known)}); say which with {kind}=."
        )
    if name not in known:
        raise ConfigError.unknown(kind, name, known, f"{where} holds these.")
    return name
