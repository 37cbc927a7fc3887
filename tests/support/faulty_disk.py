"""Let the n-th operation on files of a folder fail, in a process of its own that is forked for it.

A fault costs milliseconds, since all is imported already. What Python does with files is counted:
each call of `os` and each opening, reading, writing and closing, by path or by descriptor, below
the folder. What libraries written in C do with files is reached by a limit on the size of files.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import resource
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmembed.common.errors import LLMEmbedError

KILL, EIO, ENOSPC, SHORT = "kill", "EIO", "ENOSPC", "short"
KINDS = (KILL, EIO, ENOSPC, SHORT)
"""The process dies, half of what it wrote there; the one call fails; every call that needs room
fails from then on, as with the next ones; the call writes half of what it was given and says so."""
LASTING = (ENOSPC, "EDQUOT", "EROFS", "EACCES", "EPERM")
TAKES_ROOM = ("open", "write", "mkdir", "rename", "replace", "link")
OPERATIONS = ("open", "close", "read", "write", "fsync", "fstat", "ftruncate", "mkdir", "rmdir")
OPERATIONS += ("rename", "replace", "link", "unlink", "remove", "listdir", "scandir")
MOST_S = 120


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th operation; 0 is never."""

    kind: str
    at: int


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        how: `done`, `told` by an error of ours, `raw` by another one, or `killed`.
        said: the error.
        n_seen: how many operations there were, of a process that was not killed.
    """

    how: str
    said: str = ""
    n_seen: int = 0


class Disk:
    """Counts the operations below a folder, and lets one of them fail."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        self._prefix = os.path.realpath(folder)
        self._fault = fault
        self._ours: set[int] = set()
        self._counting = threading.Lock()
        self.n_seen = 0
        self.originals = {name: getattr(os, name) for name in OPERATIONS}
        self.open = io.open

    def install(self) -> None:
        """Stand in for the calls of `os` and for `open`, in this process, for good."""
        for name in OPERATIONS:
            setattr(os, name, self._guarded(name))
        io.open = builtins.open = self._opened  # type: ignore[assignment]

    def is_ours(self, place: Any, dir_fd: int | None = None) -> bool:
        """Tell whether a path or descriptor lies below the folder."""
        if dir_fd is not None and dir_fd in self._ours:
            return True
        if isinstance(place, int):
            return place in self._ours
        return os.path.abspath(os.fsdecode(place)).startswith(self._prefix)  # noqa: PTH100

    def strike(self, name: str, write_half: Callable[[], Any] | None = None) -> Any:
        """Count an operation; where it is the one, die, fail, or give what half of it gives."""
        with self._counting:
            self.n_seen += 1
            n = self.n_seen
        kind, at = self._fault.kind, self._fault.at
        if kind in LASTING and n >= at > 0 and name in TAKES_ROOM:
            if n == at and write_half is not None:
                write_half()
            number = getattr(errno, kind)
            raise OSError(number, os.strerror(number))
        if n != at:
            return None
        if kind == KILL:
            if write_half is not None:
                write_half()
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == EIO:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write_half() if kind == SHORT and write_half is not None else None

    def _guarded(self, name: str) -> Callable[..., Any]:
        original = self.originals[name]

        def call(*args: Any, **options: Any) -> Any:
            folder = options.get("dir_fd", options.get("src_dir_fd"))
            if not args or not self.is_ours(args[0], folder):
                return original(*args, **options)
            half = None
            if name == "write":
                half = lambda: original(args[0], bytes(args[1])[: max(1, len(args[1]) // 2)])  # noqa: E731
            if name == "close":
                self._ours.discard(args[0])
                original(args[0])  # Linux gives the descriptor back even where it fails
                return self.strike(name)
            given = self.strike(name, half)
            if given is None:
                given = original(*args, **options)
            if name == "open":
                self._ours.add(given)
            return given

        return call

    def _opened(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not self.is_ours(file) or opener is not None:
            return self.open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            self.strike("open" if set(mode) & set("wxa+") else "read")
        raw: Any = self._file(file, mode.replace("b", "").replace("t", ""), closefd)
        if buffering == 0:
            return raw
        kind: Any = io.BufferedReader if mode.strip("bt") == "r" else io.BufferedWriter
        buffered = (io.BufferedRandom if "+" in mode else kind)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def _file(self, file: Any, mode: str, closefd: bool) -> io.FileIO:
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> Any:
                whole = super().write
                given = disk.strike("write", lambda: whole(bytes(data)[: max(1, len(data) // 2)]))
                return whole(data) if given is None else given

            def read(self, size: int | None = -1) -> Any:
                disk.strike("read")
                return super().read(-1 if size is None else size)

            def readall(self) -> Any:
                disk.strike("read")
                return super().readall()

            def readinto(self, buffer: Any) -> Any:
                disk.strike("read")
                return super().readinto(buffer)

            def close(self) -> None:
                if self.closed:
                    return
                disk._ours.discard(self.fileno())
                super().close()
                disk.strike("close")

        made = File(file, mode, closefd)
        self._ours.add(made.fileno())
        return made


def forked(act: Callable[[], object], prepare: Callable[[], Disk | None]) -> End:
    """Do something in a process of its own, as prepared there, and say how that ended."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which wait for work
        child = os.fork()
    if child == 0:
        _be_the_child(act, prepare, writing)
    os.close(writing)
    said = b""
    while True:
        if not select.select([reading], [], [], MOST_S)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"the process hung for {MOST_S} s")
        part = os.read(reading, 65536)
        if not part:
            break
        said += part
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)
        return End("killed")
    return End(**json.loads(said))


def with_fault(act: Callable[[], object], folder: Path, fault: Fault) -> End:
    """Do something in a process of its own, in which one operation below the folder fails."""

    def prepare() -> Disk:
        disk = Disk(folder, fault)
        disk.install()
        return disk

    return forked(act, prepare)


def with_files_up_to(act: Callable[[], object], n_bytes: int, *, killed: bool) -> End:
    """Do something in a process of its own, in which no file may grow beyond a size.

    Python ignores the signal that the system sends, so that the write fails, in C as elsewhere;
    a process that is `killed` does not.
    """

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        if killed:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    return forked(act, prepare)


def count_operations(act: Callable[[], object], folder: Path) -> int:
    """Count the operations of something that does not fail."""
    end = with_fault(act, folder, Fault(EIO, 0))
    assert end.how == "done", end
    return end.n_seen


def faults(n_operations: int, most: int, kinds: tuple[str, ...] = KINDS) -> Iterator[Fault]:
    """Give so many faults at most, spread over kinds and operations, or all if they are fewer."""
    every = max(1, -(-n_operations * len(kinds) // most))
    for index, kind in enumerate(kinds):
        for at in range(1 + index * every // len(kinds), n_operations + 1, every):
            yield Fault(kind, at)


def _be_the_child(
    act: Callable[[], object], prepare: Callable[[], Disk | None], writing: int
) -> None:
    code, disk = 0, None
    end: dict[str, Any] = {"how": "raw", "said": "it did not begin"}
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a time limit of the parent's is its own
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        disk = prepare()
        act()
        end = {"how": "done"}
    except LLMEmbedError as error:
        end = {"how": "told", "said": f"{type(error).__name__}: {error}"}
    except BaseException:  # noqa: BLE001 - the parent is told
        end = {"how": "raw", "said": traceback.format_exc()}
    try:
        sent = json.dumps({**end, "n_seen": disk.n_seen if disk else 0}).encode()
        write = disk.originals["write"] if disk else os.write
        while sent:
            sent = sent[write(writing, sent) :]
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001
        code = 1
    os._exit(code)
