"""What must be in a cache before blocks are written: root, columns, and documents of the arrays.

What is given is compared with what the cache has already; what contradicts it is refused with both
values named. At the end, plain Zarr readers are told what is complete.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from llmembed.cache_format.layout.arrays import COLUMN_DTYPES, encode
from llmembed.cache_format.layout.commits import (
    COMMITS,
    INDEX,
    SourceLayout,
    purge,
    read_layout,
    sources_of,
)
from llmembed.cache_format.layout.documents import (
    DOCUMENT,
    JSON,
    ArrayInfo,
    array_document,
    group_document,
    parse,
    parse_array,
    put_document,
    read_array_info,
)
from llmembed.cache_format.layout.schema import (
    N_TOKENS,
    TEXT_HASH,
    DatasetInfo,
    Header,
    SourceInfo,
    SplitInfo,
    array_name,
    column_rows,
)
from llmembed.cache_format.stores import HIDDEN, Store
from llmembed.cache_format.writing.plan import SplitPlan
from llmembed.common.errors import CacheMismatchError, ConfigError


def check_free_name(kind: str, name: str, taken: Mapping[str, object]) -> None:
    """Refuse a name that differs from another of its kind only in case."""
    for other in taken:
        if other != name and other.casefold() == name.casefold():
            raise ConfigError(
                f"{kind} {name!r} differs from {other!r} of the same cache only in case, which "
                "some file systems cannot tell apart. Choose another name."
            )


def check_dataset(known: DatasetInfo, given: DatasetInfo, location: str) -> None:
    """Refuse another data set than the one that the cache is of."""
    for key in ("name", "labels"):
        stored, new = getattr(known, key), getattr(given, key)
        if stored != new:
            raise CacheMismatchError(
                f"{location} is of a data set with {key} {stored!r}, but {new!r} was given. Give "
                "the same data set, or use another --cache."
            )


def check_source(known: SourceInfo, given: SourceInfo, location: str) -> None:
    """Refuse other settings under the name of a known source; name every differing key."""
    stored, new = _identity(known), _identity(given)
    differing = sorted(k for k in stored | new if stored.get(k) != new.get(k))
    if differing:
        parts = "; ".join(f"{k}: cache {stored.get(k)!r}, given {new.get(k)!r}" for k in differing)
        raise CacheMismatchError(
            f"source {known.name!r} of {location} was made otherwise: {parts}. Give the same "
            "settings, another --source name, or another --cache."
        )


def with_prompts(known: SourceInfo, given: SourceInfo, location: str) -> SourceInfo:
    """Add the prompts of the given source to a known one; refuse another text of a known name."""
    for name, text in given.prompts.items():
        if known.prompts.get(name, text) != text:
            raise CacheMismatchError(
                f"prompt {name!r} of source {known.name!r} in {location} is "
                f"{known.prompts[name]!r}, but {text!r} was given. Change a word of the prompt, or "
                "use another --source name."
            )
    return replace(known, prompts=dict(sorted({**known.prompts, **given.prompts}.items())))


def check_dtype(known: str, given: str, where: str) -> None:
    """Refuse another dtype than the stored one."""
    if known != given:
        raise CacheMismatchError(
            f"{where} is stored as {known}, but {given} was asked for. Pass --dtype {known}, or "
            "another --source name or --cache."
        )


def add_split(
    store: Store,
    header: Header,
    split: str,
    columns: Mapping[str, NDArray[Any]],
    known: SplitInfo | None,
) -> None:
    """Write the columns of a split, which the header names, from the first chunk that changes.

    `known` is what the store has of it, None for a new one. The root comes last.
    """
    n_rows = header.splits[split].n_rows
    if known is None:
        purge(store, split)
    else:
        _refuse_archive(store, split)
        if known.n_rows < n_rows:
            store.delete_below(f"{INDEX}/{split}")  # made for fewer rows
    for name, values in columns.items():
        n_known = known.n_rows if known and known.hash_of(name) else None
        if n_known != n_rows:
            _add_column(store, f"{split}/{name}", COLUMN_DTYPES[name], values, n_known)
    put_document(store, f"{split}/{DOCUMENT}", group_document({}))
    if header.consolidated is not None and known and known.n_rows == n_rows:
        header.consolidated = consolidated_metadata(store, header)  # columns came, and no rows
    header.save(store)


def _add_column(
    store: Store, key: str, dtype: str, values: NDArray[Any], n_known: int | None
) -> None:
    """Write a column `[N]` or `[N, C]` from the chunk on that has rows which are not known.

    `n_known` is None where the root names no such column, so that what lies there is leftover.
    """
    document = store.get(f"{key}/{DOCUMENT}")
    if document is not None and n_known is not None:
        stored = parse_array(document, f"{store.location}/{key}/{DOCUMENT}")
        info = replace(stored, shape=values.shape)
    else:
        if document is not None:
            store.delete_below(key)
        n_rows = column_rows(len(values), values.itemsize * math.prod(values.shape[1:]))
        info = ArrayInfo(shape=values.shape, chunk_rows=n_rows, dtype=dtype)
    for index in range((n_known or 0) // info.chunk_rows, info.n_chunks):
        rows = values[index * info.chunk_rows : (index + 1) * info.chunk_rows]
        store.put(f"{key}/{info.chunk_key(index)}", encode(info, rows))
    put_document(store, f"{key}/{DOCUMENT}", array_document(info))


def _refuse_archive(store: Store, split: str) -> None:
    if not read_array_info(store, f"{split}/{TEXT_HASH}").plain:
        raise CacheMismatchError(
            f"{store.location} is sharded or compressed: an export is only read. Extend the "
            "cache it was made from, or convert it back with `llmembed-cache convert`."
        )


def add_source(store: Store, header: Header, source: str) -> None:
    """Clear what a removed source of that name left, then write the root, which names it."""
    for split in header.splits:
        purge(store, f"{split}/{source}")
    header.save(store)


def add_arrays(store: Store, plan: SplitPlan) -> None:
    """Write the documents of a plan's arrays and groups, those that are not there yet."""
    source = f"{plan.split}/{plan.source}"
    feature = array_document(plan.feature_info)
    documents = {f"/{array_name(key)}": feature for key in plan.arrays}
    documents[f"/{N_TOKENS}"] = array_document(plan.n_tokens_info)
    documents |= {f"/{pooling}": group_document({}) for pooling, _ in plan.arrays}
    layout = read_layout(store, plan.split, plan.source)
    arrays = tuple(sorted({*(layout.arrays if layout else ()), *plan.arrays}))
    new = SourceLayout(block_rows=plan.block_rows, dtype=plan.dtype, arrays=arrays)
    for name, document in (documents | {"": new.document()}).items():  # the source's comes last
        put_document(store, f"{source}{name}/{DOCUMENT}", document)


