"""The root document of a cache: the one place that says which data set, splits and sources exist.

A split or a source exists once the root names it, and it is replaced atomically, so everything
else under those names may be half-done at any moment.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import xxhash

from llmembed.cache_format.layout.documents import DOCUMENT, dump, group_document, parse
from llmembed.cache_format.layout.schema import (
    FORMAT_VERSION,
    HIDDEN,
    JSON,
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_ROWS,
    DatasetInfo,
    Fields,
    SourceInfo,
    SplitInfo,
    foreign_name,
)
from llmembed.cache_format.stores.base import Store
from llmembed.common.errors import CacheCorruptError, CacheFormatError, CacheNotFoundError

_Info = TypeVar("_Info", SplitInfo, SourceInfo)

CONVENTION: Mapping[str, JSON] = {
    "name": "llmembed",
    "uuid": "5e0d3d0c-7a3f-4f0e-9a55-3c0b6f4b6a10",
    "description": "Pooled hidden states of frozen language models; see attribute llmembed",
}


@dataclass(kw_only=True)
class Header:
    """The content of the root document."""

    dataset: DatasetInfo
    """The data set."""
    created: str
    """When, ISO 8601; SOURCE_DATE_EPOCH is honoured."""
    versions: Mapping[str, JSON]
    """Versions of the software that created the cache."""
    splits: dict[str, SplitInfo] = field(default_factory=dict)
    """The splits that exist."""
    sources: dict[str, SourceInfo] = field(default_factory=dict)
    """The sources that exist."""
    consolidated: Mapping[str, JSON] | None = None
    """Zarr's consolidated metadata: the documents of all complete arrays, None while there are
    none."""

    @classmethod
    def new(cls, dataset: DatasetInfo) -> Header:
        """Make the header of a cache that has no split and no source yet."""
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        now = dt.datetime.now(dt.UTC)
        moment = dt.datetime.fromtimestamp(int(epoch), dt.UTC) if epoch else now
        versions = {name: importlib.metadata.version(name) for name in ("llmembed-cache", "numpy")}
        created = moment.replace(microsecond=0).isoformat()
        return cls(dataset=dataset, created=created, versions=versions)

    def document(self) -> dict[str, JSON]:
        """Make the root's `zarr.json`."""
        content = {
            "format": FORMAT_VERSION,
            "created": self.created,
            "versions": self.versions,
            "dataset": vars(self.dataset),
            "splits": {name: vars(split) for name, split in self.splits.items()},
            "sources": {name: _without_name(source) for name, source in self.sources.items()},
        }
        content["digest"] = content_digest(content)
        document = group_document({"zarr_conventions": [CONVENTION], "llmembed": content})
        if self.consolidated is not None:
            document["consolidated_metadata"] = self.consolidated
        return document

    def fingerprint(
        self, splits: Collection[str] | None = None, sources: Collection[str] | None = None
    ) -> str:
        """SHA-256 of what the features depend on: texts, labels, and the sources' identities.

        Args:
            splits: None is all.
            sources: None is all.
        """
        identity = {
            "labels": self.dataset.labels,
            "splits": {
                name: vars(split)
                for name, split in self.splits.items()
                if splits is None or name in splits
            },
            "sources": {
                name: source.fingerprint
                for name, source in self.sources.items()
                if sources is None or name in sources
            },
        }
        return hashlib.sha256(dump(identity)).hexdigest()


def read_header(store: Store) -> Header | None:
    """Read the root document; None if there is none.

    Raises:
        CacheFormatError: if it is not one of ours, or of a newer format.
    """
    data = store.get(DOCUMENT)
    return None if data is None else _parse_header(data, store.location)


def read_own_header(store: Store) -> Header | None:
    """Read the root document where a cache is to be written; None if there is none yet.

    Raises:
        CacheFormatError: if anything else than a cache, or the start of one, is there.
    """
    # Asked in this order: another writer may begin a cache meanwhile, and its header comes first.
    is_taken = store.is_folder() is False or set(store.names("")) - {HIDDEN}
    header = read_header(store)
    if header is None and is_taken:
        raise CacheFormatError(not_a_cache(store.location))
    return header


def require_header(store: Store) -> Header:
    """Read the root document of a cache that must exist.

    Raises:
        CacheNotFoundError: if nothing is there.
        CacheFormatError: if something else is there.
    """
    is_taken = store.is_folder() is not None  # asked first, for a cache may begin meanwhile
    header = read_header(store)
    if header is not None:
        return header
    if is_taken:
        raise CacheFormatError(not_a_cache(store.location))
    raise CacheNotFoundError(
        f"there is no cache at {store.location}. Make one with llmembed-extract, or check the path."
    )


def not_a_cache(location: str) -> str:
    """Say that something else lies where a cache is expected."""
    return (
        f"{location} exists and is not a cache (it has no zarr.json with the attribute llmembed). "
        "It is left as it is; choose another path with --cache."
    )


def _parse_header(data: bytes, location: str) -> Header:
    where = f"{location}/{DOCUMENT}"
    document = parse(data, where)
    attributes = document.value.get("attributes")
    if not isinstance(attributes, dict) or "llmembed" not in attributes:
        raise CacheFormatError(not_a_cache(location))
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
    return Header(
        dataset=_parse_dataset(fields.fields("dataset")),
        created=fields.get("created", str),
        versions=fields.get("versions", dict),
        splits=_named(fields, "split", _parse_split),
        sources=_named(fields, "source", _parse_source),
        consolidated=_parse_consolidated(document),
    )


def _parse_consolidated(document: Fields) -> Mapping[str, JSON] | None:
    if document.value.get("consolidated_metadata") is None:
        return None
    consolidated = document.fields("consolidated_metadata")
    consolidated.fields("metadata")
    return consolidated.value


def _named(
    fields: Fields, kind: str, parse_one: Callable[[str, Fields], _Info]
) -> dict[str, _Info]:
    group = fields.fields(f"{kind}s")
    return {
        foreign_name(kind, name, group.where): parse_one(name, group.fields(name))
        for name in group.value
    }


def _parse_dataset(fields: Fields) -> DatasetInfo:
    return DatasetInfo(
        name=fields.get("name", str),
        labels=fields.strings("labels"),
        provenance=fields.get("provenance", dict),
    )


def _parse_split(name: str, fields: Fields) -> SplitInfo:
    del name
    return SplitInfo(
        n_rows=fields.integer("n_rows", 0, MAX_ROWS),
        texts=fields.get("texts", str),
        labels=fields.get("labels", str),
    )


def _parse_source(name: str, fields: Fields) -> SourceInfo:
    return SourceInfo(
        name=name,
        fingerprint=fields.get("fingerprint", dict),
        recipe=fields.get("recipe", dict),
        hidden_size=fields.integer("hidden_size", 1, MAX_HIDDEN_SIZE),
        n_layers=fields.integer("n_layers", 0, MAX_LAYERS),
    )


def content_digest(content: Mapping[str, JSON]) -> str:
    """xxh3-128 of the content without its digest, so that a flipped bit is found."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return xxhash.xxh3_128_hexdigest(dump(rest))


def _without_name(source: SourceInfo) -> dict[str, JSON]:
    return {key: value for key, value in vars(source).items() if key != "name"}
