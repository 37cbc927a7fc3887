"""What a cache says about itself: data set, splits, sources, and the root document with all three.

A split or a source exists once the root names it, and it is replaced atomically, so everything
else under those names may be half-done at any moment. The specification is `FORMAT.md`.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.metadata
import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import xxhash

from llmembed.cache_format.layout.documents import (
    DOCUMENT,
    JSON,
    MAX_HIDDEN_SIZE,
    MAX_ROWS,
    Fields,
    dump,
    group_document,
    parse,
    put_document,
)
from llmembed.cache_format.stores import HIDDEN, Store
from llmembed.common.errors import (
    CacheCorruptError,
    CacheFormatError,
    CacheNotFoundError,
    ConfigError,
)

FORMAT_VERSION = 1
MINOR_VERSION = 1  # what older readers may ignore, and writers may not
MAX_LAYERS = 2**12
CHUNK_TARGET_BYTES = 8 * 2**20
MAX_BLOCKS = 2**24
MAX_BLOCK_ROWS = 1024
MIN_BLOCK_ROWS = 64
MAX_COLUMN_ROWS = 2**16
LABEL, TEXT_HASH, N_TOKENS = "label", "text_hash", "n_tokens"
LABEL_SETS, WEIGHT, GROUP = "labels", "weight", "group"  # of minor version 1, where they are given
UNLABELLED = -1
COLUMN_FIELDS: Mapping[str, str] = {  # column of a split -> field of `SplitInfo` with its hash
    LABEL: "labels",
    TEXT_HASH: "texts",
    LABEL_SETS: "label_sets",
    WEIGHT: "weights",
    GROUP: "groups",
}
_FIRST_RESERVED = frozenset({LABEL, TEXT_HASH, N_TOKENS, "c", "zarr.json"})  # by minor version 0
RESERVED_NAMES = _FIRST_RESERVED | {LABEL_SETS, WEIGHT, GROUP}
CONVENTION: Mapping[str, JSON] = {
    "name": "llmembed",
    "uuid": "5e0d3d0c-7a3f-4f0e-9a55-3c0b6f4b6a10",
    "description": "Pooled hidden states of frozen language models; see attribute llmembed",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_ARRAY_NAME = re.compile(r"([A-Za-z0-9._-]+)/layer_(\d{3,4})")

ArrayKey: TypeAlias = tuple[str, int]  # (pooling, layer): one feature array of a source


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The data set whose features a cache holds."""

    name: str  # short, such as "r8"
    labels: tuple[str, ...]  # class names; label k of the arrays is index k
    provenance: Mapping[str, JSON]  # where it came from: origin, text columns, limit, seed


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One backbone and its settings within a cache."""

    name: str  # in the cache, such as "smollm2-135m"
    fingerprint: Mapping[str, JSON]  # identity: backbone, weights, ...; compared key by key
    recipe: Mapping[str, JSON]  # what predict needs to rebuild the extraction; no identity
    hidden_size: int  # H, the width of every layer
    n_layers: int  # of the whole model: 0..n_layers exist, 0 is the embedding
    prompts: Mapping[str, JSON] = field(default_factory=dict)  # name -> text behind each text


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The rows of a split: their number, and the xxh3-128 of each of its columns."""

    n_rows: int
    texts: str  # of text_hash
    labels: str  # of label
    label_sets: str | None = None  # of labels; None where each text has one label at most
    weights: str | None = None  # of weight; None where all rows weigh the same
    groups: str | None = None  # of group; None where no rows belong together

    def hash_of(self, column: str) -> str | None:
        """xxh3-128 of a column; None if the split has none of that name."""
        found: str | None = vars(self)[COLUMN_FIELDS[column]]
        return found

    @property
    def columns(self) -> list[str]:
        """Names of the columns that the split has, label and text_hash first."""
        return [name for name in COLUMN_FIELDS if self.hash_of(name) is not None]

    def document(self) -> dict[str, JSON]:
        """Make the part of the root document."""
        return {key: value for key, value in vars(self).items() if value is not None}


