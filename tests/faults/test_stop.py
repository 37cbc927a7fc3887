"""What ends a command, from outside or by the store, is told, and the same command goes on."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from at_a_gate import at_a_gate
from refusing_proxy import RefusingProxy, refusing_proxy
from toy_cache import assert_toy, tree, write_toy
from toy_model import write_texts

from llmembed.cache_format import open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import verify
from llmembed.cache_format.writing import blocks
from llmembed.cache_format.writing.lock import LOCK, WriterLock
from llmembed.common.errors import CacheSpaceError, CacheStorageError
from llmembed.extract.cli import main

Tries = Callable[[int], None]


@pytest.fixture(autouse=True)
def _one_thread(own_home: None) -> Iterator[None]:
    """One thread, since a fork takes no other along."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def command(tmp_path: Path, llama: Path) -> Callable[[str], int]:
    """Run `llmembed-extract` in this process, with a cache of that name; the exit code."""
    write_texts(tmp_path / "toy.csv", 200)
    fixed = f"--model={llama} --dataset={tmp_path / 'toy.csv'} --layers=1,3 --max-length=16"

    def run(cache: str) -> int:
        arguments = [*fixed.split(), "--compute-dtype=float32", f"--cache={tmp_path / cache}"]
        try:
            main(arguments)
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    return run


def at_second_block(command: Callable[[str], int]) -> Callable[[Callable[[], None]], None]:
    """Run the command until its second block is to be committed, which waits."""

    def act(wait: Callable[[], None]) -> None:
        commit, n_seen = blocks.commit, 0

        def gated(*arguments: Any) -> None:
            nonlocal n_seen
            n_seen += 1
            if n_seen == 2:
                wait()
            commit(*arguments)

        blocks.commit = gated
        raise SystemExit(command("toy.zarr"))

    return act


@pytest.mark.fault("11", "12", "16")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        (signal.SIGTERM, 75),
        (signal.SIGUSR1, 75),
        (signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_an_extraction_that_goes_on_later(
    command: Callable[[str], int], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The exit code tells what it was, the lock is given back, the rest is done by the next."""
    with at_a_gate(at_second_block(command), tmp_path / "said") as process:
        process.wait_at_gate()
        process.tell(number)
        process.let_go()  # what has begun is written
        assert process.end() == code
    cache = tmp_path / "toy.zarr"
    if number != signal.SIGKILL:
        assert "interrupted. Committed blocks are safe" in (tmp_path / "said").read_text()
        assert not (cache / LOCK).exists()
    assert len(list(cache.glob(".llmembed/commits/train/*/*.json"))) < 4
    assert command("toy.zarr") == command("whole.zarr") == 0
    assert tree(cache) == tree(tmp_path / "whole.zarr")


@pytest.mark.fault("12")
def test_a_second_ctrl_c_ends_at_once(command: Callable[[str], int], tmp_path: Path) -> None:
    """While the first is still giving the lock back the second does not wait; a SIGTERM does."""

    def act(wait: Callable[[], None]) -> None:
        release = WriterLock.release

        def slow(self: WriterLock) -> None:
            wait()
            release(self)

        WriterLock.release = slow  # type: ignore[method-assign]
        at_second_block(command)(wait)

    for second, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        shutil.rmtree(tmp_path / "toy.zarr", ignore_errors=True)
        with at_a_gate(act, tmp_path / "said") as process:
            process.wait_at_gate()
            process.tell(signal.SIGINT if code == 130 else signal.SIGTERM)
            process.let_go()
            process.wait_at_gate()  # of the release
            process.tell(second)
            if code == 75:
                process.let_go()
            assert process.end() == code
        assert (tmp_path / "toy.zarr" / LOCK).exists() == (code == 130)
    assert command("toy.zarr") == 0


@contextlib.contextmanager
def small_disk(place: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A file system in memory; give what changes its options."""
    place.mkdir()

    def mount(*arguments: str) -> bool:
        done = subprocess.run(["mount", *arguments, str(place)], check=False, capture_output=True)
        return done.returncode == 0

    if shutil.which("mount") is None or not mount("-t", "tmpfs", "-o", options, "tmpfs"):
        pytest.skip("mounting a small disk needs root")
    try:
        yield lambda changed: None if mount("-o", f"remount,{changed}") else pytest.fail("remount")
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.fault("14", "15")
@pytest.mark.parametrize("limit", ["size", "nr_inodes"])
def test_a_disk_that_fills(tmp_path: Path, tries: Tries, limit: str) -> None:
    """Without room or inodes it is one sentence; with more of them the same call completes."""
    write_toy(tmp_path / "whole.zarr", 200, layers=[4], poolings=["mean"])
    steps = {"size": [f"{n}k" for n in range(8, 100, 8)], "nr_inodes": map(str, range(5, 45, 3))}
    n_full = 0
    with small_disk(tmp_path / "disk", "size=4k,nr_inodes=100k") as change:
        cache = tmp_path / "disk" / "toy.zarr"
        change("size=10m")
        if limit == "nr_inodes":
            change("nr_inodes=3")
        for step in steps[limit]:
            change(f"{limit}={step}")
            with contextlib.suppress(CacheSpaceError):
                write_toy(cache, 200, layers=[4], poolings=["mean"])
                break
            n_full += 1
        change("size=10m,nr_inodes=1k")
        write_toy(cache, 200, layers=[4], poolings=["mean"])
        assert tree(cache) == tree(tmp_path / "whole.zarr")
    assert n_full > 5
    tries(n_full)


@pytest.fixture(scope="module")
def s3(s3_endpoint: str) -> Iterator[RefusingProxy]:
    """A store that speaks S3, and refuses when it is told to."""
    with refusing_proxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def bucket(s3: RefusingProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket there, of which no client asks twice."""
    s3.refusal = None
    options = {
        "endpoint_url": s3.address,
        "key": "testing",
        "secret": "testing",
        "config_kwargs": {"retries": {"max_attempts": 1}},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    name = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


REFUSALS = {
    "is down": (0, ""),
    "fails": (503, "ServiceUnavailable"),
    "has another token": (400, "ExpiredToken"),
    "knows the key no more": (403, "InvalidAccessKeyId"),
}


@pytest.mark.fault("16", "17")
@pytest.mark.parametrize(
    "store", [pytest.param(k, marks=pytest.mark.slow if v[0] else ()) for k, v in REFUSALS.items()]
)
def test_a_store_that_goes_away_and_comes_back(
    s3: RefusingProxy, bucket: str, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """It is one sentence in the middle of a block; when it is back the same call completes."""
    url = f"{bucket}/toy.zarr"
    commit, n_seen = blocks.commit, 0

    def then_refused(*arguments: Any) -> None:
        nonlocal n_seen
        n_seen += 1
        s3.refusal = REFUSALS[store] if n_seen == 2 else None
        commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "commit", then_refused)
        with pytest.raises(CacheStorageError, match="could not be read or written: ") as caught:
            write_toy(url, 130, layers=[4], poolings=["mean"])
    assert "the same command again to resume" in str(caught.value)
    assert "\n" not in str(caught.value)
    s3.refusal = None
    fsspec.filesystem("s3").rm(f"{url.removeprefix('s3://')}/{LOCK}")  # that it could not give back
    assert len(write_toy(url, 130, layers=[4], poolings=["mean"]).blocks) == 2
    assert_toy(open_cache(url), 130)
    assert verify(open_store(url)).damage == ()
