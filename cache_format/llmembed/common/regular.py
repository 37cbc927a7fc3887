"""Open what is a plain file, and nothing else: no input can make a command wait, or never end.

Opening a FIFO waits for somebody to write to it, a device such as /dev/zero has no end, and a
folder or socket fails later, with less to say. So a file is looked at before it is opened, opened
without waiting, and looked at again, since another one may stand there by then.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from llmembed.common.errors import DataError, LLMEmbedError, shown

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


def open_regular(path: str | os.PathLike[str], error: type[LLMEmbedError] = DataError) -> BinaryIO:
    """Open a regular file, or a link to one, for reading; raise what `require_regular` raises."""
    return os.fdopen(regular_descriptor(path, error), "rb")


def regular_descriptor(
    path: str | os.PathLike[str], error: type[LLMEmbedError], *, follow_links: bool = True
) -> int:
    """Open a regular file as `open_regular` does; the caller closes the descriptor."""
    require_regular(path, error, follow_links=follow_links)
    flags = os.O_RDONLY
    for name in ("O_BINARY", "O_NONBLOCK", "" if follow_links else "O_NOFOLLOW"):
        flags |= getattr(os, name, 0)  # Windows has the first alone
    file = os.open(path, flags)
    try:
        _require(os.fstat(file).st_mode, path, error)
    except BaseException:
        os.close(file)
        raise
    return file


def require_regular(
    path: str | os.PathLike[str],
    error: type[LLMEmbedError] = DataError,
    *,
    follow_links: bool = True,
) -> None:
    """Refuse what is no regular file, as an `error`, before a library is given its path.

    Where there is nothing, it is an OSError.
    """
    try:
        mode = Path(path).stat(follow_symlinks=follow_links).st_mode
    except ValueError as problem:
        raise error(f"{shown(os.fspath(path))} cannot be a path: {problem}.") from problem
    _require(mode, path, error)


def _require(mode: int, path: str | os.PathLike[str], error: type[LLMEmbedError]) -> None:
    if not stat.S_ISREG(mode):
        raise error(
            f"{shown(os.fspath(path))} is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a "
            "regular file, so it is not read. Put a file with the content in its place, or give "
            "another path."
        )
