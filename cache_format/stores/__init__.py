"""Where the bytes of a cache lie: a folder, or a prefix in an object store.

Both hold whole values under relative keys with slashes, written atomically: what the order of a
commit needs, and no more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from llmembed.cache_format.stores.local import (
    HIDDEN,
    MAX_DOCUMENT_BYTES,
    Buffer,
    LocalStore,
    translated,
)
from llmembed.cache_format.stores.remote import FsspecStore

__all__ = [
    "HIDDEN",
    "MAX_DOCUMENT_BYTES",
    "Buffer",
    "FsspecStore",
    "LocalStore",
    "Store",
    "open_store",
    "translated",
]

Store: TypeAlias = LocalStore | FsspecStore


def open_store(location: str | os.PathLike[str], *, fsync: bool = False) -> Store:
    """Make the store for a path, or for a URL if it contains `://`."""
    place = os.fspath(location)
    if place.startswith("file://"):
        place = url2pathname(urlsplit(place).path)
    return FsspecStore(place) if "://" in place else LocalStore(Path(place), fsync=fsync)
