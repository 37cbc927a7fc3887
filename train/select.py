"""Which features of a cache a fit uses.

Without `--source`, `--layers` and `--pooling` a fit uses all that the cache holds; each of the
three options narrows that. A source takes what it has of the layers and poolings that are asked
for, so that `--pooling mean,pooler` fits a Llama and a BERT in one run; what no source has, and a
source that would contribute nothing, are errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from llmembed.cache_format import Cache, Split
from llmembed.cache_format.errors import ConfigError
from llmembed.train.config import FitConfig


class Feature(NamedTuple):
    """One array of the cache: a pooled hidden state of one layer of one source."""

    source: str
    pooling: str
    layer: int
    hidden_size: int

    def __str__(self) -> str:
        """Name it in messages."""
        return f"layer {self.layer} ({self.source}, {self.pooling})"


def select_features(cache: Cache, split: Split, config: FitConfig) -> tuple[Feature, ...]:
    """List the features of a split that a config asks for, by source, pooling and layer.

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
    sources = _named("source", config.source, (feature.source for feature in held))
    poolings = _named("pooling", config.pooling, (feature.pooling for feature in held))
    candidates = [f for f in held if f.source in sources and f.pooling in poolings]
    layers = chosen_layers(config.layers, {f.layer for f in candidates}, where)
    chosen = tuple(feature for feature in candidates if feature.layer in layers)
    for source in sources:
        if not any(feature.source == source for feature in chosen):
            raise ConfigError(_nothing_left(source, held, config))
    return chosen


def chosen_layers(specification: str | None, cached: Iterable[int], where: str) -> tuple[int, ...]:
    """Resolve `--layers` against the layers that are cached.

    Args:
        specification: numbers, ranges `start:stop:step`, `last:k` or `all`; None is `all`.
        cached: layers to choose from.
        where: split and cache, for messages.

    Raises:
        ConfigError: a part cannot be read, or names no cached layer.

    >>> chosen_layers("8,last:2", [8, 16, 24, 32], "split 'train'")
    (8, 24, 32)
    >>> chosen_layers("16:33:8", [8, 16, 24, 32], "split 'train'")
    (16, 24, 32)
    """
    held = sorted(cached)
    if specification is None:
        return tuple(held)
    parts = [part.strip() for part in specification.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"--layers is empty. Pass some of {_listed(held)}.")
    return tuple(sorted({layer for part in parts for layer in _resolve(part, held, where)}))


def _resolve(part: str, held: list[int], where: str) -> list[int]:
    try:
        named = _read_part(part, held)
    except ValueError as error:
        raise ConfigError(
            f"--layers has {part!r}, which is no layer. Write numbers (8,16), ranges "
            "(start:stop:step), last:2 or all."
        ) from error
    found = [layer for layer in held if layer in named]
    if not found:
        raise ConfigError(
            f"layer {part} is not in {where}, which holds layers {_listed(held)}. Pass some of "
            "these to --layers, or add the layer with llmembed-extract."
        )
    return found


def _read_part(part: str, held: list[int]) -> Iterable[int]:
    if part == "all":
        return held
    head, _, tail = part.partition(":")
    if head == "last":
        return held[-max(0, int(tail)) or len(held) :]
    if not tail:
        return [int(part)]
    bounds = slice(*(int(bound) if bound else None for bound in part.split(":")))
    return range(*bounds.indices(held[-1] + 1))


def _named(kind: str, asked: tuple[str, ...], held: Iterable[str]) -> tuple[str, ...]:
    known = tuple(dict.fromkeys(held))
    for name in asked:
        if name not in known:
            raise ConfigError.unknown(kind, name, known, f"Pass one to --{kind}.")
    return tuple(dict.fromkeys(asked)) or known


def _nothing_left(source: str, held: list[Feature], config: FitConfig) -> str:
    poolings = dict.fromkeys(f.pooling for f in held if f.source == source)
    layers = sorted({f.layer for f in held if f.source == source})
    return (
        f"source {source!r} has none of the features asked for (--layers {config.layers or 'all'}, "
        f"--pooling {','.join(config.pooling) or 'all'}): it holds layers {_listed(layers)} with "
        f"pooling {', '.join(poolings)}. Choose among these, or leave it out with --source."
    )


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
