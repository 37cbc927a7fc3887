"""Where the bytes of a cache lie: a folder here, an object store in `remote.py`.

The protocol is what the commit order needs and no more: whole values, written atomically under
slash-separated keys. A local store writes each value under a temporary name in `.llmembed/tmp`
and renames it, so a reader sees the old value or the new one, and one folder holds all leftovers
of a killed writer. Nothing below the root may be a symlink: a foreign cache must not hand out
files from elsewhere.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from llmembed.cache_format.errors import (
    CacheCorruptError,
    CacheFormatError,
    CacheSpaceError,
    CacheStorageError,
)
from llmembed.cache_format.mapping import can_map, map_behind_each_other

Buffer: TypeAlias = bytes | memoryview
MAX_DOCUMENT_BYTES = 64 * 2**20
TEMPORARY = ".llmembed/tmp"
_TRIES = 10


class _AbsentError(Exception):
    """There is no such file."""


class Store(Protocol):
    """Values under keys. Keys are relative, use `/`, and were checked by the caller."""

    @property
    def location(self) -> str:
        """The path or URL, as a user would write it."""

    @property
    def path(self) -> Path | None:
        """The folder, if the store is one."""

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

    def free_bytes(self) -> int | None:
        """Return the free space, if the store has a limit."""

    def open_zarr(self, key: str) -> Any:
        """Open an array with zarr-python, which decodes shards and compression."""


class LocalStore:
    """A folder.

    Args:
        root: the cache's folder; it need not exist yet.
        fsync: whether a written value survives a loss of power, at about a quarter of the speed.
    """

    def __init__(self, root: Path, *, fsync: bool = False) -> None:
        self._root = root
        self._fsync = fsync
        self._checked: set[str] = set()

    @property
    def location(self) -> str:
        """The path, as given."""
        return str(self._root)

    @property
    def path(self) -> Path | None:
        """The folder."""
        return self._root

    def get(self, key: str) -> bytes | None:
        """Return a document, or None if there is none."""
        try:
            with self._open(key) as (file, size_bytes):
                if size_bytes > MAX_DOCUMENT_BYTES:
                    raise CacheFormatError(f"{self.location}/{key} is too large for a document.")
                return _read_all(file, size_bytes)
        except _AbsentError:
            return None

    def view(self, key: str, size_bytes: int) -> Buffer:
        """Map a file into memory, read-only.

        Raises:
            CacheCorruptError: if the file is missing or has another size.
        """
        with self._open_chunk(key, size_bytes) as file:
            return memoryview(mmap.mmap(file, size_bytes, prot=mmap.PROT_READ))

    def view_together(self, keys: Sequence[str], size_bytes: int, head_bytes: int) -> Buffer | None:
        """Map the heads of several files behind each other, where they fill whole pages.

        Raises:
            CacheCorruptError: if a file is missing or has another size.
        """
        if not can_map(len(keys), head_bytes):
            return None
        files = [self._open_chunk(key, size_bytes) for key in keys]
        with self._translated(keys[0]):
            return map_behind_each_other(files, head_bytes)

    def read_pieces(
        self, key: str, size_bytes: int, pieces: Iterable[tuple[int, memoryview]]
    ) -> None:
        """Read from a file without mapping it, which costs less than the faults of few pages.

        Raises:
            CacheCorruptError: if the file is missing or has another size.
        """
        with self._open_chunk(key, size_bytes) as file, self._translated(key):
            for offset, target in pieces:
                n_read = os.preadv(file, [target], offset)
                if n_read != len(target):  # truncated since it was opened
                    found = offset + n_read
                    raise CacheCorruptError(wrong_size(self.location, key, found, size_bytes))

    def put(self, key: str, parts: Iterable[Buffer]) -> None:
        """Write a file under a temporary name, then rename it."""
        path = self._path(key)
        with self._translated(key):
            self._write(path, parts, lambda temporary: temporary.replace(path))

    def create(self, key: str, value: bytes) -> bool:
        """Write a file under a temporary name, then link it to its own, which fails if taken."""
        path = self._path(key)
        with self._translated(key):
            try:
                self._write(path, [value], path.hardlink_to)
            except FileExistsError:
                return False
        return True

    def names(self, prefix: str) -> list[str]:
        """List a folder."""
        try:
            return sorted(path.name for path in self._path(prefix).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, prefix: str) -> dict[str, int]:
        """Map the plain files of a folder to their sizes."""
        try:
            with os.scandir(self._path(prefix)) as entries:
                return {
                    entry.name: entry.stat(follow_symlinks=False).st_size
                    for entry in entries
                    if entry.is_file(follow_symlinks=False)
                }
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def walk(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys of all files below a folder, links included, temporary ones not."""
        for name in self.names(prefix):
            key = f"{prefix}/{name}".lstrip("/")
            path = self._root / key
            if path.is_dir() and not path.is_symlink():
                if key != TEMPORARY:
                    yield from self.walk(key)
            else:
                yield key

    def delete(self, key: str) -> None:
        """Unlink a file."""
        with self._translated(key):
            self._path(key).unlink(missing_ok=True)

    def delete_below(self, prefix: str) -> None:
        """Remove a folder and everything in it."""
        path = self._path(prefix)
        with self._translated(prefix):
            if path.is_dir():
                shutil.rmtree(path)

    def free_bytes(self) -> int | None:
        """Ask the file system of the folder, or of its nearest parent that exists."""
        folder = self._root.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def open_zarr(self, key: str) -> Any:
        """Open an array with zarr-python."""
        import zarr

        return zarr.open_array(self._path(key), mode="r", zarr_format=3)

    def _path(self, key: str) -> Path:
        folder = key.rpartition("/")[0]
        if folder not in self._checked:
            self._refuse_links(folder)
            self._checked.add(folder)
        path = self._root / key
        if key and path.is_symlink():
            raise CacheFormatError(_symlink(path))
        return path

    def _refuse_links(self, folder: str) -> None:
        path = self._root
        for name in folder.split("/"):
            path /= name
            if path != self._root and path.is_symlink():
                raise CacheFormatError(_symlink(path))

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[int, int]]:
        path = self._path(key)
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _AbsentError from error
        except OSError as error:
            raise storage_error(f"{self.location}/{key}", error) from error
        try:
            yield file, os.fstat(file).st_size
        finally:
            os.close(file)

    @contextmanager
    def _open_chunk(self, key: str, size_bytes: int) -> Iterator[int]:
        try:
            with self._open(key) as (file, found):
                if found != size_bytes:
                    raise CacheCorruptError(wrong_size(self.location, key, found, size_bytes))
                yield file
        except _AbsentError:
            raise CacheCorruptError(wrong_size(self.location, key, None, size_bytes)) from None

    def _write(self, path: Path, parts: Iterable[Buffer], place: Callable[[Path], Any]) -> None:
        """Write a temporary file and place it.

        Who takes the lock clears what killed writers left, and with it what another one writes at
        that moment to ask for the lock; so that one tries again.
        """
        parts = list(parts)
        for tries_left in reversed(range(_TRIES)):
            try:
                with self._temporary(parts) as temporary:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    place(temporary)
                    self._sync_folder(path.parent)
                    return
            except FileNotFoundError:
                if not tries_left:
                    raise

    @contextmanager
    def _temporary(self, parts: Iterable[Buffer]) -> Iterator[Path]:
        folder = self._path(TEMPORARY)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / uuid.uuid4().hex
        try:
            with temporary.open("xb", buffering=0) as file:
                for part in parts:
                    _write_all(file.fileno(), part)
                if self._fsync:
                    os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _sync_folder(self, folder: Path) -> None:
        if self._fsync:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(f"{self.location}/{key}", error) from error


def open_store(location: str | os.PathLike[str], *, fsync: bool = False) -> Store:
    """Make the store for a path, or for a URL if it contains `://`."""
    if "://" in os.fspath(location):
        from llmembed.cache_format.remote import FsspecStore

        return FsspecStore(os.fspath(location))
    return LocalStore(Path(location), fsync=fsync)


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


def _symlink(path: Path) -> str:
    return (
        f"{path} is a symbolic link; a cache must not contain any, since it could hand out files "
        "from elsewhere. Replace the link with the file itself if you trust it."
    )


def _read_all(file: int, size_bytes: int) -> bytes:
    with os.fdopen(os.dup(file), "rb") as stream:
        return stream.read(size_bytes)


def _write_all(file: int, part: Buffer) -> None:
    view = memoryview(part).cast("B")
    while view:
        view = view[os.write(file, view) :]
