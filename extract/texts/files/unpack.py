"""Packed files as they would be unpacked, and rows in batches, so that none fills the memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

import pyarrow as pa

from llmembed.common import scratch
from llmembed.common.errors import DataError
from llmembed.common.regular import open_regular

PACKED: Mapping[str, str] = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Suffix -> codec, as Arrow names it."""
_MOST_GROWTH = 250
"""Texts pack to a tenth, perhaps to a hundredth; what grows far beyond was made to fill a disk."""
_AT_ONCE = 2**24
"""Characters of the rows that are turned into Arrow together."""

Row = TypeVar("Row")


def open_unpacked(path: Path) -> BinaryIO:
    """Open a regular file for reading, unpacked as its last suffix says.

    Raises:
        DataError: it is no regular file; or, while it is read, it unpacks to more than texts do.
        OSError: it cannot be read, or is damaged.
    """
    file = open_regular(path)
    codec = PACKED.get(path.suffix.lower())
    return io.BufferedReader(_Unpacked(file, codec, path), 2**20) if codec else file


def in_batches(rows: Iterable[tuple[Row, int]]) -> Iterator[list[Row]]:
    """Cut rows, each with its size in characters, into lists of about 16 MiB.

    >>> list(in_batches([("a", 2**24), ("b", 1), ("c", 1)]))
    [['a'], ['b', 'c']]
    """
    held, size = [], 0
    for row, n_characters in rows:
        held.append(row)
        size += n_characters
        if size >= _AT_ONCE:
            yield held
            held, size = [], 0
    if held:
        yield held


class _Unpacked(io.RawIOBase):
    """What a packed file holds, up to the bound."""

    def __init__(self, file: BinaryIO, codec: str, path: Path) -> None:
        self._file, self._stream, self._path = file, pa.CompressedInputStream(file, codec), path
        size_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._left_bytes = max(scratch.SPOOL_FROM_BYTES, _MOST_GROWTH * size_bytes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise DataError(
                f"{self._path} unpacks to more than {_MOST_GROWTH} times its size, which texts do "
                "not. If it is meant so, unpack it first."
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        super().close()
        self._file.close()
