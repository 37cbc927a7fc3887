"""One block of rows: check what is there, write its chunks, commit it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmembed.cache_format.layout.chunks import decode, digest, encode
from llmembed.cache_format.layout.commits import (
    BlockCommits,
    Commits,
    OldRows,
    Record,
    is_half_written,
)
from llmembed.cache_format.layout.documents import ArrayInfo, dump, read_array_info
from llmembed.cache_format.layout.schema import N_TOKENS, ArrayKey, array_name
from llmembed.cache_format.stores.base import Store
from llmembed.cache_format.writing.plan import Block, SplitPlan
from llmembed.common.errors import (
    CacheCorruptError,
    CacheMismatchError,
    ExtractionError,
)

_log = logging.getLogger(__name__)
_EXPONENT = {2: (np.uint16, 0x7C00, 0x7FFF), 4: (np.uint32, 0x7F800000, 0x7FFFFFFF)}


def recheck(
    store: Store,
    commits: Commits,
    names: Sequence[str],
    text_hash: NDArray[np.uint64],
    *,
    repair: bool,
) -> dict[str, BlockCommits]:
    """Say what is committed of each array, leaving out blocks whose chunk is gone or truncated.

    A power cut can leave a record without its chunk. Such a block is redone; with `repair` the
    array is struck from its records, so that it can be committed anew.
    """
    found = {name: commits.array(name) for name in names}
    commits.check_texts(text_hash)
    lost = {name: _lost_blocks(store, commits, name, found[name].rows) for name in names}
    lost = {name: blocks for name, blocks in lost.items() if blocks}
    if repair:
        commits.drop(lost)
    return {name: _without(found[name], lost.get(name, set())) for name in names}


def write_block(
    store: Store,
    plan: SplitPlan,
    block: Block,
    old: Mapping[str, OldRows],
    texts: str,
    n_tokens: NDArray[Any],
    features: Mapping[ArrayKey, NDArray[Any]],
) -> None:
    """Write the chunks of a block, then its record.

    Rows that were committed before the data set grew are taken from the store, never from the
    caller.

    Args:
        store: where the cache lies.
        plan: where the block comes from.
        block: which rows.
        old: what is committed of the block, by the names of the arrays that have any of it.
        texts: xxh3-128 of the block's text_hash.
        n_tokens: int32 `[rows]`.
        features: `[rows, H]` for each of `block.missing`.
    """
    hashes = _write_chunks(store, plan, block, old, n_tokens, features)
    commit(store, record_of(plan, block, texts, hashes), plan.block_rows)


def names_to_write(block: Block, old: Mapping[str, OldRows]) -> list[str]:
    """List the arrays that a block's record will name."""
    names = [array_name(key) for key in block.missing]
    counted = N_TOKENS in old and old[N_TOKENS].n_rows == block.stop - block.start
    return names if counted else [*names, N_TOKENS]


def record_of(plan: SplitPlan, block: Block, texts: str, hashes: Mapping[str, str]) -> Record:
    """Make the record of a block."""
    return Record(
        split=plan.split,
        source=plan.source,
        start=block.start,
        stop=block.stop,
        texts=texts,
        arrays=hashes,
    )


def _write_chunks(
    store: Store,
    plan: SplitPlan,
    block: Block,
    old: Mapping[str, OldRows],
    n_tokens: NDArray[Any],
    features: Mapping[ArrayKey, NDArray[Any]],
) -> dict[str, str]:
    """Write the chunks of a block; give the xxh3-128 of the rows of each, by array name."""
    if set(features) != set(block.missing):
        raise CacheMismatchError(
            f"rows {block.start}-{block.stop} of {plan.split!r} lack {sorted(block.missing)}, but "
            f"{sorted(features)} were given. Write exactly what the plan names."
        )
    arrays = {array_name(key): (plan.feature_info, features[key]) for key in block.missing}
    arrays[N_TOKENS] = (plan.n_tokens_info, n_tokens)
    index = block.start // plan.block_rows
    hashes = {}
    for name in names_to_write(block, old):
        info, given = arrays[name]
        key = f"{plan.split}/{plan.source}/{name}"
        rows = _checked_rows(info, block, f"{store.location}/{key}", given)
        if name in old:
            new_rows = rows[block.start + old[name].n_rows - block.compute_from :]
            rows = np.concatenate([_old_rows(store, key, info, index, old[name]), new_rows])
        store.put(f"{key}/{info.chunk_key(index)}", encode(info, rows))
        hashes[name] = digest(rows)
    return hashes