def check_name(kind: str, name: str, reserved: Collection[str] = RESERVED_NAMES) -> None:
    """Refuse the name of a split, source or pooling that may not become a folder of the cache."""
    if len(name) > 100 or not _NAME.fullmatch(name) or name.casefold() in reserved:
        raise ConfigError(
            f"{name[:100]!r} cannot name a {kind}. Allowed are letters, digits, '_', '-' "
            f"and single dots inside, at most 100 characters, and none of "
            f"{', '.join(sorted(reserved))}. Choose another name."
        )


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
    """
    match = _ARRAY_NAME.fullmatch(name)
    if match is None or array_name((match[1], int(match[2]))) != name:
        raise CacheFormatError(f"{where}: {name[:100]!r} names no feature array.")
    _check_foreign_name("pooling", match[1], where)
    return match[1], int(match[2])


def block_rows(n_rows: int, row_bytes: int) -> int:
    """Choose R, the rows of a chunk and of a committed block.

    The largest power of two with chunks of at most 8 MiB, 1,024 rows and a quarter of the split
    (so that a crash loses little of a small one), but at least 64 rows where 8 MiB allow them.

    >>> block_rows(1_000_000, 2 * 4096), block_rows(5485, 2 * 576), block_rows(10, 2 * 16)
    (1024, 1024, 64)
    """
    limit = min(MAX_BLOCK_ROWS, CHUNK_TARGET_BYTES // row_bytes, max(MIN_BLOCK_ROWS, n_rows // 4))
    return 1 << (max(1, limit).bit_length() - 1)


def column_rows(n_rows: int, row_bytes: int = 1) -> int:
    """Choose the chunk rows of a column: a power of two up to 65,536, with chunks of 8 MiB at most.

    >>> column_rows(10), column_rows(5485), column_rows(10_000_000), column_rows(10_000_000, 1000)
    (64, 8192, 65536, 8192)
    """
    enough = max(MIN_BLOCK_ROWS, 1 << max(0, n_rows - 1).bit_length())
    return min(enough, MAX_COLUMN_ROWS, 1 << ((CHUNK_TARGET_BYTES // row_bytes).bit_length() - 1))


@dataclass(kw_only=True)
class Header:
    """The content of the root document; what it names exists."""

    dataset: DatasetInfo
    created: str  # ISO 8601; SOURCE_DATE_EPOCH is honoured
    versions: Mapping[str, JSON]  # of the software that created the cache
    splits: dict[str, SplitInfo] = field(default_factory=dict)
    sources: dict[str, SourceInfo] = field(default_factory=dict)
    consolidated: Mapping[str, JSON] | None = None  # Zarr's, of all complete arrays; None: no array
    minor_found: int = 0  # of the document that was read; it may be newer than what is known here

    @classmethod
    def new(cls, dataset: DatasetInfo) -> Header:
        """Make the header of a cache that has no split and no source yet."""
        moment = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
        created = dt.datetime.fromtimestamp(moment, dt.UTC).isoformat()
        versions = {name: importlib.metadata.version(name) for name in ("llmembed-cache", "numpy")}
        return cls(dataset=dataset, created=created, versions=versions)

    def document(self) -> dict[str, JSON]:
        """Make the root's `zarr.json`."""
        sources = {name: _source_content(one) for name, one in self.sources.items()}
        content = {
            "format": FORMAT_VERSION,
            "created": self.created,
            "versions": self.versions,
            "dataset": vars(self.dataset),
            "splits": {name: split.document() for name, split in self.splits.items()},
            "sources": sources,
        }
        has_columns = any(one.columns != [LABEL, TEXT_HASH] for one in self.splits.values())
        if has_columns or any(source.prompts for source in self.sources.values()):
            content["minor"] = MINOR_VERSION
        content["digest"] = content_digest(content)
        document = group_document({"zarr_conventions": [CONVENTION], "llmembed": content})
        if self.consolidated is not None:
            document["consolidated_metadata"] = self.consolidated
        return document

    @property
    def is_newer(self) -> bool:
        """Whether the cache may say more than is known here, which a writer would lose."""
        return self.minor_found > MINOR_VERSION

    def require_known(self, location: str) -> None:
        """Refuse to write where something would be lost that a newer version put there."""
        if self.is_newer:
            raise CacheFormatError(
                f"{location} is of cache format {FORMAT_VERSION}.{self.minor_found}; this version "
                f"of llmembed reads it, but writes up to format {FORMAT_VERSION}.{MINOR_VERSION}. "
                "Upgrade with `pip install --upgrade llmembed-cache`, or use another --cache."
            )

    def save(self, store: Store) -> None:
        """Write the root document, unless it is there as it is."""
        self.require_known(store.location)
        put_document(store, DOCUMENT, self.document())

    def fingerprint(
        self, splits: Collection[str] | None = None, sources: Collection[str] | None = None
    ) -> str:
        """SHA-256 of what features of these splits and sources depend on; None is all."""
        chosen = self.splits if splits is None else self.splits.keys() & splits
        used = self.sources if sources is None else self.sources.keys() & sources
        identity = {
            "labels": self.dataset.labels,
            "splits": {name: self.splits[name].document() for name in chosen},
            "sources": {name: self.sources[name].fingerprint for name in used},
        }
        return hashlib.sha256(dump(identity)).hexdigest()


