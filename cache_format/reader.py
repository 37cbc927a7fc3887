"""Read a cache: numpy out, mapped where the chunks allow, and never a row that was not committed.

`open_cache` reads one small document. Arrays as the writer leaves them (one chunk, one file of raw
rows) are mapped and copied by several threads; sharded or compressed exports go through
zarr-python, which is imported for them alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmembed.cache_format.chunks import fill_rows, read_rows, take_rows
from llmembed.cache_format.columns import LABEL, TEXT_HASH, read_column
from llmembed.cache_format.commits import Commits
from llmembed.cache_format.documents import ArrayInfo, read_array_info
from llmembed.cache_format.errors import (
    CacheCorruptError,
    CacheError,
    CacheIncompleteError,
    ConfigError,
)
from llmembed.cache_format.header import Header, require_header
from llmembed.cache_format.layout import SourceLayout, read_layout
from llmembed.cache_format.schema import (
    N_TOKENS,
    DatasetInfo,
    SourceInfo,
    array_name,
)
from llmembed.cache_format.store import Store, open_store

RowSelection: TypeAlias = "slice | Sequence[int] | NDArray[Any]"


class Cache(Mapping[str, "Split"]):
    """A cache: a mapping of split names to splits. Made by `open_cache`."""

    def __init__(self, store: Store, header: Header) -> None:
        self._store = store
        self._header = header

    @property
    def path(self) -> Path | str:
        """The folder, or the URL of a remote cache."""
        return self._store.path or self._store.location

    @property
    def dataset(self) -> DatasetInfo:
        """The data set."""
        return self._header.dataset

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names."""
        return self._header.dataset.labels

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        return tuple(sorted(self._header.splits))

    @property
    def sources(self) -> Mapping[str, SourceInfo]:
        """The sources by name."""
        return dict(sorted(self._header.sources.items()))

    @property
    def created(self) -> str:
        """When the cache was created, ISO 8601."""
        return self._header.created

    @property
    def versions(self) -> Mapping[str, Any]:
        """Versions of the software that created the cache."""
        return self._header.versions

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the features depend on: texts, labels, and the sources' identities."""
        return self._header.fingerprint()

    def __getitem__(self, split: str) -> Split:
        if split not in self._header.splits:
            raise CacheError.unknown(
                "split", split, self.splits, f"{self._store.location} holds these splits."
            )
        return Split(self._store, self._header, split)

    def __iter__(self) -> Any:
        return iter(self.splits)

    def __len__(self) -> int:
        return len(self.splits)


