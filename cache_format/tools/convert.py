"""One file for people and tools that want one (HDF5), and archives (sharded, compressed Zarr).

HDF5 holds every array as a plain dataset and every document and record as text, so a cache comes
back byte for byte. A foreign file is checked before it is read: no external or soft links, no
virtual or external datasets, no filter but gzip, shuffle and lzf; and what was written from it is
verified against its hashes. Archives keep the documents and the index, and are only read.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llmembed.cache_format.layout.arrays import SHARD_BLOCKS, StoredArray, encode
from llmembed.cache_format.layout.commits import COMMITS, arrays_of, sources_of
from llmembed.cache_format.layout.documents import DOCUMENT, ArrayInfo, dump, parse, parse_array
from llmembed.cache_format.layout.schema import Header, require_header
from llmembed.cache_format.stores import MAX_DOCUMENT_BYTES, Store, open_store, translated
from llmembed.cache_format.tools.target import check_target
from llmembed.cache_format.tools.verify import require_sound
from llmembed.cache_format.writing import consolidate, refuse_if_held
from llmembed.common.errors import (
    CacheFormatError,
    CacheIncompleteError,
    CacheNotFoundError,
    ConfigError,
    LLMEmbedError,
)
from llmembed.common.regular import require_regular
from llmembed.common.replace import check_outside, placing, replacing

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

    The result is what was written, in words. A file or an archive appears whole or not at all; a
    cache that comes back from HDF5 is no cache before its root is written, and may be continued.

    Raises:
        ConfigError: if the target exists or the pair of formats means nothing.
        CacheIncompleteError: if rows are missing.
        CacheFormatError: if an HDF5 file holds what it must not.
    """
    to_hdf5 = str(target).endswith(HDF5_SUFFIXES)
    from_hdf5 = str(cache).endswith(HDF5_SUFFIXES)
    if not from_hdf5 and "://" not in str(target):
        _refuse_existing(Path(target))
    check_outside(target)
    if to_hdf5 + from_hdf5 + archive != 1:
        raise ConfigError(
            f"{cache} to {target}: a cache becomes HDF5 (target ends in .h5), an .h5 file becomes "
            "a cache, and --archive makes a sharded, compressed copy. To copy a cache as it is, "
            "use llmembed-cache copy."
        )
    if from_hdf5:
        _from_hdf5(Path(cache), open_store(target))
        return "Zarr"
    store = open_store(cache)
    header = _require_complete(store)
    if to_hdf5:
        with translated(str(target)), replacing(Path(target)) as partial:
            _write_hdf5(store, header, partial)
        return "HDF5"
    place = open_store(target).path
    if place is None:
        raise ConfigError(
            f"{target} is remote; make the archive in a folder, then use llmembed-cache copy."
        )
    _refuse_existing(place)
    with translated(str(target)), placing(place) as folder:
        _write_archive(store, header, folder)
        _refuse_existing(place)  # once more: another one may have been quicker
    return "an archive"


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists. It is left as it is; choose another target.")


def _require_complete(store: Store) -> Header:
    refuse_if_held(store)
    header = require_header(store)
    for source, name in arrays_of(sources_of(store, header)):
        n_rows, n_missing = header.splits[source.split].n_rows, source.n_missing(name)
        if n_missing:
            raise CacheIncompleteError(
                f"{store.location}: {source.key}/{name} has {n_rows - n_missing} of {n_rows} rows. "
                "Complete it with llmembed-extract before it is converted."
            )
    return header


def _arrays(store: Store, header: Header) -> Iterator[StoredArray]:
    for split, info in sorted(header.splits.items()):
        for name in info.columns:
            yield StoredArray(store, f"{split}/{name}", info.n_rows)
    for source, name in arrays_of(sources_of(store, header)):
        yield source.array(name)


class _FileOfHDF5(io.FileIO):
    """Keeps the first failure of a write for later, for HDF5 crashes where it hears of one.

    From then on it takes whatever is written, writes nothing, and gives zeros.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it."""
        view = memoryview(data).cast("B")
        while view and self.failure is None:
            try:
                view = view[super().write(view) :]
            except OSError as error:
                self.failure = error
        return len(data)

    def readinto(self, buffer: Any) -> int:
        """Read what was written."""
        if self.failure is None:
            return super().readinto(buffer) or 0
        view = memoryview(buffer).cast("B")
        view[:] = bytes(len(view))
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Extend the file to its size."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0


