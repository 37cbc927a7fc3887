"""zarr-python reads archives, but no compressed chunk unpacks to more than the chunk can hold.

A few kilobytes can say that they are gigabytes. So what a chunk may come to follows from its shape,
and is all that is made room for: zstd and gzip are streamed up to it, blosc says its size first.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pyarrow as pa
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.registry import register_codec

_SPARE_BYTES = 1 << 16  # for what codecs beneath add: headers, checksums
_BLOSC_SIZE = slice(4, 8)  # of its header: little-endian, bytes when unpacked


def open_array(place: str, **options: Any) -> Any:
    """Open an array to read it; `options` are those of `zarr.open_array`."""
    with zarr.config.set(_CONFIG):
        return zarr.open_array(place, mode="r", zarr_format=3, **options)


class _Bounded:
    """What zarr-python's codecs of bytes do to decode, with a bound."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        n_numbers = math.prod(chunk_spec.shape)
        most = n_numbers * chunk_spec.dtype.to_native_dtype().itemsize + _SPARE_BYTES
        unpacked = self._unpacked(chunk_bytes.as_numpy_array().tobytes(), most)
        return chunk_spec.prototype.buffer.from_bytes(unpacked)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _unpacked(self, data: bytes, most: int) -> bytes:
        raise NotImplementedError


class _BoundedZstd(_Bounded, ZstdCodec):
    def _unpacked(self, data: bytes, most: int) -> bytes:
        return _streamed("zstd", data, most)


class _BoundedGzip(_Bounded, GzipCodec):
    def _unpacked(self, data: bytes, most: int) -> bytes:
        return _streamed("gzip", data, most)


class _BoundedBlosc(_Bounded, BloscCodec):
    def _unpacked(self, data: bytes, most: int) -> bytes:
        if int.from_bytes(data[_BLOSC_SIZE], "little") > most:
            raise _too_much("blosc", most)
        return bytes(self._blosc_codec.decode(data))


def _streamed(codec: str, data: bytes, most: int) -> bytes:
    with pa.CompressedInputStream(pa.BufferReader(data), codec) as stream:
        unpacked: bytes = stream.read(most + 1)
    if len(unpacked) > most:
        raise _too_much(codec, most)
    return unpacked


def _too_much(codec: str, most: int) -> ValueError:
    return ValueError(f"{codec} unpacks to more than the {most} bytes that a chunk can hold")


_CODECS = {"blosc": _BoundedBlosc, "gzip": _BoundedGzip, "zstd": _BoundedZstd}
_CONFIG = {f"codecs.{name}": f"{__name__}.{codec.__qualname__}" for name, codec in _CODECS.items()}
for _name, _codec in _CODECS.items():
    register_codec(_name, _codec)
