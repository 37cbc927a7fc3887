"""Rows to the bytes of a chunk and back.

A chunk file is raw little-endian rows, padded to full size with the fill value, and four bytes of
crc32c: any Zarr reader decodes it, and we map it. What was committed is proved by the xxh3-128 of
its rows, which the commit record holds (28 GB/s on one core, where crc32c reaches 6); the crc
protects readers that know no records.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray

from llmembed.cache_format.layout.documents import CRC_BYTES, FILL_VALUES, ArrayInfo
from llmembed.cache_format.stores.base import Buffer

Rows: TypeAlias = NDArray[Any]


def digest(rows: Rows) -> str:
    """xxh3-128 of the rows' bytes.

    >>> digest(np.zeros((0, 4), np.float16))
    '99aa06d3014798d86001c324468d497f'
    """
    return xxhash.xxh3_128_hexdigest(_bytes(rows))


def encode(info: ArrayInfo, rows: Rows) -> list[Buffer]:
    """Split a chunk into the parts to write: rows, padding, crc32c.

    Args:
        info: the array; its dtype is that of `rows`.
        rows: contiguous `[n, ...]` with n <= `info.chunk_rows`.
    """
    missing = info.chunk_rows - len(rows)
    fill = float("nan") if FILL_VALUES[info.dtype] == "NaN" else FILL_VALUES[info.dtype]
    padding = np.full((missing, *info.shape[1:]), fill, info.numpy_dtype)
    crc = google_crc32c.extend(google_crc32c.extend(0, rows), padding)
    return [_bytes(rows), _bytes(padding), int(crc).to_bytes(CRC_BYTES, "little")]


def decode(info: ArrayInfo, chunk: Buffer) -> Rows:
    """View a chunk's rows, padding included: `[chunk_rows, ...]`, read-only, no copy."""
    shape = (info.chunk_rows, *info.shape[1:])
    return np.frombuffer(chunk, info.numpy_dtype, count=math.prod(shape)).reshape(shape)


def crc_holds(info: ArrayInfo, chunk: Buffer) -> bool:
    """Tell whether a chunk's crc32c is that of its bytes, padding included."""
    stored = int.from_bytes(bytes(chunk[-CRC_BYTES:]), "little")
    return bool(google_crc32c.extend(0, decode(info, chunk)) == stored)


def _bytes(rows: Rows) -> memoryview:
    flat: Any = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    return memoryview(flat)
