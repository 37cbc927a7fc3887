"""What a system lacks has a way round that gives the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import other_system
import pytest
from toy_cache import tree

from llmembed.cache_format.stores import LocalStore, local
from llmembed.common import process


def round_trip(path: Path, *hidden: str) -> tuple[str, dict[str, bytes]]:
    command = [sys.executable, other_system.__file__, str(path), *hidden]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, tree(path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        return round_trip(tmp_path_factory.mktemp("here") / "toy.zarr")


@pytest.mark.parametrize(
    "hidden",
    [
        ("posix", "kill", "libc", "proc"),
        ("links",),
        ("proc",),
        ("proc", "kill", "psutil"),
        ("posix", "kill", "libc", "links", "proc", "psutil"),
    ],
    ids=" ".join,
)
def test_a_cache_is_the_same_on_another_system(
    tmp_path: Path, expected: tuple[str, dict[str, bytes]], hidden: tuple[str, ...]
) -> None:
    """Without what Windows, macOS or exFAT lack, the same bytes are written and read."""
    assert round_trip(tmp_path / "toy.zarr", *hidden) == expected


@pytest.fixture(params=["/proc", "psutil"])
def started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    if request.param == "psutil":
        monkeypatch.setattr(process, "_PROC", Path("/nonexistent"))
    return process.started


def test_a_process_is_known_until_it_ends(started: Callable[[int], str | None]) -> None:
    """Its start tells it from others; one that ended is gone, asked about by its parent or not."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = started(child.pid)
    assert start not in (None, process.UNKNOWN)
    assert start == started(child.pid)
    assert not process.has_ended(child.pid, str(start))
    assert process.has_ended(child.pid, "1")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert started(child.pid) is None
    child.communicate()
    assert process.has_ended(child.pid, str(start))


def test_a_process_that_is_hidden_is_taken_for_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where /proc shows only one's own processes, those of others are not dead."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/stat").touch()
    monkeypatch.setattr(process, "_PROC", tmp_path)
    assert process.started(os.getppid()) == process.UNKNOWN
    assert not process.has_ended(os.getppid(), "5")
    assert process.has_ended(2**22 + 1, "5")


def test_a_file_that_is_being_read_is_replaced_when_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows replaces no open file: a writer tries again, and says so if that does not help."""
    refusals = [PermissionError(13, "Access is denied")] * 2
    replace = Path.replace

    def busy(self: Path, target: Path) -> Path:
        if refusals:
            raise refusals.pop()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(local, "_WAITS_S", (0.0, 0.0))
    LocalStore(tmp_path).put("zarr.json", [b"new"])
    assert LocalStore(tmp_path).get("zarr.json") == b"new"


def test_drives_are_paths_and_not_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path with a drive letter is a folder, whatever its slashes."""
    from llmembed.cache_format.stores import open_store

    for path in (r"C:\caches\r8.zarr", "C:/caches/r8.zarr"):
        assert isinstance(open_store(path), LocalStore)
