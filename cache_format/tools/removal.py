"""Remove arrays, sources or splits, so that a kill at any moment costs no more than a second run.

First the documents and the root cease to name what goes, so that no reader is led to it; then it is
deleted. What a killed removal left lies there without a name: it fits the same choice again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from llmembed.cache_format.layout.commits import (
    StoredSource,
    places,
    purge,
    sources_of,
)
from llmembed.cache_format.layout.documents import DOCUMENT, put_document
from llmembed.cache_format.layout.schema import (
    N_TOKENS,
    ArrayKey,
    Header,
    array_name,
    check_name,
    parse_array_name,
    require_header,
)
from llmembed.cache_format.stores import Store, open_store
from llmembed.cache_format.writing import WriterLock, consolidate
from llmembed.common.errors import CacheFormatError, ConfigError


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What is to go: all that fits each of these; None and () fit everything."""

    split: str | None
    source: str | None
    pooling: str | None
    layers: Sequence[int]

    def fits(self, source: StoredSource, key: ArrayKey) -> bool:
        wanted = (self.split, self.source, self.pooling)
        found = (source.split, source.source, key[0])
        fits = all(one in (None, other) for one, other in zip(wanted, found, strict=True))
        return fits and (not self.layers or key[1] in self.layers)


def remove(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    source: str | None = None,
    pooling: str | None = None,
    layers: Sequence[int] = (),
) -> list[str]:
    """Remove what fits every given choice, and name it; if nothing does, that is an error.

    With `split` and `source` only, these go as a whole; with `pooling` or `layers`, single arrays.
    A removal that was interrupted is ended by the same choice.
    """
    if split is source is pooling is None and not layers:
        raise ConfigError(
            "nothing was chosen to remove. Pass --split, --source, --pooling or --layers; to "
            "remove a whole cache, delete its folder."
        )
    choice = _Choice(split=split, source=source, pooling=pooling, layers=layers)
    store = open_store(path)
    require_header(store)
    with WriterLock(store):
        header = require_header(store)
        header.require_known(store.location)
        if pooling is None and not layers:
            removed = _remove_groups(store, header, split, source)
        else:
            removed = _remove_arrays(store, header, choice)
    if not removed:
        raise ConfigError(f"nothing in {store.location} fits that choice; see llmembed-cache info.")
    return removed


def parse_layers(text: str) -> tuple[int, ...]:
    """Read layer numbers off a command line.

    >>> parse_layers("8,16")
    (8, 16)
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--layers {text!r} is no list of layer numbers such as 8,16.")
    return tuple(int(part) for part in parts)


def _remove_groups(
    store: Store, header: Header, split: str | None, source: str | None
) -> list[str]:
    splits = list(header.splits) if split is None else [split]
    removed = splits if source is None else [f"{name}/{source}" for name in splits]
    for kind, name, known in (("split", split, header.splits), ("source", source, header.sources)):
        if name is not None and name not in known and not _are_left(store, kind, name, removed):
            raise ConfigError.unknown(kind, name, list(known), "See llmembed-cache info.")
    if source is None:
        for name in splits:
            header.splits.pop(name, None)
    elif split is None:
        header.sources.pop(source, None)
    else:
        store.delete(f"{split}/{source}/{DOCUMENT}")
    consolidate(store, header)
    for name in removed:
        purge(store, name)
    return removed


def _are_left(store: Store, kind: str, name: str, keys: Sequence[str]) -> bool:
    """Tell whether a removal of these groups was interrupted after the root forgot the name."""
    try:
        check_name(kind, name)
    except ConfigError:
        return False
    return any(store.names(place) for key in keys for place in places(key))


def _remove_arrays(store: Store, header: Header, choice: _Choice) -> list[str]:
    sources = list(sources_of(store, header))
    gone = [sorted(key for key in _arrays(store, s) if choice.fits(s, key)) for s in sources]
    for source, keys in zip(sources, gone, strict=True):
        if keys:
            kept = tuple(key for key in source.layout.arrays if key not in keys)
            document = replace(source.layout, arrays=kept).document()
            put_document(store, f"{source.key}/{DOCUMENT}", document)
    consolidate(store, header)
    removed = []
    for source, keys in zip(sources, gone, strict=True):
        names = [array_name(key) for key in keys]
        if names:
            source.drop({name: set(range(len(source.expected))) for name in names})
        for name in names:
            store.delete_below(f"{source.key}/{name}")
        _delete_empty_poolings(store, source.key)
        removed += [f"{source.key}/{name}" for name in names]
    return removed


def _arrays(store: Store, source: StoredSource) -> set[ArrayKey]:
    """Find the arrays of a source, those that its document does not name, too."""
    names = {name for record in source.records.values() for name in record.arrays}
    for pooling in store.names(source.key):
        names |= {f"{pooling}/{layer}" for layer in store.names(f"{source.key}/{pooling}")}
    found = set(source.layout.arrays)
    for name in names:
        with suppress(CacheFormatError):  # n_tokens, documents, chunks
            found.add(parse_array_name(name, source.key))
    return found


def _delete_empty_poolings(store: Store, key: str) -> None:
    for pooling in store.names(key):
        within = store.names(f"{key}/{pooling}")
        if pooling not in (N_TOKENS, DOCUMENT) and set(within) <= {DOCUMENT}:
            store.delete_below(f"{key}/{pooling}")
