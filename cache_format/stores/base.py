"""Where the bytes of a cache lie: a folder in `local.py`, an object store in `remote.py`.

The protocol is what the commit order needs and no more: whole values, written atomically under
slash-separated keys.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from llmembed.common.errors import CacheSpaceError, CacheStorageError, LLMEmbedError

Buffer: TypeAlias = bytes | memoryview
MAX_DOCUMENT_BYTES = 64 * 2**20


class Store(Protocol):
    """Values under keys. Keys are relative, use `/`, and were checked by the caller."""

    @property
    def location(self) -> str:
        """The path or URL, as a user would write it."""

    @property
    def path(self) -> Path | None:
        """The folder, if the store is one."""

    def is_folder(self) -> bool | None:
        """Tell whether a folder lies there, or something else; None for nothing."""

    def get(self, key: str) -> bytes | None:
        """Return a document, or None if there is none."""

    def view(self, key: str, size_bytes: int) -> Buffer:
        """Return a value that must have this size, without copying it where that can be."""

    def view_together(self, keys: Sequence[str], size_bytes: int, head_bytes: int) -> Buffer | None:
        """Return the heads of values of one size as one buffer without copying, or None."""

    def read_pieces(
        self, key: str, size_bytes: int, pieces: Iterable[tuple[int, memoryview]]
    ) -> None:
        """Fill buffers from a value that must have this size, each from its offset."""

    def put(self, key: str, parts: Iterable[Buffer]) -> None:
        """Write a value atomically, replacing what is there."""

    def create(self, key: str, value: bytes) -> bool:
        """Write a value atomically if there is none; tell whether it was written."""

    def names(self, prefix: str) -> list[str]:
        """List the names directly below a prefix, sorted."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Map the values directly below a prefix to their sizes in bytes."""

    def walk(self, prefix: str = "") -> Iterator[str]:
        """Yield every key below a prefix, sorted."""

    def delete(self, key: str) -> None:
        """Delete a value; it need not exist."""

    def delete_below(self, prefix: str) -> None:
        """Delete everything below a prefix; there need not be anything."""

    def clear_leftovers(self) -> None:
        """Delete what killed writers left unfinished, and nothing of a living one."""

    def free_bytes(self) -> int | None:
        """Return the free space, if the store has a limit."""

    def open_zarr(self, key: str) -> Any:
        """Open an array with zarr-python, which decodes shards and compression."""


def open_store(location: str | os.PathLike[str], *, fsync: bool = False) -> Store:
    """Make the store for a path, or for a URL if it contains `://`."""
    place = os.fspath(location)
    if place.startswith("file://"):
        place = url2pathname(urlsplit(place).path)
    if "://" in place:
        from llmembed.cache_format.stores.remote import FsspecStore

        return FsspecStore(place)
    from llmembed.cache_format.stores.local import LocalStore

    return LocalStore(Path(place), fsync=fsync)


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Say in an error of the tree what an operating system refuses."""
    try:
        yield
    except LLMEmbedError:
        raise
    except OSError as error:
        raise storage_error(where, error) from error


def storage_error(where: str, error: OSError) -> CacheSpaceError | CacheStorageError:
    """Translate what an operating system or a client says into an error of our tree."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheSpaceError(
            f"no space was left while writing {where}. What was committed before is safe: free "
            "some space and run the same command again to resume."
        )
    return CacheStorageError(
        f"{where} could not be read or written: {error.strerror or error}. What was committed "
        "before is safe: remove the cause and run the same command again to resume."
    )


def wrong_size(location: str, key: str, found: int | None, expected: int) -> str:
    """Say that a chunk is missing or truncated, and what to do."""
    state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
    return (
        f"{location}/{key} {state}. Find all damage with `llmembed-cache verify {location}` and "
        "extract again what it names."
    )
