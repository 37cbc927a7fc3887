"""Whatever the file system refuses or holds, the answer is an error of the tree, at once."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_cache import assert_toy, end_process, write_toy

from llmembed.cache_format import open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import convert, copy, finalize, verify
from llmembed.cache_format.writing.lock import LOCK
from llmembed.common.errors import CacheFormatError, LLMEmbedError

SPARSENESS = int(os.environ.get("LLMEMBED_FAULTS", "3"))
"""The n-th call fails for every n up to this, then for fewer and fewer of them."""
CALLS = ("open", "close", "read", "write", "listdir", "scandir", "mkdir", "replace", "link")
CALLS += ("unlink", "stat", "lstat", "fstat", "fsync")
KEYS = (
    "zarr.json",
    "train/tiny/zarr.json",
    "train/tiny/mean/layer_008/zarr.json",
    "train/tiny/mean/layer_008/c.1.0",
    "train/label/c.0",
    ".llmembed/index/train/tiny/mean/layer_008.json",
)


def write(path: Path) -> None:
    write_toy(path, 70, layers=[8], poolings=["mean"], fsync=True)


def read(path: Path) -> None:
    split = open_cache(path)["train"]
    assert split.features(8, rows=[3, 60]).shape == (2, 16)
    assert_toy(open_cache(path), 70)


def maintain(path: Path) -> None:
    verify(open_store(path))
    copy(path, path.with_suffix(".copy"))
    finalize(path)


@contextlib.contextmanager
def failing(call: str, number: int) -> Iterator[list[int]]:
    """Let the n-th call of a function of `os` fail; count the calls."""
    original, count = getattr(os, call), itertools.count(1)
    seen = [0]

    def fail(*args: Any, **options: Any) -> Any:
        seen[0] = next(count)
        if seen[0] == number:
            if call == "close":
                original(*args, **options)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, fail)
        yield seen


@pytest.mark.parametrize("act", [write, read, maintain])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_is_a_known_error(
    tmp_path: Path, act: Callable[[Path], None], call: str
) -> None:
    """Each call of the system, failing once, is told with the path; then all goes on as before."""
    path = tmp_path / "toy.zarr"
    write(path)
    number = 0
    while True:
        number += 1 + number // SPARSENESS
        if act is write:
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(path.with_suffix(".copy"), ignore_errors=True)
        with failing(call, number) as seen, contextlib.suppress(LLMEmbedError):
            act(path)
        if seen[0] < number:
            break
        end_process(path)
        shutil.rmtree(path.with_suffix(".copy"), ignore_errors=True)
        act(path)
        assert_toy(open_cache(path), 70)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket may not be long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a folder": Path.mkdir,
    "a symbolic link": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_in_its_place(toy_path: Path, kind: str, key: str) -> None:
    """A FIFO, socket, folder or link for a document or chunk is named, by readers and `verify`."""
    (toy_path / key).unlink()
    KINDS[kind](toy_path / key)
    with pytest.raises(CacheFormatError, match=f"{Path(key).name} is {kind}"):
        assert_toy(open_cache(toy_path))
    with contextlib.suppress(CacheFormatError):
        assert any(kind in damage.problem for damage in verify(open_store(toy_path)).damage)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_record_or_lock_is_refused(tmp_path: Path, kind: str) -> None:
    """A FIFO, socket, folder or link among the records, or for the lock, stops the writer."""
    path = tmp_path / "toy.zarr"
    write_toy(path, n_blocks=2)
    record = min((path / ".llmembed/commits/train/tiny").iterdir())
    sound = record.read_bytes()
    for file in (record, path / LOCK):
        file.unlink(missing_ok=True)
        KINDS[kind](file)
        with pytest.raises(LLMEmbedError, match=f"{file.name} is {kind}"):
            write_toy(path)
        file.rmdir() if kind == "a folder" else file.unlink()
        record.write_bytes(sound)
    write_toy(path)
    assert_toy(open_cache(path))


@pytest.mark.parametrize("place", ["c", "c/0", "c/0/0", "zarr.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_follows_no_link(toy_path: Path, tmp_path: Path, kind: str, place: str) -> None:
    """A link or FIFO for a shard, or for a folder of shards, is refused before zarr opens it."""
    archive = tmp_path / "archive.zarr"
    convert(toy_path, archive, archive=True)
    found = archive / "train/tiny/mean/layer_008" / place
    found.rename(tmp_path / "outside")
    if kind == "a symbolic link":
        found.symlink_to(tmp_path / "outside")
    else:
        KINDS[kind](found)
    expected = "is a symbolic link" if kind == "a symbolic link" else f"is {kind}"
    if kind == "a folder" and place != "zarr.json":
        expected = "holds rows that were not written"
    with pytest.raises(LLMEmbedError, match=expected):
        open_cache(archive)["train"].features(8, pooling="mean")


def test_a_file_url_is_a_folder(toy_path: Path) -> None:
    """A cache given as file:// is read as any folder is, links refused."""
    assert_toy(open_cache(toy_path.as_uri()))
    assert open_cache(toy_path.as_uri()).path == toy_path
    chunk = toy_path / "train/tiny/mean/layer_008/c.1.0"
    chunk.rename(toy_path.parent / "outside")
    chunk.symlink_to(toy_path.parent / "outside")
    with pytest.raises(CacheFormatError, match="is a symbolic link"):
        assert_toy(open_cache(toy_path.as_uri()))
