"""One file for people and tools that want one (HDF5), and archives (sharded, compressed Zarr).

HDF5 holds every array as a plain dataset and every document and record as text, so a cache comes
back byte for byte. A foreign file is checked before it is read: no external or soft links, no
virtual or external datasets, no filter but gzip, shuffle and lzf; and what was written from it is
verified against its hashes. Archives keep the documents and the index, and are only read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmembed.cache_format.layout.arrays import StoredArray
from llmembed.cache_format.layout.chunks import encode
from llmembed.cache_format.layout.columns import LABEL, SHARD_BLOCKS, TEXT_HASH
from llmembed.cache_format.layout.commits import COMMITS
from llmembed.cache_format.layout.documents import (
    DOCUMENT,
    FILL_VALUES,
    ArrayInfo,
    dump,
    parse,
    parse_array,
    put_document,
)
from llmembed.cache_format.layout.header import Header, require_header
from llmembed.cache_format.layout.sources import layouts
from llmembed.cache_format.stores.base import MAX_DOCUMENT_BYTES, Store, open_store, translated
from llmembed.cache_format.stores.lock import refuse_if_held
from llmembed.cache_format.tools.verify import require_sound
from llmembed.cache_format.writing.consolidate import consolidated_metadata
from llmembed.common.errors import (
    CacheFormatError,
    CacheIncompleteError,
    CacheNotFoundError,
    ConfigError,
)
from llmembed.common.regular import require_regular
from llmembed.common.replace import replacing

HDF5_SUFFIXES = (".h5", ".hdf5")
_DOCUMENTS = "llmembed_documents"
_KEY = re.compile(
    r"(\.llmembed/(commits|index)/)?([A-Za-z0-9][A-Za-z0-9_.-]*/)*[A-Za-z0-9_.-]+\.json"
)
_FILTERS = {"gzip", "lzf", "shuffle", None}


def convert(
    cache: str | os.PathLike[str], target: str | os.PathLike[str], *, archive: bool = False
) -> str:
    """Convert a complete cache by the target's name: HDF5, Zarr from HDF5, or an archive.

    Returns:
        What was written, in words.

    Raises:
        ConfigError: if the target exists or the pair of formats means nothing.
        CacheIncompleteError: if rows are missing.
        CacheFormatError: if an HDF5 file holds what it must not.
    """
    to_hdf5 = str(target).endswith(HDF5_SUFFIXES)
    from_hdf5 = str(cache).endswith(HDF5_SUFFIXES)
    if "://" not in str(target) and Path(target).exists():
        raise ConfigError(f"{target} exists. It is left as it is; choose another target.")
    if from_hdf5 and not to_hdf5 and not archive:
        _from_hdf5(Path(cache), open_store(target))
        return "Zarr"
    if to_hdf5 and not from_hdf5 and not archive:
        _to_hdf5(_complete(open_store(cache)), Path(target))
        return "HDF5"
    if archive and not from_hdf5 and not to_hdf5:
        _to_archive(_complete(open_store(cache)), open_store(target))
        return "an archive"
    raise ConfigError(
        f"{cache} to {target}: a cache becomes HDF5 (target ends in .h5), an .h5 file becomes a "
        "cache, and --archive makes a sharded, compressed copy. To copy a cache as it is, use "
        "llmembed-cache copy."
    )


def _complete(store: Store) -> Store:
    refuse_if_held(store)
    header = require_header(store)
    for split, source, layout, commits in layouts(store, header):
        for name in layout.names:
            if not commits.is_complete(name):
                raise CacheIncompleteError(
                    f"{store.location}: {split}/{source}/{name} has "
                    f"{commits.n_committed(name)} of {header.splits[split].n_rows} rows. Complete "
                    "it with llmembed-extract before it is converted."
                )
    return store


def _array_keys(store: Store, header: Header) -> Iterator[tuple[str, int, int | None]]:
    """Yield key, N and R of every array; R is None for columns."""
    for split, info in sorted(header.splits.items()):
        yield f"{split}/{LABEL}", info.n_rows, None
        yield f"{split}/{TEXT_HASH}", info.n_rows, None
    for split, source, layout, _ in layouts(store, header):
        n_rows = header.splits[split].n_rows
        yield from ((f"{split}/{source}/{n}", n_rows, layout.block_rows) for n in layout.names)


def _to_hdf5(store: Store, target: Path) -> None:
    with translated(str(target)), replacing(target) as partial:
        _write_hdf5(store, partial)


def _write_hdf5(store: Store, path: Path) -> None:
    import h5py

    documents = {k: (store.get(k) or b"").decode() for k in store.walk() if k.endswith(".json")}
    with h5py.File(path, "w") as file:
        for key, n_rows, block_rows in _array_keys(store, require_header(store)):
            array = StoredArray(store, key, n_rows, block_rows=block_rows)
            if not array.info.plain:
                raise ConfigError(
                    f"{store.location} is an archive; convert the cache it was made from instead."
                )
            dataset = file.create_dataset(key, array.info.shape, array.info.numpy_dtype)
            for index in range(array.n_blocks):
                start = index * array.block_rows
                dataset[start : start + array.block_rows] = array.block(index)
        file[_DOCUMENTS] = np.frombuffer(dump(documents), np.uint8)


def _from_hdf5(source: Path, store: Store) -> None:
    """Write the chunks and documents of an HDF5 file to an empty store; the root comes last."""
    import h5py

    try:
        require_regular(source, CacheFormatError)
        file = h5py.File(source, "r", locking=False)
    except FileNotFoundError:
        raise CacheNotFoundError(f"there is no file {source}. Check the path.") from None
    except CacheFormatError:
        raise
    except OSError as error:
        raise CacheFormatError(f"{source} is not a readable HDF5 file: {error}.") from error
    with file:
        documents = _read_documents(file, str(source))
        for key, text in documents.items():
            if key.endswith(f"/{DOCUMENT}") and parse_node_type(text, key) == "array":
                array_key = key.removesuffix(f"/{DOCUMENT}")
                info = parse_array(text, f"{source}: {key}")
                _write_chunks(store, array_key, info, _plain_dataset(file, array_key))
        for key in sorted(documents, key=lambda key: (key == DOCUMENT, key)):
            store.put(key, [documents[key]])
    require_sound(store)


def _read_documents(file: Any, where: str) -> dict[str, bytes]:
    if _DOCUMENTS not in file:
        raise CacheFormatError(
            f"{where} was not made by llmembed-cache convert: it has no {_DOCUMENTS}."
        )
    dataset = _plain_dataset(file, _DOCUMENTS)
    if dataset.dtype != np.uint8 or dataset.ndim != 1 or dataset.size > MAX_DOCUMENT_BYTES:
        raise CacheFormatError(f"{where}: {_DOCUMENTS} is not text of at most 64 MiB.")
    fields = parse(dataset[:].tobytes(), f"{where}: {_DOCUMENTS}")
    for key in fields.value:
        if not _KEY.fullmatch(key):
            raise CacheFormatError(f"{where}: {key[:100]!r} is no document of a cache.")
    return {key: fields.get(key, str).encode() for key in fields.value}


def _plain_dataset(file: Any, key: str) -> Any:
    """Return a dataset if all on the way to it, and its storage, lies within the file."""
    import h5py

    parts = key.split("/")
    for depth in range(1, len(parts) + 1):
        link = file.get("/".join(parts[:depth]), getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise CacheFormatError(
                f"{file.filename}: {key!r} is missing or a soft or external link, which could "
                "hand out other files. Only plain datasets are read."
            )
    dataset = file[key]
    if (
        not isinstance(dataset, h5py.Dataset)
        or dataset.is_virtual
        or dataset.external
        or dataset.compression not in _FILTERS
    ):
        raise CacheFormatError(
            f"{file.filename}: {key!r} is a virtual or external dataset, or uses another filter "
            "than gzip, shuffle and lzf. Only plain datasets are read."
        )
    return dataset


def _write_chunks(store: Store, key: str, info: ArrayInfo, dataset: Any) -> None:
    if dataset.shape != info.shape or dataset.dtype != info.numpy_dtype or not info.plain:
        raise CacheFormatError(
            f"{key}: the dataset is {dataset.dtype} {dataset.shape}, but its document says "
            f"{info.dtype} {info.shape}. The file is damaged."
        )
    for index in range(info.n_chunks):
        rows = dataset[index * info.chunk_rows : (index + 1) * info.chunk_rows]
        store.put(f"{key}/{info.chunk_key(index)}", encode(info, np.ascontiguousarray(rows)))


def _to_archive(store: Store, target: Store) -> None:
    """Write sharded, zstd-compressed arrays; documents and indexes as they are, the root last."""
    header = require_header(store)
    root = target.path
    if root is None:
        raise ConfigError(
            f"{target.location} is remote; make the archive in a folder, then use "
            "llmembed-cache copy."
        )
    for key, n_rows, block_rows in _array_keys(store, header):
        _write_archive_array(StoredArray(store, key, n_rows, block_rows=block_rows), root / key)
    for key in store.walk():
        is_document = key.endswith(".json") and not key.startswith(COMMITS) and key != DOCUMENT
        if is_document and target.get(key) is None:
            target.put(key, [store.get(key) or b""])
    put_document(target, DOCUMENT, header.document())
    header.consolidated = consolidated_metadata(target, header)
    put_document(target, DOCUMENT, header.document())
    require_sound(target)


def _write_archive_array(array: StoredArray, path: Path) -> None:
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    info = array.info
    width = info.shape[1:]
    created = zarr.create_array(
        str(path),
        shape=info.shape,
        dtype=info.dtype,
        chunks=(array.block_rows, *width),
        shards=(array.block_rows * SHARD_BLOCKS, *width),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        fill_value=float("nan") if info.dtype.startswith("float") else FILL_VALUES[info.dtype],
        dimension_names=["sample", "hidden"][: len(info.shape)],
        zarr_format=3,
    )
    rows = array.block_rows * SHARD_BLOCKS  # a shard is written whole: a part rewrites it
    for start in range(0, array.n_rows, rows):
        created[start : start + rows] = array.read(slice(start, start + rows))


def parse_node_type(data: bytes, where: str) -> str:
    """Tell whether a Zarr document is of a group or an array."""
    return parse(data, where).get("node_type", str)
