"""Find features that somebody has extracted, by fingerprint, before extracting them again.

A place is a folder or a URL that holds caches. What lies there is only used if it holds the very
texts, labels and sources that a suite names, every array complete and every hash sound; the name
of a cache means nothing. A remote cache is copied here once. Where nothing matches, the features
are extracted, if that is allowed, and must come out with the same fingerprint.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from regression.suites import CachePlan, named

from llmembed.cache_format import Cache, Split, open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import copy, require_sound
from llmembed.common.errors import (
    CacheError,
    CacheFormatError,
    CacheMismatchError,
    CacheNotFoundError,
)
from llmembed.common.layers import parse_layers
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus

VARIABLE = "LLMEMBED_CACHES"
COMMITTED = Path(__file__).parent / "caches"
WORK = Path(__file__).parents[2] / "build" / "bench" / "caches"


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where to look, and where to put what was fetched or extracted."""

    work: Path
    """Folder for copies and extractions; it is looked at first."""
    others: tuple[str, ...] = ()
    """Folders and URLs, in this order."""
    datasets: Mapping[str, str] = field(default_factory=dict)
    """Cache name -> data set to extract from, in place of the suite's."""
    may_extract: bool = False
    """Whether a cache that is nowhere is extracted."""


def places_of(options: argparse.Namespace) -> Places:
    """Read --work, --caches, --data and --extract, as far as a command has them.

    LLMEMBED_CACHES holds places separated by commas, since URLs hold colons.
    """
    listed = [place.strip() for place in os.environ.get(VARIABLE, "").split(",")]
    return Places(
        work=getattr(options, "work", WORK),
        others=(*getattr(options, "caches", ()), *filter(None, listed), str(COMMITTED)),
        datasets=named(getattr(options, "data", ())),
        may_extract=getattr(options, "extract", False),
    )


def require_cache(plan: CachePlan, places: Places) -> str:
    """Give the path of the cache that a plan names: found, copied here, or extracted.

    Raises:
        CacheNotFoundError: it is nowhere, and may not be extracted.
        CacheMismatchError: what was extracted is something else.
        CacheCorruptError: a hash does not hold.
    """
    looked_at = (str(places.work), *places.others)
    found, passed_over = find_cache(plan, looked_at)
    if found is None and places.may_extract:
        found = _extract(plan, places)
    if found is None:
        reasons = "".join(f"\n  {location}: {why}" for location, why in passed_over.items())
        raise CacheNotFoundError(
            f"no cache with the fingerprint {plan.fingerprint[:16]} of {plan.name} lies in "
            f"{', '.join(looked_at)}. Name another place with --caches or {VARIABLE}, or pass "
            f"--extract. {len(passed_over)} caches were passed over{':' if reasons else '.'}"
            + reasons
        )
    if "://" in found:
        target = places.work / f"{plan.name}-{plan.fingerprint[:16]}.zarr"
        copy(found, target)
        found = str(target)
    require_sound(open_store(found))
    return found


def find_cache(plan: CachePlan, places: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """Look through places in order for a cache with a plan's fingerprint.

    Returns:
        Its path or URL, None if there is none, and why each other cache was passed over.
    """
    passed_over: dict[str, str] = {}
    for place in places:
        for name in open_store(place).names(""):
            location = f"{place.rstrip('/')}/{name}"
            try:
                reason = mismatch(open_cache(location), plan)
            except (CacheNotFoundError, CacheFormatError):
                continue  # something else lies there
            except CacheError as error:
                reason = str(error)
            if reason is None:
                return location, passed_over
            passed_over[location] = reason
    return None, passed_over


def mismatch(cache: Cache, plan: CachePlan) -> str | None:
    """Say why a cache is not the one that a plan names; None if it is.

    Other sources may lie beside the plan's, but of these no layer may be missing or too many: fits
    use all that they find.
    """
    sources = [source.name for source in plan.sources]
    found = cache.fingerprint_of(splits=list(plan.splits), sources=sources)
    if found != plan.fingerprint:
        return f"its fingerprint is {found}, not {plan.fingerprint[:16]}"
    for split in plan.splits:
        arrays = cache[split].arrays
        for source in plan.sources:
            n_layers = cache.sources[source.name].n_layers
            layers = parse_layers(source.layers, n_layers, source.name)
            planned = {(pooling, layer) for pooling in source.pooling for layer in layers}
            held = {(pooling, layer) for name, pooling, layer in arrays if name == source.name}
            for kind, keys in (("lacks", planned - held), ("adds", held - planned)):
                if keys:
                    pooling, layer = min(keys)
                    return f"{split}/{source.name} {kind} {pooling}/layer_{layer:03d}"
            if any(arrays[source.name, *key] != cache[split].n_rows for key in planned):
                return f"{split}/{source.name} is incomplete"
    return None


def cached_texts(plan: CachePlan, dataset: str, cached: Split) -> list[str]:
    """Read the texts of a cached split.

    Raises:
        CacheMismatchError: they are not those of the cache, row by row.
    """
    limit = plan.splits[cached.name] or None
    corpus = load_corpus(DatasetOptions(dataset, splits=[cached.name], limit=limit))
    examples = corpus.splits[cached.name]
    if not np.array_equal(examples.text_hash, cached.text_hash):
        raise CacheMismatchError(
            f"the texts of {dataset}, split {cached.name}, are not those of the cache of "
            f"{plan.name}. Pass the texts that it was extracted from with --data {plan.name}=PATH."
        )
    return examples.batch(slice(None))


def _extract(plan: CachePlan, places: Places) -> str:
    cache = str(places.work / f"{plan.name}.zarr")
    dataset = places.datasets.get(plan.name, plan.dataset)
    for source in plan.sources:
        for split, limit in plan.splits.items():
            extract(
                ExtractConfig(
                    model=source.name,
                    layers=source.layers,
                    dataset=dataset,
                    split=(split,),
                    limit=limit or None,
                    cache=cache,
                    pooling=source.pooling,
                    max_length=source.max_length,
                    compute_dtype=source.compute_dtype,
                )
            )
    reason = mismatch(open_cache(cache), plan)
    if reason is not None:
        raise CacheMismatchError(
            f"{cache} was extracted from {dataset} and is not what the suite names: {reason}. "
            f"Pass the right texts with --data {plan.name}=PATH, or write the new fingerprint into "
            "the suite and accept its figures with --update."
        )
    return cache
