"""Copy, merge and remove: what is done to caches as a whole."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmembed.cache_format.layout.commits import COMMITS, purge, sources_of
from llmembed.cache_format.layout.documents import DOCUMENT, put_document
from llmembed.cache_format.layout.schema import Header, array_name, require_header
from llmembed.cache_format.reader import Cache, open_cache
from llmembed.cache_format.stores import HubStore, Store, open_store
from llmembed.cache_format.tools.target import check_target
from llmembed.cache_format.tools.verify import require_sound
from llmembed.cache_format.writing import (
    LOCK,
    SHARED,
    CacheWriter,
    WriterLock,
    consolidate,
    refuse_if_held,
)
from llmembed.common.errors import (
    CacheCorruptError,
    ConfigError,
    listed,
    warn,
)

PathLike = str | os.PathLike[str]


def copy(source: PathLike, target: PathLike) -> int:
    """Copy a cache between folders, object stores and the Hub, verify the copy, count its files.

    A copy that was interrupted is taken up where it stopped: the root document comes last.
    """
    origin, copied = open_store(source), open_store(target)
    header = require_header(origin)
    refuse_if_held(origin)
    keys = [key for key in origin.walk() if not key.startswith((LOCK, SHARED))]
    there = check_target(copied, set(keys).__contains__)
    copied.clear_leftovers()
    if isinstance(copied, HubStore):
        _warn_of_local_places(header, copied.location)
    missing = (key for key in keys if key not in there or key.endswith(".json"))
    copied.put_all((key, _whole(origin, key)) for key in sorted(missing, key=_copy_order))
    require_sound(copied)
    return len(keys)


def merge(target: PathLike, inputs: Sequence[PathLike]) -> dict[str, int]:
    """Add to a cache, made if need be, what others of the same data set hold, hashes verified.

    The result is how many blocks were added from each.
    """
    return {os.fspath(path): _merge_one(target, open_cache(path)) for path in inputs}


def remove(
    path: PathLike,
    *,
    split: str | None = None,
    source: str | None = None,
    pooling: str | None = None,
    layers: Sequence[int] = (),
) -> list[str]:
    """Remove what fits every given choice, and name it; if nothing does, that is an error.

    With `split` and `source` only, these go as a whole; with `pooling` or `layers`, single arrays.
    """
    if split is source is pooling is None and not layers:
        raise ConfigError(
            "nothing was chosen to remove. Pass --split, --source, --pooling or --layers; to "
            "remove a whole cache, delete its folder."
        )
    store = open_store(path)
    require_header(store)
    with WriterLock(store):
        header = require_header(store)
        header.require_known(store.location)
        if pooling is None and not layers:
            removed = _remove_groups(store, header, split, source)
        else:
            removed = _remove_arrays(store, header, (split, source, pooling), layers)
        consolidate(store, header)
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


def _whole(origin: Store, key: str) -> bytes:
    data = origin.get(key)
    if data is None:
        raise CacheCorruptError(f"{origin.location}/{key} vanished while it was copied. Try again.")
    return data


def _warn_of_local_places(header: Header, location: str) -> None:
    """Say which paths of this machine the copy will tell to whoever may read it."""
    told = [source.recipe.get("model") for source in header.sources.values()]
    told += header.dataset.provenance.values()
    paths = sorted({text for text in told if isinstance(text, str) and Path(text).is_absolute()})
    if paths:
        warn(
            f"who may read {location} reads there where things lie on this machine: "
            f"{listed(paths)}. Keep the data set private if nobody should."
        )


def _copy_order(key: str) -> tuple[int, str]:
    """Chunks, then the documents and records that speak of them, the root last."""
    if key == DOCUMENT:
        return 3, key
    if key.startswith(COMMITS):
        return 2, key
    return (1 if key.endswith(".json") else 0), key


def _merge_one(target: PathLike, cache: Cache) -> int:
    n_blocks = 0
    with CacheWriter(target, dataset=cache.dataset) as writer:
        for info in cache.sources.values():
            writer.add_source(info)
        for name in cache.splits:
            split = cache[name]
            writer.add_split(
                name,
                labels=split.labels,
                text_hash=split.text_hash,
                label_sets=split.label_sets,
                weights=split.weights,
                groups=split.groups,
            )
            for source, layout in split.layouts.items():
                for _, keys in itertools.groupby(layout.arrays, key=lambda key: key[0]):
                    plan = writer.plan(name, source, arrays=keys, dtype=layout.dtype)
                    for block in plan.blocks:
                        rows = slice(block.compute_from, block.stop)
                        found = split.committed(source, block.missing, rows)
                        if found is not None:
                            writer.write(plan, block, n_tokens=found[0], features=found[1])
                            n_blocks += 1
                writer.finish(name, source)
    return n_blocks


def _remove_groups(
    store: Store, header: Header, split: str | None, source: str | None
) -> list[str]:
    for kind, name, known in (("split", split, header.splits), ("source", source, header.sources)):
        if name is not None and name not in known:
            raise ConfigError.unknown(kind, name, list(known), "See llmembed-cache info.")
    splits = list(header.splits) if split is None else [split]
    removed = splits if source is None else [f"{name}/{source}" for name in splits]
    header.consolidated = None
    if source is None:
        for name in splits:
            del header.splits[name]
    elif split is None:
        del header.sources[source]
    header.save(store)
    for name in removed:
        purge(store, name)
    return removed


def _remove_arrays(
    store: Store,
    header: Header,
    chosen: tuple[str | None, str | None, str | None],
    layers: Sequence[int],
) -> list[str]:
    removed = []
    for source in sources_of(store, header):
        layout, key = source.layout, source.key
        gone = []
        for pooling, layer in layout.arrays:
            pairs = zip(chosen, (source.split, source.source, pooling), strict=True)
            fits = all(wanted in (None, name) for wanted, name in pairs)
            if fits and (not layers or layer in layers):
                gone.append((pooling, layer))
        if gone:
            kept = tuple(array for array in layout.arrays if array not in gone)
            put_document(store, f"{key}/{DOCUMENT}", replace(layout, arrays=kept).document())
            names = [array_name(array) for array in gone]
            source.drop({name: set(range(len(source.expected))) for name in names})
            empty_poolings = {pooling for pooling, _ in gone} - {pooling for pooling, _ in kept}
            for name in [*names, *empty_poolings]:
                store.delete_below(f"{key}/{name}")
            removed += [f"{key}/{name}" for name in names]
    return removed
