"""A cache in an object store, through fsspec: `s3://`, `gs://`, `memory://` and what it knows.

An object appears whole or not at all, so a put is atomic as it is; a record is created with a
conditional put where the store has one. Clients retry by themselves, and a retry of a put whose
answer was lost is told "exists already": the writer then compares what is there with its own bytes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmembed.cache_format.stores.local import (
    MAX_DOCUMENT_BYTES,
    Buffer,
    storage_error,
    wrong_size,
)
from llmembed.common.errors import CacheFormatError, CacheStorageError, ConfigError

_CLIENT_ERRORS = {  # that are no OSError; no client is imported to find its class
    "botocore.exceptions": "BotoCoreError",
    "aiohttp": "ClientError",
    "gcsfs.retry": "HttpError",
}
_log = logging.getLogger(__name__)


class FsspecStore:
    """A prefix in an object store, which does what `LocalStore` does."""

    path: Path | None = None
    _may_change = True
    _absences: tuple[type[Exception], ...] = (FileNotFoundError,)
    """What its client raises where nothing is."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.location = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{url} cannot be opened: {error}. Install the client, for S3 with "
                "`pip install 'llmembed-cache[s3]'`, or give a local path."
            ) from error
        self._conditional = True

    def is_folder(self) -> bool | None:
        """Tell whether anything lies there."""
        return True if self.names("") else None

    def get(self, key: str) -> bytes | None:
        """Return a document, or None if there is none."""
        data = self._head(key, MAX_DOCUMENT_BYTES)
        if data is not None and len(data) > MAX_DOCUMENT_BYTES:
            raise CacheFormatError(f"{self.location}/{key} is too large for a document.")
        return data

    def view(self, key: str, size_bytes: int) -> Buffer:
        """Download a value that must have this size."""
        data = self._head(key, size_bytes)
        if data is None or len(data) != size_bytes:
            found = None if data is None else len(data)
            raise wrong_size(self.location, key, found, size_bytes)
        return data

    def put(self, key: str, parts: Iterable[Buffer]) -> None:
        """Put an object."""
        with self._translated(key):
            self._fs.pipe_file(self._key(key), b"".join(parts))

    def put_all(self, values: Iterable[tuple[str, bytes]]) -> None:
        """Write values in the order given."""
        for key, value in values:
            self.put(key, [value])

    def create(self, key: str, value: bytes) -> bool:
        """Put an object if there is none, conditionally where the store can."""
        place = self._key(key)
        with self._translated(key):
            if self._conditional:
                try:
                    self._fs.pipe_file(place, value, mode="create")
                except FileExistsError:
                    return False
                except (NotImplementedError, TypeError) as error:
                    _log.warning(
                        "%s has no conditional put (%s): two writers at the same moment would not "
                        "notice each other. Start one writer only.",
                        *(self.location, error),
                    )
                    self._conditional = False
                else:
                    return True
            if self._fs.exists(place):
                return False
            self._fs.pipe_file(place, value)
        return True

    def names(self, prefix: str) -> list[str]:
        """List the names directly below a prefix, sorted."""
        return sorted(self._entries(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Map the objects directly below a prefix to their sizes in bytes."""
        entries = self._entries(prefix).items()
        return {name: int(entry["size"]) for name, entry in entries if entry["type"] == "file"}

    def walk(self, prefix: str = "") -> Iterator[str]:
        """Yield all keys below a prefix, sorted."""
        with self._translated(prefix):
            self._fs.invalidate_cache()
            found = self._fs.find(self._key(prefix)) if self._fs.exists(self._key(prefix)) else []
        yield from sorted(str(path)[len(self._root) :].lstrip("/") for path in found)

    def delete(self, key: str) -> None:
        """Delete an object; it need not exist."""
        with self._translated(key), suppress(FileNotFoundError):
            self._fs.rm_file(self._key(key))

    def delete_below(self, prefix: str) -> None:
        """Delete everything below a prefix."""
        for key in list(self.walk(prefix)):
            self.delete(key)

    def clear_leftovers(self) -> None:
        """Do nothing: an object that was not put whole does not exist."""

    def free_bytes(self) -> int | None:
        """Object stores have no limit to ask for."""
        return None

    def open_zarr(self, key: str) -> Any:
        """Open an array with zarr-python."""
        from llmembed.cache_format.stores.bounded import open_array

        return open_array(f"{self.location}/{key}")

    def _head(self, key: str, size_bytes: int) -> bytes | None:
        """Download that many bytes of an object, and one more if it has more."""
        with self._translated(key):
            try:
                data: bytes = self._fs.cat_file(self._key(key), start=0, end=size_bytes + 1)
            except self._absences:
                return None
        return data

    def _entries(self, prefix: str) -> dict[str, dict[str, Any]]:
        with self._translated(prefix):
            try:
                found = self._fs.ls(self._key(prefix), detail=True, refresh=self._may_change)
            except self._absences:
                return {}
        named = ((str(entry["name"]).rstrip("/").rpartition("/")[2], entry) for entry in found)
        return {name: entry for name, entry in named if name}

    def _key(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(f"{self.location}/{key}", error) from error
        except _client_errors() as error:
            raise CacheStorageError(
                f"{self.location}/{key} could not be read or written: {type(error).__name__}: "
                f"{str(error)[:200]}. What was committed before is safe: check the credentials and "
                "the address, and run the same command again to resume."
            ) from error


def _client_errors() -> tuple[type[Exception], ...]:
    known = ((sys.modules.get(module), name) for module, name in _CLIENT_ERRORS.items())
    return tuple(getattr(module, name) for module, name in known if module is not None)
