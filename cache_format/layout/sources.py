"""Which arrays a source has in a split, and how they are cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmembed.cache_format.layout.columns import require_rows
from llmembed.cache_format.layout.commits import COMMITS, INDEX, Commits
from llmembed.cache_format.layout.documents import DOCUMENT, FEATURE_DTYPES, group_document, parse
from llmembed.cache_format.layout.header import Header
from llmembed.cache_format.layout.schema import (
    JSON,
    MAX_BLOCK_ROWS,
    N_TOKENS,
    ArrayKey,
    array_name,
    parse_array_name,
)
from llmembed.cache_format.stores.base import Store
from llmembed.common.errors import CacheFormatError


@dataclass(frozen=True, kw_only=True)
class SourceLayout:
    """The attributes of `<split>/<source>/zarr.json`."""

    block_rows: int
    """R: rows of a block, and of a chunk while the cache is not an export."""
    dtype: str
    """Of the features."""
    arrays: tuple[ArrayKey, ...]
    """(pooling, layer) of the arrays that exist, complete or not, sorted."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all arrays within the source, n_tokens included."""
        return (*(array_name(key) for key in self.arrays), N_TOKENS)

    def document(self) -> dict[str, JSON]:
        """Make the group document."""
        arrays = [array_name(key) for key in self.arrays]
        content = {"block_rows": self.block_rows, "dtype": self.dtype, "arrays": arrays}
        return group_document({"llmembed": content})


def read_layout(store: Store, split: str, source: str) -> SourceLayout | None:
    """Read which arrays a source has in a split; None if it has none.

    Raises:
        CacheFormatError: if the document is not one of ours.
    """
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


def layouts(store: Store, header: Header) -> Iterator[tuple[str, str, SourceLayout, Commits]]:
    """Yield split, source, layout and commits of everything a cache holds.

    Raises:
        CacheCorruptError: if a split claims rows for which there are no files.
    """
    for split, info in sorted(header.splits.items()):
        require_rows(store, split, info.n_rows)
        for source in sorted(header.sources):
            layout = read_layout(store, split, source)
            if layout is not None:
                commits = Commits(store, split, info, source, layout.block_rows)
                yield split, source, layout, commits


def purge_split(store: Store, split: str) -> None:
    """Delete what lies under a split that the root does not name."""
    for folder in (COMMITS, INDEX):
        store.delete_below(f"{folder}/{split}")
    store.delete_below(split)


def purge_source(store: Store, split: str, source: str) -> None:
    """Delete what lies under a source of a split that the root does not name."""
    for folder in (COMMITS, INDEX):
        store.delete_below(f"{folder}/{split}/{source}")
    store.delete_below(f"{split}/{source}")