def _write_hdf5(store: Store, header: Header, path: Path) -> None:
    import h5py

    with _FileOfHDF5(path, "w+") as whole:
        with h5py.File(whole, "w") as file:
            _fill_hdf5(store, header, file, whole)
        if whole.failure is not None:
            raise whole.failure


def _fill_hdf5(store: Store, header: Header, file: Any, whole: _FileOfHDF5) -> None:
    documents = {k: (store.get(k) or b"").decode() for k in store.walk() if k.endswith(".json")}
    for array in _arrays(store, header):
        if not array.info.plain:
            raise ConfigError(
                f"{store.location} is an archive; convert the cache it was made from instead."
            )
        dataset = file.create_dataset(array.key, array.info.shape, array.info.numpy_dtype)
        for index in range(array.n_blocks):
            start = index * array.block_rows
            dataset[start : start + array.block_rows] = array.block(index)
            if whole.failure is not None:
                return
    file[_DOCUMENTS] = np.frombuffer(dump(documents), np.uint8)


def _from_hdf5(source: Path, store: Store) -> None:
    import h5py

    with _read_as_hdf5(source):
        require_regular(source, CacheFormatError)
        with h5py.File(source, "r", locking=False) as file:
            documents = _read_documents(file, str(source))
            arrays = [
                _array_of(file, key.removesuffix(f"/{DOCUMENT}"), text)
                for key, text in documents.items()
                if key.endswith(f"/{DOCUMENT}")
                and parse(text, key).get("node_type", str) == "array"
            ]  # all are looked at before the first is written
            check_target(store, lambda key: key in documents or _is_chunk(key, documents))
            store.clear_leftovers()
            for key, dataset, info in arrays:
                for index in range(info.n_chunks):
                    rows = dataset[index * info.chunk_rows : (index + 1) * info.chunk_rows]
                    chunk = encode(info, np.ascontiguousarray(rows))
                    store.put(f"{key}/{info.chunk_key(index)}", chunk)
    for key in sorted(documents, key=lambda key: (key == DOCUMENT, key)):
        store.put(key, [documents[key]])
    require_sound(store)


@contextmanager
def _read_as_hdf5(source: Path) -> Iterator[None]:
    """Say in an error of the tree what h5py comes upon in a damaged file, which is any error."""
    try:
        yield
    except LLMEmbedError:
        raise
    except FileNotFoundError:
        raise CacheNotFoundError(f"there is no file {source}. Check the path.") from None
    except Exception as error:
        raise CacheFormatError(
            f"{source} is not a readable HDF5 file: {str(error)[:200]}. Convert the cache again."
        ) from error


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


def _array_of(file: Any, key: str, document: bytes) -> tuple[str, Any, ArrayInfo]:
    info = parse_array(document, f"{file.filename}: {key}/{DOCUMENT}")
    dataset = _plain_dataset(file, key)
    if dataset.shape != info.shape or dataset.dtype != info.numpy_dtype or not info.plain:
        raise CacheFormatError(
            f"{file.filename}: {key}: the dataset is {dataset.dtype} {dataset.shape}, but its "
            f"document says {info.dtype} {info.shape}. The file is damaged."
        )
    return key, dataset, info


def _is_chunk(key: str, documents: Mapping[str, bytes]) -> bool:
    array, _, name = key.rpartition("/")
    return name.startswith("c.") and f"{array}/{DOCUMENT}" in documents


def _write_archive(store: Store, header: Header, folder: Path) -> None:
    """Write sharded, zstd-compressed arrays; documents and indexes as they are, the root last."""
    target = open_store(folder)
    for array in _arrays(store, header):
        _write_archive_array(array, folder / array.key)
    for key in store.walk():
        is_document = key.endswith(".json") and not key.startswith(COMMITS) and key != DOCUMENT
        if is_document and target.get(key) is None:
            target.put(key, [store.get(key) or b""])
    header.save(target)
    consolidate(target, header)
    require_sound(target)


def _write_archive_array(array: StoredArray, path: Path) -> None:
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    info = array.info
    width = info.shape[1:]
    shard_rows = array.block_rows * SHARD_BLOCKS
    created = zarr.create_array(
        str(path),
        shape=info.shape,
        dtype=info.dtype,
        chunks=(array.block_rows, *width),
        shards=(shard_rows, *width),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        fill_value=info.fill_value,
        dimension_names=info.dimension_names,
        zarr_format=3,
    )
    for start in range(0, array.n_rows, shard_rows):  # a shard is written whole: a part rewrites it
        created[start : start + shard_rows] = array.read(slice(start, start + shard_rows))