def commit(store: Store, record: Record, block_rows: int) -> None:
    """Create the record of a block; the same or a half-written one may be there already.

    Raises:
        CacheMismatchError: if another writer committed other bytes for the block.
    """
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


def _checked_rows(info: ArrayInfo, block: Block, where: str, given: NDArray[Any]) -> NDArray[Any]:
    expected = (block.stop - block.compute_from, *info.shape[1:])
    if np.shape(given) != expected:
        raise CacheMismatchError(
            f"{where}, rows {block.compute_from}-{block.stop}: an array of shape {expected} was "
            f"expected, {np.shape(given)} was given."
        )
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(given, info.numpy_dtype)
    if info.dtype.startswith("float"):
        _check_finite(rows, block, where)
    return rows


def _check_finite(rows: NDArray[Any], block: Block, where: str) -> None:
    # Integer compare: numpy's isfinite on float16 is four times slower and would cost a tenth of
    # the write. Infinity and NaN are the values whose exponent bits are all set.
    unsigned, exponent, magnitude = _EXPONENT[rows.itemsize]
    bits = rows.view(unsigned) & magnitude
    if bits.size and bits.max() >= exponent:
        row, column = np.argwhere(bits >= exponent)[0]
        raise ExtractionError(
            f"{where}, row {block.compute_from + row}: feature {column} is {rows[row, column]} in "
            f"{rows.dtype}, whose largest value is {np.finfo(rows.dtype).max}. Pass --dtype "
            "float32 if the model's values are finite; otherwise --compute-dtype float32."
        )


def _old_rows(store: Store, key: str, info: ArrayInfo, index: int, old: OldRows) -> NDArray[Any]:
    chunk = store.view(f"{key}/{info.chunk_key(index)}", info.chunk_bytes)
    rows = decode(info, chunk)[: old.n_rows]
    if digest(rows) != old.hash:
        raise CacheCorruptError(
            f"{store.location}/{key}/{info.chunk_key(index)} does not hold the rows that were "
            f"committed, so no rows can be added to it. Run `llmembed-cache verify "
            f"{store.location}`."
        )
    return rows


def _lost_blocks(store: Store, commits: Commits, name: str, rows: NDArray[np.int64]) -> set[int]:
    if not rows.any():
        return set()
    key = f"{commits.split}/{commits.source}/{name}"
    info = read_array_info(store, key)
    if not info.plain:
        raise CacheMismatchError(
            f"{store.location}/{key} is sharded or compressed: an export is only read. Extend the "
            "cache it was made from, or convert it back with `llmembed-cache convert`."
        )
    sizes = store.sizes(key)
    lost = {
        int(i)
        for i in np.flatnonzero(rows)
        if sizes.get(info.chunk_key(int(i))) != info.chunk_bytes
    }
    if lost:
        _log.warning(
            "%s/%s: %d committed chunks are missing or truncated, from rows %d on; their blocks "
            "are extracted again.",
            *(store.location, key, len(lost), min(lost) * info.chunk_rows),
        )
    return lost


def _without(commits: BlockCommits, lost: set[int]) -> BlockCommits:
    rows = commits.rows.copy()
    rows[list(lost)] = 0
    return BlockCommits(rows=rows, hashes=commits.hashes)
