"""A cache in a folder.

A value is written under a temporary name in `.llmembed/tmp` and then renamed or linked, so a reader
sees the old value or the new one. The temporary name tells which process writes, and nobody clears
what belongs to a living one. Nothing below the root may be a symlink, a FIFO or a device: a foreign
cache must not hand out files from elsewhere, nor make a reader wait.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from io import FileIO
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from llmembed.cache_format.stores.mapping import can_map, map_behind_each_other
from llmembed.common.errors import (
    CacheCorruptError,
    CacheFormatError,
    CacheSpaceError,
    CacheStorageError,
    LLMEmbedError,
)
from llmembed.common.process import is_gone, owner
from llmembed.common.regular import regular_descriptor

Buffer: TypeAlias = bytes | memoryview
HIDDEN = ".llmembed"  # what no Zarr reader sees: records, indexes, locks, unfinished files
TEMPORARY = f"{HIDDEN}/tmp"  # noqa: S108 - within the cache
MAX_DOCUMENT_BYTES = 64 * 2**20
_OLD_S = 7 * 24 * 3600.0  # after a week a temporary file is a leftover, whoever made it
_NO_LINKS = ("EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EINVAL")
"""What file systems without hard links answer: exFAT, and some that programs serve."""
_WAITS_S = (0.01, 0.1, 1.0) if os.name == "nt" else ()
"""Windows replaces no file that is open; those who read documents are soon done."""


class LocalStore:
    """A folder, which need not exist yet; with `fsync` what is written survives a loss of power."""

    def __init__(self, root: Path, *, fsync: bool = False) -> None:
        self.path: Path | None = root
        self.location = str(root)
        self._root = root
        self._fsync = fsync
        self._checked: set[str] = set()

    def is_folder(self) -> bool | None:
        """Tell whether a folder lies there, or something else; None for nothing."""
        with self._translated(""):
            return self._root.is_dir() if self._root.exists() else None

    def get(self, key: str) -> bytes | None:
        """Return a document, or None if there is none."""
        with self._opened(key) as file:
            if file is None:
                return None
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > MAX_DOCUMENT_BYTES:
                raise CacheFormatError(f"{self.location}/{key} is too large for a document.")
            return file.read(size_bytes)

    def view(self, key: str, size_bytes: int) -> Buffer:
        """Map a file that must have this size into memory, read-only."""
        with self._opened_chunk(key, size_bytes) as file:
            try:
                return memoryview(mmap.mmap(file, size_bytes, access=mmap.ACCESS_READ))
            except ValueError:  # truncated since it was opened
                found = os.fstat(file).st_size
                raise wrong_size(self.location, key, found, size_bytes) from None

    def view_together(self, keys: Sequence[str], size_bytes: int, head_bytes: int) -> Buffer | None:
        """Map the heads of several files behind each other; None where they fill no whole pages."""
        if not can_map(len(keys), head_bytes):
            return None
        with self._translated(keys[0]):
            files = [self._opened_chunk(key, size_bytes) for key in keys]
            return map_behind_each_other(files, head_bytes)

    def put(self, key: str, parts: Iterable[Buffer]) -> None:
        """Write a value atomically, replacing what is there."""
        with self._written(key, parts) as (temporary, path):
            _patiently(lambda: temporary.replace(path))

    def put_all(self, values: Iterable[tuple[str, bytes]]) -> None:
        """Write values in the order given."""
        for key, value in values:
            self.put(key, [value])

    def create(self, key: str, value: bytes) -> bool:
        """Write a value atomically if there is none; tell whether it was written.

        A link to the temporary file fails if the name is taken. Without hard links the file is made
        under its own name: a process that dies in between leaves it empty, which a record or a lock
        may be.
        """
        with self._written(key, [value]) as (temporary, path), suppress(FileExistsError):
            try:
                path.hardlink_to(temporary)
            except OSError as error:
                if errno.errorcode.get(error.errno or 0) not in _NO_LINKS:
                    raise
                self._write_new(path, [value])
            return True
        return False

    def names(self, prefix: str) -> list[str]:
        """List the names directly below a prefix, sorted."""
        with self._translated(prefix):
            try:
                return sorted(path.name for path in self._path(prefix).iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return []

    def sizes(self, prefix: str) -> dict[str, int]:
        """Map the plain files directly below a prefix to their sizes in bytes."""
        with self._translated(prefix):
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
        """Yield the keys of all files below a prefix, sorted: links too, temporary ones not."""
        pending = self._below(prefix)
        while pending:
            key = pending.pop()
            if not self._is_plain_folder(key):
                yield key
            elif key != TEMPORARY:
                pending += self._below(key)

    def delete(self, key: str) -> None:
        """Delete a value; it need not exist."""
        with self._translated(key):
            path = self._path(key)
            _patiently(lambda: path.unlink(missing_ok=True))

    def delete_below(self, prefix: str) -> None:
        """Delete everything below a prefix; there need not be anything."""
        with self._translated(prefix):
            path = self._path(prefix)
            if path.is_dir():
                shutil.rmtree(path)

    def clear_leftovers(self) -> None:
        """Delete the temporary files of dead processes of this machine, and very old ones."""
        for name in self.names(TEMPORARY):
            path = self._path(TEMPORARY) / name
            with suppress(OSError):  # nothing depends on a leftover
                if is_gone(name.partition("-")[0]) or time.time() - path.stat().st_mtime > _OLD_S:
                    path.unlink()

    def free_bytes(self) -> int | None:
        """Ask the file system of the folder, or of its nearest parent that exists."""
        with self._translated(""):
            folder = self._root.absolute()
            while not folder.exists() and folder != folder.parent:
                folder = folder.parent
            return shutil.disk_usage(folder).free

    def open_zarr(self, key: str) -> Any:
        """Open an array with zarr-python, which would follow links: so there may be none."""
        from llmembed.cache_format.stores.bounded import open_array

        for file in self.walk(key):
            with self._opened(file):
                pass
        return open_array(str(self._path(key)))

    def _below(self, prefix: str) -> list[str]:
        return [f"{prefix}/{name}".lstrip("/") for name in reversed(self.names(prefix))]

    def _is_plain_folder(self, key: str) -> bool:
        with self._translated(key):
            try:
                return stat.S_ISDIR((self._root / key).lstat().st_mode)
            except FileNotFoundError:
                return False

    def _path(self, key: str) -> Path:
        """Find the place of a key, which lies below the root and behind no link.

        Keys of another store may be any text.
        """
        parsed = PurePath(key)
        if parsed.anchor or ".." in parsed.parts:
            raise CacheFormatError(
                f"the key {key!r} leads out of the cache {self.location}, so nothing is read or "
                "written there. Do not trust the cache that it comes from; take another one."
            )
        folder = key.rpartition("/")[0]
        if folder not in self._checked:
            path = self._root
            for name in filter(None, folder.split("/")):
                path /= name
                _refuse_link(path)
            self._checked.add(folder)
        path = self._root / key
        if key:
            _refuse_link(path)
        return path

    @contextmanager
    def _opened(self, key: str) -> Iterator[FileIO | None]:
        with self._translated(key):
            descriptor = None
            with suppress(FileNotFoundError, NotADirectoryError):
                path = self._path(key)
                descriptor = regular_descriptor(path, CacheFormatError, follow_links=False)
            if descriptor is None:
                yield None
            else:
                with os.fdopen(descriptor, "rb", buffering=0) as file:  # a read is whole
                    yield file

    @contextmanager
    def _opened_chunk(self, key: str, size_bytes: int) -> Iterator[int]:
        with self._opened(key) as file:
            found = None if file is None else os.fstat(file.fileno()).st_size
            if file is None or found != size_bytes:
                raise wrong_size(self.location, key, found, size_bytes)
            yield file.fileno()

    @contextmanager
    def _written(self, key: str, parts: Iterable[Buffer]) -> Iterator[tuple[Path, Path]]:
        """Give a temporary file that holds the parts, and the path where it is wanted."""
        with self._translated(key):
            path, folder = self._path(key), self._path(TEMPORARY)
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"{owner(os.getpid())}-{uuid.uuid4().hex}"
            self._write_new(temporary, parts)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                yield temporary, path
            finally:
                temporary.unlink(missing_ok=True)
            self._sync_folder(path.parent)

    def _write_new(self, path: Path, parts: Iterable[Buffer]) -> None:
        """Write a file that must not exist yet; nothing is left of it if that fails."""
        with path.open("xb", buffering=0) as file:
            try:
                for part in parts:
                    view = memoryview(part).cast("B")
                    while view:
                        view = view[os.write(file.fileno(), view) :]
                if self._fsync:
                    os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def _sync_folder(self, folder: Path) -> None:
        if self._fsync and hasattr(os, "O_DIRECTORY"):  # Windows opens no folder
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _translated(self, key: str) -> AbstractContextManager[None]:
        return translated(f"{self.location}/{key}".rstrip("/"))


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


def wrong_size(location: str, key: str, found: int | None, expected: int) -> CacheCorruptError:
    """Make the error for a chunk that is missing (`found` is None) or truncated."""
    state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
    return CacheCorruptError(
        f"{location}/{key} {state}. Find all damage with `llmembed-cache verify {location}` and "
        "extract again what it names."
    )


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise CacheFormatError(
            f"{path} is a symbolic link; a cache must not contain any, since it could hand out "
            "files from elsewhere. Replace the link with the file itself if you trust it."
        )


def _patiently(change: Callable[[], object]) -> None:
    """Rename or unlink, and where readers of the file are in the way wait for them a little."""
    for wait_s in _WAITS_S:
        try:
            change()
        except PermissionError:
            time.sleep(wait_s)
        else:
            return
    change()
