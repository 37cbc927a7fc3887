"""What is still to be computed: whole blocks of rows, each with the arrays it lacks.

A plan grows with the rows, so processes that work for the planner are sent parts of it: units.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from llmembed.cache_format.layout.arrays import digest
from llmembed.cache_format.layout.commits import ArrayCommits, OldRows, Record
from llmembed.cache_format.layout.documents import FEATURE_DTYPES, JSON, ArrayInfo
from llmembed.cache_format.layout.schema import (
    N_TOKENS,
    ArrayKey,
    SourceInfo,
    array_name,
    check_name,
)
from llmembed.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of rows that lacks something, with all that its writer must know of it."""

    start: int  # first row, a multiple of R
    stop: int  # one past the last row
    compute_from: int  # earlier rows were committed before the data set grew, in all missing arrays
    missing: tuple[ArrayKey, ...]  # (pooling, layer) of the arrays to compute, sorted
    texts: str  # xxh3-128 of the block's text_hash
    old: Mapping[str, OldRows]  # what is committed of the block, by the names of such arrays

    @property
    def names(self) -> list[str]:
        """Names of the arrays that its record will name."""
        names = [array_name(key) for key in self.missing]
        counted = N_TOKENS in self.old and self.old[N_TOKENS].n_rows == self.stop - self.start
        return names if counted else [*names, N_TOKENS]


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """What is to be computed of one source in one split."""

    split: str
    source: str
    n_rows: int  # N
    block_rows: int  # R, the rows of a block
    hidden_size: int  # H
    dtype: str  # of the stored features
    arrays: tuple[ArrayKey, ...]  # (pooling, layer) of all arrays asked for, sorted
    blocks: tuple[Block, ...]  # still to do, in order; empty when everything is there

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

    def record(self, block: Block, hashes: Mapping[str, str]) -> Record:
        """Make the record of a block: `hashes` are of the rows of each array."""
        return Record(
            split=self.split,
            source=self.source,
            start=block.start,
            stop=block.stop,
            texts=block.texts,
            arrays=hashes,
        )

    def part(self, blocks: Iterable[Block]) -> Self:
        """Make the plan of some of the blocks alone."""
        return replace(self, blocks=tuple(blocks))

    def dumps(self) -> str:
        """Write the plan as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Self:
        """Read what `dumps` wrote."""
        plan = json.loads(text)
        for block in plan["blocks"]:
            block["missing"] = _keys(block["missing"])
            block["old"] = {name: OldRows(**rows) for name, rows in block["old"].items()}
        blocks = tuple(Block(**block) for block in plan["blocks"])
        return cls(**plan | {"arrays": _keys(plan["arrays"]), "blocks": blocks})


def missing_blocks(
    arrays: tuple[ArrayKey, ...],
    block_rows: int,
    commits: Mapping[str, ArrayCommits],
    text_hash: NDArray[np.uint64],
) -> Iterator[Block]:
    """Yield the blocks of R rows that lack rows in any of the arrays.

    `commits` says what is committed of each array, and of n_tokens, by name; `text_hash` is `[N]`.
    """
    for index, start in enumerate(range(0, len(text_hash), block_rows)):
        stop = min(start + block_rows, len(text_hash))
        blocks = {name: one.block(index) for name, one in commits.items()}
        old = {name: rows for name, rows in blocks.items() if rows is not None}
        done = {name: start + rows.n_rows for name, rows in old.items()}
        missing = tuple(key for key in arrays if done.get(array_name(key), start) < stop)
        names = [N_TOKENS, *map(array_name, missing)]
        first = min(done.get(name, start) for name in names)
        if first < stop:
            texts = digest(text_hash[start:stop])
            yield Block(
                start=start, stop=stop, compute_from=first, missing=missing, texts=texts, old=old
            )


def checked_arrays(
    source: SourceInfo, arrays: Iterable[ArrayKey], dtype: str
) -> tuple[ArrayKey, ...]:
    """Refuse a pooling, layer or dtype that a source cannot have; give the arrays sorted."""
    if dtype not in FEATURE_DTYPES:
        raise ConfigError.unknown("dtype", dtype, FEATURE_DTYPES, "Pass one to --dtype.")
    keys = tuple(sorted(set(arrays)))
    for pooling, layer in keys:
        check_name("pooling", pooling)
        if not 0 <= layer <= source.n_layers:
            raise ConfigError(
                f"layer {layer} does not exist in {source.name}, which has {source.n_layers} "
                f"layers (1-{source.n_layers}; 0 is the embeddings). Pass --layers within that "
                "range."
            )
    return keys


def _keys(pairs: Iterable[JSON]) -> tuple[ArrayKey, ...]:
    return tuple((pooling, layer) for pooling, layer in pairs)
