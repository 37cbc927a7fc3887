"""Compute blocks of rows and commit them: the loop that every way of extracting runs.

A block is tokenised, batched and computed as a whole and on its own: texts that stand in it twice
are computed once, those of other blocks are not looked at. So its bits depend on its rows alone,
whoever computes it and whatever was done before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import Block, CacheWriter, SplitPlan
from llmembed.extract.duplicates import first_occurrences
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
    texts = (examples.batch(slice(block.compute_from, block.stop)) for block in plan.blocks)
    tokenized_blocks = one_ahead(map(extractor.tokenize, texts))
    with OneBehind() as writing:
        for block, tokenized in zip(plan.blocks, tokenized_blocks, strict=True):
            own, original = first_occurrences(examples, slice(block.compute_from, block.stop))
            features = extractor.compute(
                tokenized.take(own),
                on_batch=on_batch,
                describe_row=_RowNames(plan.split, block.compute_from + own),
            )
            writing.do(partial(_write, writer, plan, block, tokenized.n_tokens, features, original))
            on_batch(len(original) - len(own), 0)
            counts += Counts.of(tokenized, n_computed=len(own))
    return counts


def _write(
    writer: CacheWriter,
    plan: SplitPlan,
    block: Block,
    n_tokens: npt.NDArray[np.int32],
    features: Features,
    original: npt.NDArray[np.int64],
) -> None:
    writer.write(
        plan,
        block,
        n_tokens=n_tokens,
        features={key: features[key][original] for key in block.missing},
    )


class _RowNames:
    """Names a computed text by its split and row, for messages."""

    def __init__(self, split: str, rows: npt.NDArray[np.int64]) -> None:
        self._split = split
        self._rows = rows

    def __call__(self, index: int) -> str:
        return f"split {self._split!r}, row {self._rows[index]}"
