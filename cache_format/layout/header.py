"""The root document of a cache: the one place that says which data set, splits and sources exist.

A split or a source exists once the root names it, and it is replaced atomically, so everything
else under those names may be half-done at any moment.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.metadata
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

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
from llmembed.cache_format.layout.schema import (
    FORMAT_VERSION,
    MAX_LAYERS,
    DatasetInfo,
    SourceInfo,
    SplitInfo,
    foreign_name,
)
from llmembed.cache_format.stores import HIDDEN, Store
from llmembed.common.errors import CacheCorruptError, CacheFormatError, CacheNotFoundError

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
        sources = {name: vars(source).copy() for name, source in self.sources.items()}
        for source in sources.values():
            del source["name"]
        content = {
            "format": FORMAT_VERSION,
            "created": self.created,
            "versions": self.versions,
            "dataset": vars(self.dataset),
            "splits": {name: vars(split) for name, split in self.splits.items()},
            "sources": sources,
        }
        content["digest"] = content_digest(content)
        document = group_document({"zarr_conventions": [CONVENTION], "llmembed": content})
        if self.consolidated is not None:
            document["consolidated_metadata"] = self.consolidated
        return document

    def save(self, store: Store) -> None:
        """Write the root document, unless it is there as it is."""
        put_document(store, DOCUMENT, self.document())

    def fingerprint(
        self, splits: Collection[str] | None = None, sources: Collection[str] | None = None
    ) -> str:
        """SHA-256 of what the features depend on: texts, labels, and the sources' identities.

        Args:
            splits: None is all.
            sources: None is all.
        """
        chosen = self.splits if splits is None else self.splits.keys() & splits
        used = self.sources if sources is None else self.sources.keys() & sources
        identity = {
            "labels": self.dataset.labels,
            "splits": {name: vars(self.splits[name]) for name in chosen},
            "sources": {name: self.sources[name].fingerprint for name in used},
        }
        return hashlib.sha256(dump(identity)).hexdigest()


def content_digest(content: Mapping[str, JSON]) -> str:
    """xxh3-128 of the content without its digest, so that a flipped bit is found."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return xxhash.xxh3_128_hexdigest(dump(rest))


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
        raise _not_a_cache(store.location)
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
        raise _not_a_cache(store.location)
    raise CacheNotFoundError(
        f"there is no cache at {store.location}. Make one with llmembed-extract, or check the path."
    )


def _not_a_cache(location: str) -> CacheFormatError:
    return CacheFormatError(
        f"{location} exists and is not a cache (it has no zarr.json with the attribute llmembed). "
        "It is left as it is; choose another path with --cache."
    )


def _parse_header(data: bytes, location: str) -> Header:
    where = f"{location}/{DOCUMENT}"
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
    dataset = fields.fields("dataset")
    splits, sources = fields.fields("splits"), fields.fields("sources")
    consolidated = document.value.get("consolidated_metadata")
    if consolidated is not None:
        document.fields("consolidated_metadata").fields("metadata")
    return Header(
        dataset=DatasetInfo(
            name=dataset.get("name", str),
            labels=dataset.strings("labels"),
            provenance=dataset.get("provenance", dict),
        ),
        created=fields.get("created", str),
        versions=fields.get("versions", dict),
        splits={name: _parse_split(name, splits) for name in splits.value},
        sources={name: _parse_source(name, sources) for name in sources.value},
        consolidated=consolidated,
    )


def _parse_split(name: str, splits: Fields) -> SplitInfo:
    foreign_name("split", name, splits.where)
    fields = splits.fields(name)
    return SplitInfo(
        n_rows=fields.integer("n_rows", 0, MAX_ROWS),
        texts=fields.get("texts", str),
        labels=fields.get("labels", str),
    )


def _parse_source(name: str, sources: Fields) -> SourceInfo:
    fields = sources.fields(name)
    return SourceInfo(
        name=foreign_name("source", name, sources.where),
        fingerprint=fields.get("fingerprint", dict),
        recipe=fields.get("recipe", dict),
        hidden_size=fields.integer("hidden_size", 1, MAX_HIDDEN_SIZE),
        n_layers=fields.integer("n_layers", 0, MAX_LAYERS),
    )
