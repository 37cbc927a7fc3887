"""Copy and merge: what is done with caches as a whole."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from llmembed.cache_format.layout.commits import COMMITS
from llmembed.cache_format.layout.documents import DOCUMENT
from llmembed.cache_format.layout.schema import Header, require_header
from llmembed.cache_format.reader import Cache, open_cache
from llmembed.cache_format.stores import HubStore, Store, open_store
from llmembed.cache_format.tools.target import check_target
from llmembed.cache_format.tools.verify import require_sound
from llmembed.cache_format.writing import (
    LOCK,
    SHARED,
    CacheWriter,
    refuse_if_held,
)
from llmembed.common.errors import (
    CacheCorruptError,
    listed,
    warn,
)
from llmembed.common.replace import check_outside

PathLike = str | os.PathLike[str]


def copy(source: PathLike, target: PathLike) -> int:
    """Copy a cache between folders, object stores and the Hub, verify the copy, count its files.

    A copy that was interrupted is taken up where it stopped: the root document comes last.
    """
    check_outside(target)
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
