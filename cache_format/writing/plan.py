"""What is still to be computed: whole blocks of rows, each with the arrays it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmembed.cache_format.layout.commits import BlockCommits
from llmembed.cache_format.layout.documents import ArrayInfo
from llmembed.cache_format.layout.schema import N_TOKENS, ArrayKey, array_name


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of rows that lacks something."""

    start: int
    """First row, a multiple of R."""
    stop: int
    """One past the last row."""
    compute_from: int
    """First row to compute: rows before it are committed in all missing arrays (they were there
    before the data set grew)."""
    missing: tuple[ArrayKey, ...]
    """(pooling, layer) of the arrays to compute, sorted."""


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """What is to be computed of one source in one split."""

    split: str
    """The split's name."""
    source: str
    """The source's name."""
    n_rows: int
    """N."""
    block_rows: int
    """R, the rows of a block."""
    hidden_size: int
    """H."""
    dtype: str
    """Of the stored features."""
    arrays: tuple[ArrayKey, ...]
    """(pooling, layer) of all arrays asked for, sorted."""
    blocks: tuple[Block, ...]
    """The blocks still to do, in order; empty when everything is there."""

    @property
    def n_rows_missing(self) -> int:
        """Rows to compute."""
        return sum(block.stop - block.compute_from for block in self.blocks)

    @property
    def size_bytes(self) -> int:
        """Bytes to write, padding of the edge chunks included."""
        return sum(len(block.missing) for block in self.blocks) * self.feature_info.chunk_bytes

    @property
    def feature_info(self) -> ArrayInfo:
        """The Zarr array of one (pooling, layer)."""
        shape = (self.n_rows, self.hidden_size)
        return ArrayInfo(shape=shape, chunk_rows=self.block_rows, dtype=self.dtype)

    @property
    def n_tokens_info(self) -> ArrayInfo:
        """The Zarr array of the token counts."""
        return ArrayInfo(shape=(self.n_rows,), chunk_rows=self.block_rows, dtype="int32")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all arrays within the source, n_tokens included."""
        return (*(array_name(key) for key in self.arrays), N_TOKENS)


def missing_blocks(
    n_rows: int,
    block_rows: int,
    arrays: tuple[ArrayKey, ...],
    commits: Mapping[str, BlockCommits],
) -> tuple[Block, ...]:
    """List the blocks that lack rows in any of the arrays.

    Args:
        n_rows: N.
        block_rows: R.
        arrays: the arrays asked for.
        commits: what is committed of each, and of n_tokens, by name.
    """
    blocks = []
    for index, start in enumerate(range(0, n_rows, block_rows)):
        stop = min(start + block_rows, n_rows)
        rows = {key: int(commits[array_name(key)].rows[index]) for key in arrays}
        missing = tuple(key for key in arrays if start + rows[key] < stop)
        n_tokens = int(commits[N_TOKENS].rows[index])
        if missing or start + n_tokens < stop:
            first = start + min([n_tokens, *(rows[key] for key in missing)])
            blocks.append(Block(start=start, stop=stop, compute_from=first, missing=missing))
    return tuple(blocks)


def no_commits(n_rows: int, block_rows: int) -> BlockCommits:
    """Say that nothing is committed yet.

    >>> no_commits(100, 64).rows.tolist()
    [0, 0]
    """
    n_blocks = -(-n_rows // block_rows)
    return BlockCommits(rows=np.zeros(n_blocks, np.int64), hashes=(None,) * n_blocks)
