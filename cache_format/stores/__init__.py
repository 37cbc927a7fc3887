"""Where the bytes of a cache lie: a folder, a prefix in an object store, a data set on the Hub.

All hold whole values under relative keys with slashes, written atomically: what the order of a
commit needs, and no more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from llmembed.cache_format.stores.hub import SCHEME, HubStore, hub_said, refuse_pieces
from llmembed.cache_format.stores.local import (
    HIDDEN,
    MAX_DOCUMENT_BYTES,
    Buffer,
    LocalStore,
    translated,
)
from llmembed.cache_format.stores.remote import FsspecStore
from llmembed.common.errors import ConfigError, hidden, shown

__all__ = [
    "HIDDEN",
    "MAX_DOCUMENT_BYTES",
    "SCHEME",
    "Buffer",
    "FsspecStore",
    "HubStore",
    "LocalStore",
    "Store",
    "hub_said",
    "open_store",
    "refuse_pieces",
    "translated",
]

Store: TypeAlias = LocalStore | FsspecStore


def open_store(location: str | os.PathLike[str], *, fsync: bool = False) -> Store:
    """Make the store for a path, or for a URL if it contains `://`.

    Raises:
        ConfigError: a URL holds a password, or no client knows it.
    """
    place = os.fspath(location)
    if place.startswith("file://"):
        place = url2pathname(urlsplit(place).path)
    if "://" in place:
        _refuse_passwords(place)
    if place.startswith(SCHEME):
        return HubStore(place)
    if "://" in place:
        return FsspecStore(place)
    if b"\0" in os.fsencode(place):
        raise ConfigError(
            f"{shown(place)} cannot be a path: it has a NUL. Pass another place of the cache."
        )
    return LocalStore(Path(place), fsync=fsync)


def _refuse_passwords(url: str) -> None:
    """Refuse a URL with a secret in it: it would stand in the records of runs, for all to read."""
    login, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    if at and (":" in login or url.startswith("http")):
        raise ConfigError(
            f"{url} holds a password or token, which would be written into records. Pass the URL "
            "without it, and give it to the client by its variables or settings, such as "
            "FSSPEC_HTTP_CLIENT_KWARGS or AWS_SECRET_ACCESS_KEY."
        )
    if "?" in url and hidden(url) != url:
        raise ConfigError(
            f"{url} is signed for one object, and a cache is many. Pass the URL of its folder, and "
            "give the client credentials by its own variables or settings."
        )
