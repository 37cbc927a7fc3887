"""Blocks as work for other processes: what a planner hands out, and the writer that does it there.

The plan of a cache and its records grow with the rows, so a worker reads neither: a `Unit` brings
along what is committed of its blocks. Nor does it take a lock: it borrows the planner's. When that
is gone, or another planner's, no worker of the first writes another block.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from numpy.typing import NDArray

from llmembed.cache_format.layout.chunks import digest
from llmembed.cache_format.layout.commits import OldRows, is_half_written
from llmembed.cache_format.layout.schema import JSON, ArrayKey
from llmembed.cache_format.stores.base import open_store
from llmembed.cache_format.stores.lock import BorrowedLock
from llmembed.cache_format.writing import blocks
from llmembed.cache_format.writing.plan import Block, SplitPlan
from llmembed.common.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Some blocks of a plan, with all that a worker must know of them."""

    plan: SplitPlan
    """The plan of the split, with these blocks alone."""
    texts: tuple[str, ...]
    """xxh3-128 of the text_hash of each block."""
    old: tuple[Mapping[str, OldRows], ...]
    """What is committed of each block, by the names of the arrays that have any of it."""

    def dumps(self) -> str:
        """Write the unit as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Self:
        """Read what `dumps` wrote."""
        found = json.loads(text)
        plan = found["plan"]
        plan["arrays"] = _keys(plan["arrays"])
        plan["blocks"] = tuple(
            Block(**block | {"missing": _keys(block["missing"])}) for block in plan["blocks"]
        )
        old = ({name: OldRows(**rows) for name, rows in one.items()} for one in found["old"])
        return cls(plan=SplitPlan(**plan), texts=tuple(found["texts"]), old=tuple(old))


class UnitWriter:
    """Writes the blocks of a unit for the writer that planned it.

    Args:
        path: the cache's folder or URL.
        unit: the blocks.
        lease: of the writer that planned them.
    """

    def __init__(self, path: str | os.PathLike[str], unit: Unit, lease: str) -> None:
        self._store = open_store(path)
        self._lock = BorrowedLock(self._store, lease)
        self._unit = unit
        self._places = {block.start: place for place, block in enumerate(unit.plan.blocks)}

    def left(self) -> SplitPlan:
        """List the blocks without those that an earlier attempt at this unit committed."""
        plan = self._unit.plan
        blocks_left = (block for block in plan.blocks if not self._is_committed(block))
        return replace(plan, blocks=tuple(blocks_left))

    def check_texts(self, block: Block, text_hash: NDArray[Any]) -> None:
        """Refuse texts that are not those of the planner.

        Args:
            block: which rows.
            text_hash: uint64 `[rows]` of rows `start` to `stop`, as this process sees them.

        Raises:
            DataError: naming the rows.
        """
        if digest(text_hash) != self._unit.texts[self._places[block.start]]:
            raise DataError(
                f"rows {block.start}-{block.stop} of split {self._unit.plan.split!r} are other "
                "texts for this worker than for the process that planned the work. Put the same "
                "file where every machine reads --dataset."
            )

    def write(
        self,
        plan: SplitPlan,
        block: Block,
        *,
        n_tokens: NDArray[Any],
        features: Mapping[ArrayKey, NDArray[Any]],
    ) -> None:
        """Write a block and commit it, as `CacheWriter.write` does.

        Raises:
            CacheLockedError: if the planner gave its lock back, or lost it.
            ExtractionError, CacheMismatchError, CacheSpaceError, CacheStorageError: as there.
        """
        self._lock.check()
        place = self._places[block.start]
        texts, old = self._unit.texts[place], self._unit.old[place]
        blocks.write_block(self._store, plan, block, old, texts, n_tokens, features)

    def _is_committed(self, block: Block) -> bool:
        place = self._places[block.start]
        hashes = dict.fromkeys(blocks.names_to_write(block, self._unit.old[place]), "")
        record = blocks.record_of(self._unit.plan, block, self._unit.texts[place], hashes)
        found = self._store.get(record.key(self._unit.plan.block_rows))
        return found is not None and not is_half_written(found)


def _keys(pairs: Iterable[JSON]) -> tuple[ArrayKey, ...]:
    return tuple((pooling, layer) for pooling, layer in pairs)
