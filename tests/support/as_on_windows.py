"""What Windows lacks of Linux, and how to hide it from this project's modules.

What the standard library and other packages see stays as it is: they have ways of their own on
Windows, which are theirs to test.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_import = builtins.__import__

MISSING_MODULES = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
_OF_OS = (
    "chown fchmod fchown fork forkpty getegid geteuid getgid getloadavg getpgid getuid killpg "
    "lchown mkfifo mknod nice openpty posix_fadvise posix_fallocate posix_spawn pread preadv "
    "pwrite pwritev sched_getaffinity sched_setaffinity sendfile setsid statvfs sync sysconf "
    "uname wait waitid O_CLOEXEC O_DIRECTORY O_DSYNC O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC "
    "O_TMPFILE"
)
_OF_MMAP = (
    "MADV_DONTNEED MADV_RANDOM MADV_SEQUENTIAL MADV_WILLNEED MAP_ANON MAP_ANONYMOUS MAP_NORESERVE "
    "MAP_POPULATE MAP_PRIVATE MAP_SHARED PROT_EXEC PROT_READ PROT_WRITE"
)
_OF_SIGNAL = (
    "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 alarm setitimer"
)
MISSING_NAMES = {
    "mmap": set(_OF_MMAP.split()),
    "os": set(_OF_OS.split()),
    "signal": set(_OF_SIGNAL.split()),
}


def _open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
    """Windows opens no folder, and has a flag against changing line ends."""
    if isinstance(path, str | os.PathLike) and Path(path).is_dir():
        raise PermissionError(13, "Permission denied", os.fspath(path))
    return os.open(path, flags & ~_O_BINARY, *args, **kwargs)


def _load(name: str | None, *args: Any, **kwargs: Any) -> ctypes.CDLL:
    if name is None:
        raise TypeError("bad argument type for built-in operation")
    return ctypes.CDLL(name, *args, **kwargs)


_O_BINARY = 1 << 30
_INSTEAD: Mapping[str, Mapping[str, Any]] = {
    "ctypes": {"CDLL": _load},
    "mmap": {},
    "os": {"O_BINARY": _O_BINARY, "name": "nt", "open": _open},
    "signal": {},
    "sys": {"platform": "win32"},
}


class _Narrowed(types.ModuleType):
    """A module without some names, and with others in place of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__dict__.update(_INSTEAD[name])

    def __getattr__(self, name: str) -> Any:
        if name in MISSING_NAMES.get(self.__name__, ()):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(sys.modules[self.__name__], name)


_NARROWED = {name: _Narrowed(name) for name in _INSTEAD}


def _import_as_on_windows(
    name: str,
    globals: Mapping[str, object] | None = None,  # noqa: A002 - the names that __import__ has
    locals: Mapping[str, object] | None = None,  # noqa: A002
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> types.ModuleType:
    ours = str((globals or {}).get("__name__", "")).startswith("llmembed")
    if ours and level == 0 and name.partition(".")[0] in MISSING_MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    found = _import(name, globals, locals, fromlist or (), level)
    return _NARROWED.get(found.__name__, found) if ours and level == 0 else found


def hide() -> None:
    """Hide it from every module of this project that is imported from now on."""
    builtins.__import__ = _import_as_on_windows