def content_digest(content: Mapping[str, JSON]) -> str:
    """xxh3-128 of the content without its digest, so that a flipped bit is found."""
    return xxhash.xxh3_128_hexdigest(dump(_without("digest", content)))


def read_header(store: Store) -> Header | None:
    """Read the root document; None if there is none."""
    data, location, where = store.get(DOCUMENT), store.location, f"{store.location}/{DOCUMENT}"
    if data is None:
        return None
    document = parse(data, where)
    attributes = document.value.get("attributes")
    if not isinstance(attributes, dict) or "llmembed" not in attributes:
        raise _not_a_cache(location)
    fields = Fields(attributes["llmembed"], f"{where}: llmembed")
    version = fields.integer("format", 1, 2**31)
    if version > FORMAT_VERSION:
        raise CacheFormatError(
            f"{location} is of cache format {version}; this version of llmembed reads up to format "
            f"{FORMAT_VERSION}. Upgrade with `pip install --upgrade llmembed-cache`."
        )
    if fields.get("digest", str) != content_digest(fields.value):
        raise CacheCorruptError(
            f"{where}: the attribute llmembed is not as it was written (its digest differs). "
            "Restore the file from a copy, or delete the cache and extract it again."
        )
    consolidated = document.value.get("consolidated_metadata")
    if consolidated is not None:
        document.fields("consolidated_metadata").fields("metadata")
    dataset = fields.fields("dataset")
    return Header(
        dataset=DatasetInfo(
            name=dataset.get("name", str),
            labels=dataset.strings("labels"),
            provenance=dataset.get("provenance", dict),
        ),
        created=fields.get("created", str),
        versions=fields.get("versions", dict),
        splits={
            name: SplitInfo(
                n_rows=split.integer("n_rows", 0, MAX_ROWS),
                texts=split.get("texts", str),
                labels=split.get("labels", str),
                label_sets=split.optional("label_sets", str),
                weights=split.optional("weights", str),
                groups=split.optional("groups", str),
            )
            for name, split in _named(fields, "split").items()
        },
        sources={
            name: SourceInfo(
                name=name,
                fingerprint=source.get("fingerprint", dict),
                recipe=source.get("recipe", dict),
                hidden_size=source.integer("hidden_size", 1, MAX_HIDDEN_SIZE),
                n_layers=source.integer("n_layers", 0, MAX_LAYERS),
                prompts=_prompts(source),
            )
            for name, source in _named(fields, "source").items()
        },
        consolidated=consolidated,
        minor_found=fields.integer("minor", 0, 2**31) if "minor" in fields.value else 0,
    )


def read_own_header(store: Store) -> Header | None:
    """Read the root document where a cache may be written; None if there is none yet."""
    # Asked in this order: another writer may begin a cache meanwhile, and its header comes first.
    is_taken = store.is_folder() is False or set(store.names("")) - {HIDDEN}
    header = read_header(store)
    if header is None and is_taken:
        raise _not_a_cache(store.location)
    return header


def require_header(store: Store) -> Header:
    """Read the root document of a cache that must exist."""
    is_taken = store.is_folder() is not None  # asked first, for a cache may begin meanwhile
    header = read_header(store)
    if header is not None:
        return header
    if is_taken:
        raise _not_a_cache(store.location)
    raise CacheNotFoundError(
        f"there is no cache at {store.location}. Make one with llmembed-extract, or check the path."
    )


def _not_a_cache(location: str) -> CacheFormatError:
    return CacheFormatError(
        f"{location} exists and is not a cache (it has no zarr.json with the attribute llmembed). "
        "It is left as it is; choose another path with --cache."
    )


def _without(key: str, content: Mapping[str, JSON]) -> dict[str, JSON]:
    return {name: value for name, value in content.items() if name != key}


def _source_content(source: SourceInfo) -> dict[str, JSON]:
    content = _without("name", vars(source))
    return content if source.prompts else _without("prompts", content)


def _prompts(source: Fields) -> dict[str, JSON]:
    """Read the prompts of a source, which caches without any do not have."""
    if "prompts" not in source.value:
        return {}
    prompts: dict[str, JSON] = source.get("prompts", dict)
    for name, text in prompts.items():
        _check_foreign_name("prompt", name, source.where)
        if not isinstance(text, str):
            raise CacheFormatError(f"{source.where}: prompt {name!r} is no text.")
    return prompts


def _named(fields: Fields, kind: str) -> dict[str, Fields]:
    group = fields.fields(f"{kind}s")
    for name in group.value:
        _check_foreign_name(kind, name, group.where)
    return {name: group.fields(name) for name in group.value}


def _check_foreign_name(kind: str, name: str, where: str) -> None:
    try:
        check_name(kind, name, _FIRST_RESERVED)
    except ConfigError as error:
        raise CacheFormatError(f"{where}: {error}") from error
