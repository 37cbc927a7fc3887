"""Which features of a cache a fit uses.

A source takes what it has of the layers and poolings that are asked for, so that `--pooling
mean,pooler` fits a Llama and a BERT in one run; what no source has, and a source that would
contribute nothing, are errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from llmembed.cache_format import Cache, Split
from llmembed.common.errors import ConfigError
from llmembed.common.layers import layer_parts, named_layers
from llmembed.train.config import Reading

_REMEDIES = {
    "source": "Pass one to --source.",
    "pooling": "Pass one to --pooling, or add the pooling with llmembed-extract.",
}


class Feature(NamedTuple):
    """One array of the cache: a pooled hidden state of one layer of one source."""

    source: str
    pooling: str
    layer: int
    hidden_size: int

    def __str__(self) -> str:
        """Name it in messages."""
        return f"layer {self.layer} ({self.source}, {self.pooling})"


def select_features(cache: Cache, split: Split, reading: Reading) -> tuple[Feature, ...]:
    """List the features of a split that are asked for, by source, pooling and layer.

    Raises:
        ConfigError: a source, pooling or layer is unknown, or nothing is left of a source.
    """
    where = f"split {split.name!r} of {cache.path}"
    held = sorted(
        Feature(source, pooling, layer, cache.sources[source].hidden_size)
        for source, pooling, layer in split.arrays
    )
    if not held:
        raise ConfigError(f"{where} holds no features. Run llmembed-extract on it first.")
    sources = _named("source", reading.source, (feature.source for feature in held))
    poolings = _named("pooling", reading.pooling, (feature.pooling for feature in held))
    candidates = [f for f in held if f.source in sources and f.pooling in poolings]
    wanted = _at_layers(candidates, reading.layers, cache, where)
    chosen = tuple(feature for feature in candidates if feature in wanted)
    for source in sources:
        if not any(feature.source == source for feature in chosen):
            raise ConfigError(_nothing_left(source, held, reading))
    return chosen


def _at_layers(
    candidates: list[Feature], specification: str | None, cache: Cache, where: str
) -> set[Feature]:
    """Resolve `--layers` within each source, which counts layers of its own."""
    wanted: set[Feature] = set()
    for part in layer_parts("all" if specification is None else specification):
        found = set()
        for source in {feature.source for feature in candidates}:
            own = [feature for feature in candidates if feature.source == source]
            available = sorted({feature.layer for feature in own})
            named = named_layers(part, cache.sources[source].n_layers, available)
            found |= {feature for feature in own if feature.layer in named}
        if not found:
            raise ConfigError(_not_cached(part, candidates, cache, where))
        wanted |= found
    return wanted


def _not_cached(part: str, candidates: list[Feature], cache: Cache, where: str) -> str:
    held = "; ".join(
        f"{source} (of {cache.sources[source].n_layers} layers): "
        + _listed({feature.layer for feature in candidates if feature.source == source})
        for source in dict.fromkeys(feature.source for feature in candidates)
    )
    return (
        f"layer {part} is not in {where}, which holds {held}. Pass some of these to --layers, or "
        "add the layer with llmembed-extract."
    )


def _named(kind: str, asked: tuple[str, ...], held: Iterable[str]) -> tuple[str, ...]:
    known = tuple(dict.fromkeys(held))
    for name in asked:
        if name not in known:
            raise ConfigError.unknown(kind, name, known, _REMEDIES[kind])
    return tuple(dict.fromkeys(asked)) or known


def _nothing_left(source: str, held: list[Feature], reading: Reading) -> str:
    poolings = dict.fromkeys(f.pooling for f in held if f.source == source)
    layers = {f.layer for f in held if f.source == source}
    return (
        f"source {source!r} has none of the features asked for (--layers {reading.layers or 'all'},"
        f" --pooling {','.join(reading.pooling) or 'all'}): it holds layers {_listed(layers)} with "
        f"pooling {', '.join(poolings)}. Choose among these, or leave it out with --source."
    )


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
