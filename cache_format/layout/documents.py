"""The JSON documents of a cache: written by us, parsed against an allow-list.

Writing them ourselves keeps them atomic and byte-for-byte reproducible; parsing them ourselves
keeps zarr-python (0.4 s to import) off the fast path and lets no foreign codec run. Everything that
comes out of a foreign cache passes through `Fields`, which turns each surprise into one
`CacheFormatError`. Source: Zarr core specification, version 3.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from llmembed.cache_format.stores import Store
from llmembed.common.errors import CacheCorruptError, CacheFormatError

JSON: TypeAlias = Any  # what `json.loads` gives; it is checked where it enters, by `Fields`
DOCUMENT = "zarr.json"
MAX_ROWS = 2**40
MAX_HIDDEN_SIZE = 2**20
CRC_BYTES = 4
MAX_DEPTH = 64  # levels of a document: ours have ten, and a recipe or provenance brings few
MAX_PART_BYTES = 2**30  # of what is decoded at once, in an export
FILL_VALUES: Mapping[str, JSON] = {
    "float16": "NaN",
    "float32": "NaN",
    "int8": -1,
    "int32": -1,
    "uint64": 0,
}
FEATURE_DTYPES = ("float16", "float32")
_PLAIN_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_EXPORT_CODECS = frozenset({"bytes", "crc32c", "zstd", "blosc", "gzip", "sharding_indexed"})
_DAMAGED = "The cache is damaged or was not written by llmembed-extract."
_T = TypeVar("_T")


class Fields:
    """A JSON object from outside; a field of another type or size is a `CacheFormatError`."""

    def __init__(self, value: JSON, where: str) -> None:
        if not isinstance(value, dict):
            raise CacheFormatError(
                f"{where} holds {_kind(value)} where a JSON object belongs. {_DAMAGED}"
            )
        self.value: dict[str, JSON] = value
        self.where = where

    def get(self, key: str, kind: type[_T]) -> _T:
        """Return a field that must have this JSON type."""
        found = self.value.get(key)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise CacheFormatError(
                f"{self.where}: {key!r} must be of type {kind.__name__} and is {_kind(found)}. "
                f"{_DAMAGED}"
            )
        return found

    def integer(self, key: str, low: int, high: int) -> int:
        """Return an integer field within [low, high]."""
        number = self.get(key, int)
        if not low <= number <= high:
            digits = len(str(abs(number)))
            short = str(number) if digits <= 20 else f"about 10^{digits - 1}"
            raise CacheFormatError(
                f"{self.where}: {key!r} is {short}, allowed is {low} to {high}. {_DAMAGED}"
            )
        return number

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        """Return a field that may be absent, and else must have this JSON type."""
        return self.get(key, kind) if key in self.value else None

    def fields(self, key: str) -> Fields:
        """Return a field that is an object itself."""
        return Fields(self.value.get(key), f"{self.where}: {key}")

    def strings(self, key: str) -> tuple[str, ...]:
        """Return a field that is a list of strings."""
        found = self.get(key, list)
        if not all(isinstance(item, str) for item in found):
            raise CacheFormatError(f"{self.where}: {key!r} must be a list of strings.")
        return tuple(found)


def dump(document: Mapping[str, JSON]) -> bytes:
    r"""Serialise a document, always to the same bytes.

    >>> dump({"b": 1, "a": (2,)})
    b'{\n "a": [\n  2\n ],\n "b": 1\n}\n'
    """
    text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=True)
    return text.encode() + b"\n"


def parse(data: bytes, where: str) -> Fields:
    """Read a JSON object that may be hostile: its numbers are finite, and it is not too deep."""
    try:
        value = json.loads(data, parse_constant=_finite, parse_float=_finite)
        if _is_deep(value, MAX_DEPTH):
            raise RecursionError
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(
            f"{where} is not a JSON document ({type(error).__name__}). The file is damaged or "
            "was not written by llmembed-extract."
        ) from error
    return Fields(value, where)


@dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """One Zarr array: all that is needed to find and decode its chunks."""

    shape: tuple[int, ...]  # `[N]`, `[N, H]`, or `[N, C]` of int8
    chunk_rows: int  # chunks span the whole hidden size
    dtype: str  # one of `FILL_VALUES`
    plain: bool = True  # a chunk is raw little-endian rows and a crc32c: it can be mapped
    separator: str = "."  # between the parts of a chunk's key

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The dtype in memory, little-endian as on disk."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def fill_value(self) -> Any:
        """What rows that were not written hold, as a scalar of numpy."""
        return self.numpy_dtype.type(FILL_VALUES[self.dtype])

    @property
    def dimension_names(self) -> list[str]:
        """What Zarr readers are told of each dimension."""
        return ["sample", "class" if self.dtype == "int8" else "hidden"][: len(self.shape)]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.numpy_dtype.itemsize * math.prod(self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk file: rows, padding of an edge chunk, crc."""
        return self.chunk_rows * self.row_bytes + CRC_BYTES

    @property
    def n_chunks(self) -> int:
        """Chunks along the rows."""
        return -(-self.shape[0] // self.chunk_rows)

    def chunk_key(self, index: int) -> str:
        """Key of a chunk relative to its array.

        >>> ArrayInfo(shape=(100, 4), chunk_rows=64, dtype="float16").chunk_key(1)
        'c.1.0'
        """
        return self.separator.join(["c", str(index), *["0"] * (len(self.shape) - 1)])


def group_document(attributes: Mapping[str, JSON]) -> dict[str, JSON]:
    """Make the document of a Zarr group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def array_document(info: ArrayInfo) -> dict[str, JSON]:
    """Make the document of a plain Zarr array."""
    chunk_shape = [info.chunk_rows, *info.shape[1:]]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(info.shape),
        "data_type": info.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": info.separator}},
        "fill_value": FILL_VALUES[info.dtype],
        "codecs": _PLAIN_CODECS,
        "dimension_names": info.dimension_names,
        "attributes": {},
        "storage_transformers": [],
    }


def parse_array(data: bytes, where: str) -> ArrayInfo:
    """Read the document of an array; refuse one that a cache may not contain."""
    fields = parse(data, where)
    fields.integer("zarr_format", 3, 3)
    shape = _sizes(fields, "shape")
    chunks = _sizes(fields.fields("chunk_grid").fields("configuration"), "chunk_shape")
    dtype = fields.get("data_type", str)
    if dtype not in FILL_VALUES:
        raise CacheFormatError(
            f"{where}: data type {dtype[:40]!r} is not one a cache may contain: "
            f"{', '.join(FILL_VALUES)}."
        )
    if len(shape) != len(chunks) or chunks[1:] != shape[1:] or 0 in chunks:
        raise CacheFormatError(f"{where}: chunks {chunks} do not fit the shape {shape}.")
    encoding = fields.fields("chunk_key_encoding")
    separator = encoding.fields("configuration").get("separator", str)
    if encoding.get("name", str) != "default" or separator not in ("/", "."):
        raise CacheFormatError(f"{where}: its chunk key encoding is not 'default' with '.' or '/'.")
    codecs = fields.get("codecs", list)
    for name in _codec_names(codecs, where):
        if name not in _EXPORT_CODECS:
            raise CacheFormatError(
                f"{where}: codec {name[:40]!r} is not one a cache may use: "
                f"{', '.join(sorted(_EXPORT_CODECS))}."
            )
    plain, n_rows = codecs == _PLAIN_CODECS, chunks[0]
    info = ArrayInfo(shape=shape, chunk_rows=n_rows, dtype=dtype, plain=plain, separator=separator)
    if not plain:
        _check_export(fields, info)
    return info


def read_array_info(store: Store, key: str) -> ArrayInfo:
    """Read the document of an array that must be there."""
    data = store.get(f"{key}/{DOCUMENT}")
    where = f"{store.location}/{key}/{DOCUMENT}"
    if data is None:
        raise CacheCorruptError(f"{where} is missing, so the array cannot be read.")
    return parse_array(data, where)


def put_document(store: Store, key: str, document: Mapping[str, JSON]) -> None:
    """Write a document unless it is there already, so that nothing finished is rewritten."""
    data = dump(document)
    if store.get(key) != data:
        store.put(key, [data])


def _sizes(fields: Fields, key: str) -> tuple[int, ...]:
    numbers = fields.get(key, list)
    limits = (MAX_ROWS, MAX_HIDDEN_SIZE)
    if not 1 <= len(numbers) <= len(limits):
        problem = f"{key!r} has {len(numbers)} dimensions, not 1 or 2."
        raise CacheFormatError(f"{fields.where}: {problem}")
    axes = Fields({f"{key}[{axis}]": n for axis, n in enumerate(numbers)}, fields.where)
    return tuple(axes.integer(name, 0, limits[axis]) for axis, name in enumerate(axes.value))


def _codec_names(codecs: Sequence[JSON], where: str) -> Iterator[str]:
    for codec in codecs:
        yield Fields(codec, f"{where}: codecs").get("name", str)
        inner = codec.get("configuration")
        for key in ("codecs", "index_codecs"):
            if isinstance(inner, dict) and isinstance(inner.get(key), list):
                yield from _codec_names(inner[key], where)


def _check_export(fields: Fields, info: ArrayInfo) -> None:
    """Refuse shards whose parts do not fit, and parts too large to be decoded at once."""
    parts = info.chunk_rows
    for codec in fields.get("codecs", list):
        if codec["name"] == "sharding_indexed":
            inner = Fields(codec, f"{fields.where}: codecs").fields("configuration")
            sizes = _sizes(inner, "chunk_shape")
            if sizes[1:] != info.shape[1:] or not sizes[0] or parts % sizes[0]:
                raise CacheFormatError(
                    f"{inner.where}: parts of shape {sizes} do not fit into shards of {parts} rows "
                    f"of an array of shape {info.shape}."
                )
            parts = sizes[0]
    if parts * info.row_bytes > MAX_PART_BYTES:
        raise CacheFormatError(
            f"{fields.where}: {parts} rows of {info.row_bytes} bytes are compressed as one; at "
            f"most {MAX_PART_BYTES} bytes may be."
        )
    if fields.value.get("fill_value") != FILL_VALUES[info.dtype]:
        raise CacheFormatError(
            f"{fields.where}: the fill value of {info.dtype} must be {FILL_VALUES[info.dtype]!r}, "
            "so that rows that were never written are seen."
        )


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # NaN, or such as 1e400, which cannot be written again
        raise ValueError(text)
    return number


def _is_deep(value: JSON, n_levels: int) -> bool:  # what could not be written or printed again
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not n_levels or any(_is_deep(item, n_levels - 1) for item in inner)


def _kind(value: JSON) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
