"""Write and read the toy cache where names are missing that Windows or macOS lack.

Run as a script: PATH HIDDEN..., each a key of `HIDE`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path
from typing import Any


def hide_posix() -> None:
    """What Windows lacks."""
    for name in ("resource", "fcntl", "pwd", "grp"):
        sys.modules[name] = None  # type: ignore[assignment]
    names = "preadv pread O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_DIRECTORY sched_getaffinity mkfifo"
    for name in (*names.split(), "posix_fallocate", "sysconf"):
        delattr(os, name)
    for name in ("PROT_READ", "PROT_WRITE", "MAP_SHARED", "MAP_PRIVATE", "MAP_ANON"):
        delattr(mmap, name)


def hide_kill() -> None:
    """There `os.kill` ends the process that it is asked about."""

    def kill(*_: Any) -> None:
        os._exit(9)

    os.kill = kill


def hide_libc() -> None:
    """There the program itself is no library."""
    load = ctypes.CDLL

    def refuse(name: str | None, *args: Any, **options: Any) -> ctypes.CDLL:
        if name is None:
            raise TypeError("expected a name")
        return load(name, *args, **options)

    ctypes.CDLL = refuse  # type: ignore[assignment,misc]


def hide_links() -> None:
    """File systems such as exFAT have no hard links."""

    def link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.link = link


def hide_proc() -> None:
    """Only Linux tells of processes in files."""
    from llmembed.common import process

    process._PROC = Path("/nonexistent")


def hide_psutil() -> None:
    """Without it nothing is known of other processes."""
    sys.modules["psutil"] = None  # type: ignore[assignment]


HIDE = {name.removeprefix("hide_"): do for name, do in globals().items() if "hide_" in name}


def main() -> None:
    """Write the cache in two sittings, read it, verify it, and refuse a second writer."""
    path = Path(sys.argv[1])
    for name in sys.argv[2:]:
        HIDE[name]()
    import toy_cache

    from llmembed.cache_format import CacheWriter, open_cache
    from llmembed.cache_format.stores import open_store
    from llmembed.cache_format.tools import verify
    from llmembed.common.errors import CacheLockedError

    toy_cache.write_toy(path, 1100, n_blocks=2, fsync=True)
    toy_cache.write_toy(path, 1100)
    toy_cache.assert_toy(open_cache(path), 1100)
    split = open_cache(path)["train"]
    rows = split.features(8, pooling="mean", rows=[1099, 3, 600])
    sys.stdout.write(rows.tobytes().hex())
    assert verify(open_store(path)).damage == ()
    with CacheWriter(path, dataset=toy_cache.DATASET):
        refused = ""
        try:
            toy_cache.write_toy(path, 1100)
        except CacheLockedError as error:
            refused = str(error)
        assert f"process {os.getpid()}" in refused


if __name__ == "__main__":
    main()
