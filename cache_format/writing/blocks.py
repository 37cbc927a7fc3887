"""One block of rows: check what is there, write its chunks, commit it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmembed.cache_format.layout.arrays import decode, digest, encode
from llmembed.cache_format.layout.commits import (
    ArrayCommits,
    OldRows,
    Record,
    StoredSource,
    is_half_written,
)
from llmembed.cache_format.layout.documents import ArrayInfo, dump, read_array_info
from llmembed.cache_format.layout.schema import N_TOKENS, ArrayKey, array_name
from llmembed.cache_format.stores import Store
from llmembed.cache_format.writing.plan import Block, SplitPlan
from llmembed.common.errors import CacheCorruptError, CacheMismatchError, ExtractionError

_log = logging.getLogger(__name__)


def write_block(
    store: Store,
    plan: SplitPlan,
    block: Block,
    n_tokens: NDArray[Any],
    features: Mapping[ArrayKey, NDArray[Any]],
) -> None:
    """Write the chunks of a block, then its record: what `CacheWriter.write` does.

    Rows that were committed before the data set grew are taken from the store, never from the
    caller.
    """
    if set(features) != set(block.missing):
        raise CacheMismatchError(
            f"rows {block.start}-{block.stop} of {plan.split!r} lack {sorted(block.missing)}, but "
            f"{sorted(features)} were given. Write exactly what the plan names."
        )
    whole = min(block.start + plan.block_rows, plan.n_rows)
    if block.start % plan.block_rows or block.stop != whole:
        raise CacheMismatchError(
            f"rows {block.start}-{block.stop} of {plan.split!r} are no block of a plan with "
            f"{plan.n_rows} rows in blocks of {plan.block_rows}, so that chunks would be mixed. "
            "Write the blocks that the plan names."
        )
    arrays = {array_name(key): (plan.feature_info, features[key]) for key in block.missing}
    arrays[N_TOKENS] = (plan.n_tokens_info, n_tokens)
    hashes = {}
    for name in block.names:
        info, given = arrays[name]
        key = f"{plan.split}/{plan.source}/{name}"
        chunk_key = f"{key}/{info.chunk_key(block.start // plan.block_rows)}"
        rows = _checked_rows(info, block, f"{store.location}/{key}", given)
        if name in block.old:
            old = block.old[name]
            new_rows = rows[block.start + old.n_rows - block.compute_from :]
            rows = np.concatenate([_old_rows(store, chunk_key, info, old), new_rows])
        store.put(chunk_key, encode(info, rows))
        hashes[name] = digest(rows)
    commit(store, plan.record(block, hashes), plan.block_rows)


def commit(store: Store, record: Record, block_rows: int) -> None:
    """Create the record of a block; the same or a half-written one may be there already."""
    key, data = record.key(block_rows), dump(record.document())
    if store.create(key, data):
        return
    found = store.get(key)
    if found is None or is_half_written(found):
        store.put(key, [data])
    elif found != data:
        raise CacheMismatchError(
            f"{store.location}/{key} was committed by another writer with other features. Run "
            f"`llmembed-cache verify {store.location}`, then extract again what it names."
        )


def sound_commits(
    store: Store,
    source: StoredSource,
    names: Sequence[str],
    text_hash: NDArray[np.uint64],
    *,
    repair: bool,
) -> dict[str, ArrayCommits]:
    """Say what is committed of each array, leaving out blocks whose chunk is gone or truncated.

    A power cut can leave a record without its chunk. Such a block is redone; with `repair` the
    array is struck from its records, so that it can be committed anew.
    """
    found = {name: source.commits(name) for name in names}
    source.check_texts(text_hash)
    lost = {}
    for name, one in found.items():
        blocks = _lost_blocks(store, f"{source.key}/{name}", np.flatnonzero(one.rows).tolist())
        if blocks:
            lost[name] = blocks
            rows = one.rows.copy()
            rows[list(blocks)] = 0
            found[name] = replace(one, rows=rows)
    if repair:
        source.drop(lost)
    return found


def _lost_blocks(store: Store, key: str, committed: list[int]) -> set[int]:
    if not committed:
        return set()
    info = read_array_info(store, key)
    if not info.plain:
        raise CacheMismatchError(
            f"{store.location}/{key} is sharded or compressed: an export is only read. Extend the "
            "cache it was made from, or convert it back with `llmembed-cache convert`."
        )
    sizes = store.sizes(key)
    lost = {i for i in committed if sizes.get(info.chunk_key(i)) != info.chunk_bytes}
    if lost:
        _log.warning(
            "%s/%s: %d committed chunks are missing or truncated, from rows %d on; their blocks "
            "are extracted again.",
            *(store.location, key, len(lost), min(lost) * info.chunk_rows),
        )
    return lost


def _checked_rows(info: ArrayInfo, block: Block, where: str, given: NDArray[Any]) -> NDArray[Any]:
    expected = (block.stop - block.compute_from, *info.shape[1:])
    if np.shape(given) != expected:
        raise CacheMismatchError(
            f"{where}, rows {block.compute_from}-{block.stop}: an array of shape {expected} was "
            f"expected, {np.shape(given)} was given."
        )
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(given, info.numpy_dtype)
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ExtractionError(
            f"{where}, row {block.compute_from + row}: feature {column} is {rows[row, column]} in "
            f"{rows.dtype}, whose largest value is {np.finfo(rows.dtype).max}. Pass --dtype "
            "float32 if the model's values are finite; otherwise --compute-dtype float32."
        )
    return rows


def _old_rows(store: Store, chunk_key: str, info: ArrayInfo, old: OldRows) -> NDArray[Any]:
    rows = decode(info, store.view(chunk_key, info.chunk_bytes))[: old.n_rows]
    if digest(rows) != old.hash:
        raise CacheCorruptError(
            f"{store.location}/{chunk_key} does not hold the rows that were committed, so no rows "
            f"can be added to it. Run `llmembed-cache verify {store.location}`."
        )
    return rows