def has_arrays(store: Store, plan: SplitPlan) -> bool:
    """Tell whether a plan's arrays are registered."""
    layout = read_layout(store, plan.split, plan.source)
    return layout is not None and set(plan.arrays) <= set(layout.arrays)


def consolidate(store: Store, header: Header) -> None:
    """Renew the consolidated metadata, then write the root."""
    header.consolidated = consolidated_metadata(store, header)
    header.save(store)


def consolidated_metadata(store: Store, header: Header) -> dict[str, JSON] | None:
    """Collect the documents of all complete arrays and their groups; None if there are none.

    A plain Zarr reader that opens the root cannot meet a row that was never written.
    """
    keys: set[str] = set()
    for source in sources_of(store, header):
        arrays = [key for key in source.layout.arrays if source.is_complete(array_name(key))]
        if arrays and source.is_complete(N_TOKENS):
            split = source.split
            columns = header.splits[split].columns
            keys |= {split, source.key, *(f"{split}/{name}" for name in columns)}
            names = {N_TOKENS, *(pooling for pooling, _ in arrays), *map(array_name, arrays)}
            keys |= {f"{source.key}/{name}" for name in names}
    if not keys:
        return None
    documents = ((key, f"{key}/{DOCUMENT}") for key in sorted(keys))
    metadata = {
        key: parse(store.get(place) or b"", f"{store.location}/{place}").value
        for key, place in documents
    }
    return {"kind": "inline", "must_understand": False, "metadata": metadata}


def empty(store: Store, header: Header) -> None:
    """Make a cache an empty one: from the first write on it is, whatever lies below."""
    header.save(store)
    for name in store.names(""):
        if name not in (DOCUMENT, HIDDEN):
            store.delete_below(name)
    for folder in (COMMITS, INDEX):
        store.delete_below(folder)


def _identity(source: SourceInfo) -> dict[str, Any]:
    identity = {**source.fingerprint, "hidden_size": source.hidden_size}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in identity.items()}
