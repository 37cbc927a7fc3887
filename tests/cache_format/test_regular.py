"""Only regular files are opened: a FIFO, socket, device or folder is refused without waiting."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from llmembed.common.errors import DataError, LLMEmbedError, ModelError
from llmembed.common.regular import open_regular, regular_descriptor, require_regular


def _make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


MAKERS: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a socket": _make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
}


@pytest.fixture(params=MAKERS)
def irregular(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, str]:
    """Something at a path that is no regular file, and what it is called."""
    monkeypatch.chdir(tmp_path)  # the path of a socket may not be long
    MAKERS[request.param](tmp_path / "input.csv")
    return tmp_path / "input.csv", request.param


@pytest.mark.parametrize("door", [open_regular, require_regular])
@pytest.mark.parametrize("error", [DataError, ModelError])
def test_what_is_no_regular_file_is_refused_at_once(
    irregular: tuple[Path, str],
    door: Callable[[Path, type[LLMEmbedError]], object],
    error: type[LLMEmbedError],
) -> None:
    """The message names the path and what stands there; nothing waits, nothing is read."""
    path, kind = irregular
    with pytest.raises(error, match=rf"input\.csv is {kind}, not a regular file, so it is not"):
        door(path, error)


def test_a_regular_file_is_opened(tmp_path: Path) -> None:
    """Its bytes are read as they are, through a link too."""
    (tmp_path / "file").write_bytes(b"a\r\n\x1a\x00b")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        require_regular(tmp_path / name)
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"a\r\n\x1a\x00b"


def test_what_replaces_a_file_before_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO that takes the place of a file after the first look is found by the second."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    original = os.open

    def replace_and_open(place: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return original(place, flags)

    monkeypatch.setattr(os, "open", replace_and_open)
    with pytest.raises(DataError, match="is a FIFO"):
        open_regular(path)


def test_a_link_can_be_refused(tmp_path: Path) -> None:
    """Where links are not to be followed, one is no regular file."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(DataError, match="is a symbolic link, not a regular file"):
        regular_descriptor(tmp_path / "link", DataError, follow_links=False)


def test_a_missing_file_is_told_by_the_system(tmp_path: Path) -> None:
    """What is not there stays an error that the caller can tell from others."""
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_what_cannot_be_a_path_is_told(tmp_path: Path) -> None:
    """A NUL in a path is a known error."""
    with pytest.raises(DataError, match=r"a\\x00b cannot be a path: .*embedded null"):
        open_regular(tmp_path / "a\0b")


def test_the_message_escapes_the_path(tmp_path: Path) -> None:
    """A path cannot command a terminal."""
    (tmp_path / "\x1b[2J").mkdir()
    with pytest.raises(DataError) as caught:
        require_regular(tmp_path / "\x1b[2J")
    assert "\x1b" not in str(caught.value)
    assert r"\x1b[2J is a folder" in str(caught.value)
