"""Refuse what contradicts the cache or cannot be: a data set, source, array, dtype or name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmembed.cache_format.layout.documents import FEATURE_DTYPES
from llmembed.cache_format.layout.schema import ArrayKey, DatasetInfo, SourceInfo, check_name
from llmembed.common.errors import CacheMismatchError, ConfigError


def check_free_name(kind: str, name: str, taken: Mapping[str, object]) -> None:
    """Refuse a name that differs from another of its kind only in case.

    Raises:
        ConfigError: naming both.
    """
    check_name(kind, name)
    for other in taken:
        if other != name and other.casefold() == name.casefold():
            raise ConfigError(
                f"{kind} {name!r} differs from {other!r} of the same cache only in case, which "
                "some file systems cannot tell apart. Choose another name."
            )


def check_dataset(known: DatasetInfo, given: DatasetInfo, location: str) -> None:
    """Refuse another data set than the one that the cache is of.

    Raises:
        CacheMismatchError: naming both values.
    """
    for key in ("name", "labels"):
        stored, new = getattr(known, key), getattr(given, key)
        if stored != new:
            raise CacheMismatchError(
                f"{location} is of a data set with {key} {stored!r}, but {new!r} was given. Give "
                "the same data set, or use another --cache."
            )


def check_source(known: SourceInfo, given: SourceInfo, location: str) -> None:
    """Refuse other settings under the name of a known source; each is named with both values.

    Raises:
        CacheMismatchError: naming every differing key with both values.
    """
    stored, new = _identity(known), _identity(given)
    differing = sorted(k for k in stored | new if stored.get(k) != new.get(k))
    if differing:
        parts = "; ".join(f"{k}: cache {stored.get(k)!r}, given {new.get(k)!r}" for k in differing)
        raise CacheMismatchError(
            f"source {known.name!r} of {location} was made otherwise: {parts}. Give the same "
            "settings, another --source name, or another --cache."
        )


def _identity(source: SourceInfo) -> dict[str, Any]:
    identity = {**source.fingerprint, "hidden_size": source.hidden_size}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in identity.items()}


def check_dtype(known: str, given: str, where: str) -> None:
    """Refuse another dtype than the stored one.

    Raises:
        CacheMismatchError: naming both.
    """
    if known != given:
        raise CacheMismatchError(
            f"{where} is stored as {known}, but {given} was asked for. Pass --dtype {known}, or "
            "another --source name or --cache."
        )


def check_arrays(
    source: SourceInfo, arrays: Iterable[ArrayKey], dtype: str
) -> tuple[ArrayKey, ...]:
    """Refuse a pooling, layer or dtype that a source cannot have; give the arrays sorted.

    Raises:
        ConfigError: naming it.
    """
    if dtype not in FEATURE_DTYPES:
        raise ConfigError.unknown("dtype", dtype, FEATURE_DTYPES, "Pass one to --dtype.")
    keys = tuple(sorted(set(arrays)))
    for pooling, layer in keys:
        check_name("pooling", pooling)
        if not 0 <= layer <= source.n_layers:
            raise ConfigError(
                f"layer {layer} does not exist in {source.name}, which has {source.n_layers} "
                f"layers (1-{source.n_layers}; 0 is the embeddings). Pass --layers within that "
                "range."
            )
    return keys
