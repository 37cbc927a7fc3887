"""Compute blocks of rows and commit them: the loop that every way of extracting runs.

A block is tokenised, batched and computed as a whole. A text that stood in the split before is not
computed again: its feature is read. Ranks look back within a block only, since the blocks before
are not theirs; what a rank's block holds then depends on its rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import Block, CacheWriter, SplitPlan, open_cache
from llmembed.extract.duplicates import DifferentTexts, first_occurrences
from llmembed.extract.extractor import Extractor, Features
from llmembed.extract.outcome import Counts
from llmembed.extract.overlap import OneBehind, one_ahead
from llmembed.extract.task import Task


def extract_blocks(
    task: Task,
    writer: CacheWriter,
    plan: SplitPlan,
    extractor: Extractor,
    on_batch: Callable[[int, int], None],
) -> Counts:
    """Compute and commit the blocks of a plan, in order.

    Args:
        task: where the texts are.
        writer: of the cache.
        plan: the blocks to do.
        extractor: for all missing layers.
        on_batch: called with the number of rows and real tokens of each batch that is done.

    Returns:
        What was done.
    """
    counts = Counts()
    examples = task.corpus.splits[plan.split]
    originals = first_occurrences(examples)
    texts = (examples.batch(slice(block.compute_from, block.stop)) for block in plan.blocks)
    tokenized_blocks = one_ahead(map(extractor.tokenize, texts))
    with OneBehind() as writing:
        for block, tokenized in zip(plan.blocks, tokenized_blocks, strict=True):
            different = DifferentTexts.among(
                originals,
                block.compute_from,
                block.stop,
                look_back=task.config.world is None,
            )
            features = extractor.compute(
                tokenized.take(different.own),
                on_batch=on_batch,
                describe_row=_RowNames(plan.split, block.compute_from + different.own),
            )
            n_tokens = tokenized.n_tokens
            writing.do(
                partial(_write, task.cache, writer, plan, block, n_tokens, features, different)
            )
            on_batch(len(n_tokens) - len(different.own), 0)
            counts += Counts.of(tokenized, n_computed=len(different.own))
    return counts


def _write(
    cache: str,
    writer: CacheWriter,
    plan: SplitPlan,
    block: Block,
    n_tokens: npt.NDArray[np.int32],
    features: Features,
    different: DifferentTexts,
) -> None:
    writer.write(
        plan,
        block,
        n_tokens=n_tokens,
        features={
            key: different.spread(features[key], _committed(cache, plan, key))
            for key in block.missing
        },
    )


def _committed(
    cache: str, plan: SplitPlan, key: tuple[str, int]
) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]:
    """Read rows of one array that are committed: blocks are done in order."""
    pooling, layer = key

    def read(rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        split = open_cache(cache)[plan.split]
        return split.features(layer, plan.source, pooling, rows, allow_partial=True)

    return read


class _RowNames:
    """Names a computed text by its split and row, for messages."""

    def __init__(self, split: str, rows: npt.NDArray[np.int64]) -> None:
        self._split = split
        self._rows = rows

    def __call__(self, index: int) -> str:
        return f"split {self._split!r}, row {self._rows[index]}"
