"""The `zarr.json` documents: written by us, parsed against an allow-list.

Writing them ourselves keeps them atomic and byte-for-byte reproducible; parsing them ourselves
keeps zarr-python (0.4 s to import) off the fast path and lets no foreign codec run. Source: Zarr
core specification, version 3.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmembed.cache_format.layout.schema import JSON, MAX_HIDDEN_SIZE, MAX_ROWS, Fields
from llmembed.cache_format.stores.base import Store
from llmembed.common.errors import CacheCorruptError, CacheFormatError

DOCUMENT = "zarr.json"
CRC_BYTES = 4
MAX_DEPTH = 64
"""Levels of a document: ours have ten, and a recipe or provenance brings few."""
MAX_PART_BYTES = 2**30
"""Of what is decoded at once, in an export."""
FILL_VALUES: Mapping[str, JSON] = {
    "float16": "NaN",
    "float32": "NaN",
    "int32": -1,
    "uint64": 0,
}
FEATURE_DTYPES = ("float16", "float32")
_PLAIN_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_EXPORT_CODECS = frozenset({"bytes", "crc32c", "zstd", "blosc", "gzip", "sharding_indexed"})
_DIMENSIONS = ("sample", "hidden")


@dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """One Zarr array: all that is needed to find and decode its chunks."""

    shape: tuple[int, ...]
    """`[N]` or `[N, H]`."""
    chunk_rows: int
    """Rows of a chunk; chunks span the whole hidden size."""
    dtype: str
    """One of `FILL_VALUES`."""
    plain: bool = True
    """Whether a chunk is raw little-endian rows and a crc32c, so that it can be mapped."""
    separator: str = "."
    """What stands between the parts of a chunk's key."""

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The dtype in memory, little-endian as on disk."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.numpy_dtype.itemsize * math.prod(self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk file: edge chunks are padded with the fill value, then the crc."""
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


def dump(document: Mapping[str, JSON]) -> bytes:
    r"""Serialise a document, always to the same bytes.

    >>> dump({"b": 1, "a": (2,)})
    b'{\n "a": [\n  2\n ],\n "b": 1\n}\n'
    """
    text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=True)
    return text.encode() + b"\n"


def parse(data: bytes, where: str) -> Fields:
    """Read a JSON object that may be hostile.

    Raises:
        CacheFormatError: if it is not JSON, holds a number that is not finite or is nested too
            deeply, or is no object.
    """
    try:
        value = json.loads(data, parse_constant=_refuse_constant, parse_float=_finite)
        _refuse_depth(value)
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(
            f"{where} is not a JSON document ({type(error).__name__}). The file is damaged or "
            "was not written by llmembed-extract."
        ) from error
    return Fields(value, where)


def group_document(attributes: Mapping[str, JSON]) -> dict[str, JSON]:
    """Make the document of a Zarr group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def array_document(info: ArrayInfo) -> dict[str, JSON]:
    """Make the document of a plain Zarr array."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(info.shape),
        "data_type": info.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [info.chunk_rows, *info.shape[1:]]},
        },
        "chunk_key_encoding": {
            "name": "default",
            "configuration": {"separator": info.separator},
        },
        "fill_value": FILL_VALUES[info.dtype],
        "codecs": _PLAIN_CODECS,
        "dimension_names": list(_DIMENSIONS[: len(info.shape)]),
        "attributes": {},
        "storage_transformers": [],
    }


def parse_array(data: bytes, where: str) -> ArrayInfo:
    """Read the document of an array of a cache, with every size bounded.

    Raises:
        CacheFormatError: if the array is none that a cache may contain.
    """
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
    info = ArrayInfo(
        shape=shape,
        chunk_rows=chunks[0],
        dtype=dtype,
        plain=_is_plain(fields.get("codecs", list), where),
        separator=separator,
    )
    if not info.plain:
        _check_export(fields, info)
    return info


def read_array_info(store: Store, key: str) -> ArrayInfo:
    """Read an array's document from a store.

    Raises:
        CacheCorruptError: if there is none.
    """
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
        raise CacheFormatError(
            f"{fields.where}: {key!r} has {len(numbers)} dimensions, not 1 or 2."
        )
    axes = {f"{key}[{axis}]": number for axis, number in enumerate(numbers)}
    checked = Fields(axes, fields.where)
    return tuple(checked.integer(f"{key}[{axis}]", 0, limits[axis]) for axis in range(len(numbers)))


def _is_plain(codecs: Sequence[JSON], where: str) -> bool:
    names = [Fields(codec, f"{where}: codecs").get("name", str) for codec in codecs]
    for codec in codecs:
        inner = codec.get("configuration", {}) if isinstance(codec, dict) else {}
        for key in ("codecs", "index_codecs"):
            if isinstance(inner, dict) and isinstance(inner.get(key), list):
                names += [Fields(c, f"{where}: {key}").get("name", str) for c in inner[key]]
    for name in names:
        if name not in _EXPORT_CODECS:
            raise CacheFormatError(
                f"{where}: codec {name[:40]!r} is not one a cache may use: "
                f"{', '.join(sorted(_EXPORT_CODECS))}."
            )
    return list(codecs) == _PLAIN_CODECS


def _check_export(fields: Fields, info: ArrayInfo) -> None:
    """Refuse shards whose parts do not fit, and parts too large to be decoded at once.

    Raises:
        CacheFormatError: naming the document.
    """
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


def _refuse_constant(name: str) -> JSON:
    raise ValueError(name)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # such as 1e400, which cannot be written again
        raise ValueError(text)
    return number


def _refuse_depth(value: JSON) -> None:
    """Refuse what is nested so deeply that to write or print it again would fail."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError
