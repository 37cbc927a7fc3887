"""What a cache says about itself: data set, sources, splits, the names they may carry, and sizes.

The classes here are values; nothing in this module touches a disk. The specification is
`FORMAT.md`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from llmembed.cache_format.layout.documents import JSON
from llmembed.common.errors import CacheFormatError, ConfigError

FORMAT_VERSION = 1
MAX_LAYERS = 2**12
CHUNK_TARGET_BYTES = 8 * 2**20
MAX_BLOCKS = 2**24
MAX_BLOCK_ROWS = 1024
MIN_BLOCK_ROWS = 64
MAX_COLUMN_ROWS = 2**16
LABEL = "label"
TEXT_HASH = "text_hash"
N_TOKENS = "n_tokens"
RESERVED_NAMES = frozenset({LABEL, TEXT_HASH, N_TOKENS, "c", "zarr.json"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_ARRAY_NAME = re.compile(r"([A-Za-z0-9._-]+)/layer_(\d{3,4})")

ArrayKey: TypeAlias = tuple[str, int]
"""(pooling, layer): one feature array of a source."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The data set whose features a cache holds."""

    name: str
    """Its short name, such as "r8"."""
    labels: tuple[str, ...]
    """Class names; label k of the arrays is index k."""
    provenance: Mapping[str, JSON]
    """Where it came from: origin, text columns, limit, seed."""


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One backbone and its settings within a cache."""

    name: str
    """Its name in the cache, such as "smollm2-135m"."""
    fingerprint: Mapping[str, JSON]
    """Its identity: backbone, weights, tokenizer, template, ... compared key by key."""
    recipe: Mapping[str, JSON]
    """What predict needs to rebuild the extraction; not part of the identity."""
    hidden_size: int
    """H, the width of every layer."""
    n_layers: int
    """Layers of the whole model: 0..n_layers exist, 0 is the embedding."""


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The rows of a split, as the root document states them."""

    n_rows: int
    """N."""
    texts: str
    """xxh3-128 of the text_hash column, hexadecimal."""
    labels: str
    """xxh3-128 of the label column, hexadecimal."""


def check_name(kind: str, name: str) -> str:
    """Return a split's, source's or pooling's name if it may become a folder of the cache.

    >>> check_name("source", "smollm2-135m")
    'smollm2-135m'

    Raises:
        ConfigError: if the name is reserved or has other characters than letters, digits, `_`,
            `-` and single dots inside.
    """
    if len(name) > 100 or not _NAME.fullmatch(name) or name.casefold() in RESERVED_NAMES:
        raise ConfigError(
            f"{name[:100]!r} cannot name a {kind}. Allowed are letters, digits, '_', '-' "
            f"and single dots inside, at most 100 characters, and none of "
            f"{', '.join(sorted(RESERVED_NAMES))}. Choose another name."
        )
    return name


def foreign_name(kind: str, name: str, where: str) -> str:
    """Check a name that a cache states; like `check_name`, but the cache is to blame.

    Raises:
        CacheFormatError: if the name is not allowed.
    """
    try:
        return check_name(kind, name)
    except ConfigError as error:
        raise CacheFormatError(f"{where}: {error}") from error


def array_name(key: ArrayKey) -> str:
    """Name a feature array within its source.

    >>> array_name(("mean", 8))
    'mean/layer_008'
    """
    pooling, layer = key
    return f"{pooling}/layer_{layer:03d}"


def parse_array_name(name: str, where: str) -> ArrayKey:
    """Invert `array_name`.

    >>> parse_array_name("mean/layer_008", "here")
    ('mean', 8)

    Raises:
        CacheFormatError: if it names no feature array.
    """
    match = _ARRAY_NAME.fullmatch(name)
    if match is None or array_name((match[1], int(match[2]))) != name:
        raise CacheFormatError(f"{where}: {name[:100]!r} names no feature array.")
    return foreign_name("pooling", match[1], where), int(match[2])


def block_rows(n_rows: int, row_bytes: int) -> int:
    """Choose R, the rows of a chunk and of a committed block.

    The largest power of two with chunks of at most 8 MiB, 1,024 rows and a quarter of the split
    (so that a crash loses little of a small one), but at least 64 rows where 8 MiB allow them.

    >>> block_rows(1_000_000, 2 * 4096), block_rows(5485, 2 * 576), block_rows(10, 2 * 16)
    (1024, 1024, 64)
    """
    limit = min(MAX_BLOCK_ROWS, CHUNK_TARGET_BYTES // row_bytes, max(MIN_BLOCK_ROWS, n_rows // 4))
    return 1 << (max(1, limit).bit_length() - 1)


def column_rows(n_rows: int) -> int:
    """Choose the chunk rows of label and text_hash: a power of two up to 65,536.

    >>> column_rows(10), column_rows(5485), column_rows(10_000_000)
    (64, 8192, 65536)
    """
    return max(MIN_BLOCK_ROWS, min(MAX_COLUMN_ROWS, 1 << max(0, n_rows - 1).bit_length()))


def plan_bytes(n_rows: int, hidden_size: int, n_arrays: int, dtype: str = "float16") -> int:
    """Bytes on disk of that many feature arrays, padding of the edge chunks included.

    >>> plan_bytes(100, 16, 2)  # two chunks of 64 rows an array: 2 * 2 * (64 * 32 + 4)
    8208
    """
    row_bytes = hidden_size * {"float16": 2, "float32": 4}[dtype]
    rows = block_rows(n_rows, row_bytes)
    return n_arrays * -(-n_rows // rows) * (rows * row_bytes + 4)