class Split:
    """The rows of a split. Made by `cache[name]`."""

    def __init__(self, store: Store, header: Header, name: str) -> None:
        self._store = store
        self._header = header
        self._info = header.splits[name]
        self.name = name
        self._layouts: dict[str, tuple[SourceLayout, Commits]] = {}

    @property
    def n_rows(self) -> int:
        """N."""
        return self._info.n_rows

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """int32 `[N]`: class index, -1 where unlabelled; read-only where it is mapped."""
        return read_column(self._store, self.name, LABEL, self._info)

    @cached_property
    def text_hash(self) -> NDArray[np.uint64]:
        """uint64 `[N]`: xxh3-64 of the texts."""
        return read_column(self._store, self.name, TEXT_HASH, self._info)

    @cached_property
    def arrays(self) -> Mapping[tuple[str, str, int], int]:
        """Committed rows of each (source, pooling, layer); complete where they are `n_rows`."""
        found = {}
        for source in sorted(self._header.sources):
            layout = self._layout(source)
            if layout is not None:
                for pooling, layer in layout[0].arrays:
                    n = layout[1].n_committed(array_name((pooling, layer)))
                    found[source, pooling, layer] = n
        return found

    def layers(self, source: str | None = None, pooling: str | None = None) -> tuple[int, ...]:
        """List the complete layers of a source and pooling, ascending."""
        source, pooling = self._resolve(source, pooling)
        return tuple(
            layer
            for (s, p, layer), n in self.arrays.items()
            if (s, p) == (source, pooling) and n == self.n_rows
        )

    def n_tokens(self, source: str | None = None) -> NDArray[np.int32]:
        """int32 `[N]`: tokens of each text as the source's tokenizer and max_length give them."""
        name = self._source(source)
        return self._read(name, N_TOKENS, None, verify=False, allow_partial=False)

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
        """Read the features of one layer.

        Args:
            layer: 0 is the embedding.
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
        source, pooling = self._resolve(source, pooling)
        name = self._array(source, pooling, layer)
        return self._read(source, name, rows, verify=verify, allow_partial=allow_partial)

    def stack(
        self,
        layers: Sequence[int],
        source: str | None = None,
        pooling: str | None = None,
        rows: RowSelection | None = None,
        *,
        verify: bool = False,
    ) -> NDArray[Any]:
        """Read several layers into one contiguous array `[L, N, H]`.

        The layer comes first because each layer then fills one contiguous stretch; `[N, L, H]`
        is a view away: `stack(...).swapaxes(0, 1)`. Raises what `features` raises.
        """
        source, pooling = self._resolve(source, pooling)
        names = [self._array(source, pooling, layer) for layer in layers]
        if not names:
            raise ConfigError("stack was given no layers; give at least one.")
        if rows is not None:
            read = [self._read(source, n, rows, verify=verify, allow_partial=False) for n in names]
            return np.stack(read)
        infos = [self._info_of(source, name) for name in names]
        out = np.empty((len(names), self.n_rows, *infos[0].shape[1:]), infos[0].numpy_dtype)
        for name, info, target in zip(names, infos, out, strict=True):
            hashes = self._complete_hashes(source, name)
            fill_rows(
                self._store,
                f"{self.name}/{source}/{name}",
                info,
                target,
                hashes if verify else None,
            )
        return out

    def _read(
        self,
        source: str,
        name: str,
        rows: RowSelection | None,
        *,
        verify: bool,
        allow_partial: bool,
    ) -> NDArray[Any]:
        info = self._info_of(source, name)
        key = f"{self.name}/{source}/{name}"
        if allow_partial:
            out = self._read_partial(source, name, key, info)
            return out if rows is None else out[rows]
        hashes = self._complete_hashes(source, name)
        if rows is None:
            return read_rows(self._store, key, info, self.n_rows, hashes if verify else None)
        chosen = np.arange(self.n_rows, dtype=np.int64)[rows]
        return take_rows(self._store, key, info, chosen, hashes if verify else None)

    def _read_partial(self, source: str, name: str, key: str, info: ArrayInfo) -> NDArray[Any]:
        commits = self._require_layout(source)[1].array(name)
        out = np.full((self.n_rows, *info.shape[1:]), np.nan, info.numpy_dtype)
        for block in np.flatnonzero(commits.rows):
            start, n = int(block) * info.chunk_rows, int(commits.rows[block])
            chosen = np.arange(start, start + n, dtype=np.int64)
            out[start : start + n] = take_rows(self._store, key, info, chosen)
        return out

    def _complete_hashes(self, source: str, name: str) -> tuple[str | None, ...]:
        commits = self._require_layout(source)[1]
        found = commits.array(name)
        missing = self.n_rows - int(found.rows.sum())
        if missing:
            raise CacheIncompleteError(
                f"{missing} of {self.n_rows} rows of {self.name}/{source}/{name} in "
                f"{self._store.location} are not committed. Run llmembed-extract again with the "
                "same options to complete them, or pass allow_partial=True to get NaN for them."
            )
        return found.hashes

    def _info_of(self, source: str, name: str) -> ArrayInfo:
        key = f"{self.name}/{source}/{name}"
        info = read_array_info(self._store, key)
        width = () if name == N_TOKENS else (self._header.sources[source].hidden_size,)
        if info.shape[1:] != width:
            raise CacheCorruptError(
                f"{self._store.location}/{key} has shape {info.shape}, but the source's hidden "
                f"size is {self._header.sources[source].hidden_size}. Extract the cache again."
            )
        return info

    def _layout(self, source: str) -> tuple[SourceLayout, Commits] | None:
        if source not in self._layouts:
            layout = read_layout(self._store, self.name, source)
            if layout is None:
                return None
            commits = Commits(self._store, self.name, self._info, source, layout.block_rows)
            self._layouts[source] = (layout, commits)
        return self._layouts[source]

    def _require_layout(self, source: str) -> tuple[SourceLayout, Commits]:
        layout = self._layout(source)
        if layout is None:
            raise CacheIncompleteError(
                f"source {source!r} has no features in split {self.name!r} of "
                f"{self._store.location} yet. Run llmembed-extract with --split {self.name}."
            )
        return layout

    def _source(self, source: str | None) -> str:
        return _only("source", source, sorted(self._header.sources), self._store.location)

    def _resolve(self, source: str | None, pooling: str | None) -> tuple[str, str]:
        source = self._source(source)
        poolings = sorted({p for p, _ in self._require_layout(source)[0].arrays})
        where = f"{self._store.location}, {self.name}/{source}"
        return source, _only("pooling", pooling, poolings, where)

    def _array(self, source: str, pooling: str, layer: int) -> str:
        layout = self._require_layout(source)[0]
        if (pooling, layer) not in layout.arrays:
            known = ", ".join(str(k) for p, k in layout.arrays if p == pooling)
            raise ConfigError(
                f"layer {layer} of pooling {pooling!r} is not in {self._store.location}, "
                f"{self.name}/{source}, which has layers {known}. Choose among them, or add it "
                f"with llmembed-extract --layers {layer}."
            )
        return array_name((pooling, layer))


def open_cache(path: str | os.PathLike[str]) -> Cache:
    """Open a cache for reading.

    Args:
        path: its folder or URL.

    Raises:
        CacheNotFoundError: if nothing is there.
        CacheFormatError: if it is not a cache, or one of a newer format.
    """
    store = open_store(path)
    return Cache(store, require_header(store))


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
