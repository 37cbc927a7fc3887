"""Compute blocks of rows and commit them: the loop that every way of extracting runs.

A block is tokenised, batched and computed as a whole. A text that stood in the split before is not
computed again: its feature is read. Who shares the work looks back within a block only, since the
blocks before are not theirs; what such a block holds depends on its rows alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import Block, SplitPlan, open_cache
from llmembed.common.errors import LLMEmbedWarning, RowError
from llmembed.common.process import return_freed_memory
from llmembed.extract.engines.outcome import Counts
from llmembed.extract.engines.overlap import OneBehind, one_ahead
from llmembed.extract.engines.task import Task
from llmembed.extract.features.extractor import Extractor, Features
from llmembed.extract.texts.corpora import DifferentTexts, Examples, first_occurrences


class BlockWriter(Protocol):
    """Who commits a block: a `CacheWriter`, or a `UnitWriter` on its behalf."""

    def write(
        self,
        plan: SplitPlan,
        block: Block,
        *,
        n_tokens: npt.NDArray[Any],
        features: Mapping[tuple[str, int], npt.NDArray[Any]],
    ) -> None:
        """Write a block and commit it."""


def extract_blocks(
    task: Task,
    writer: BlockWriter,
    plan: SplitPlan,
    extractor: Extractor,
    *,
    on_batch: Callable[[int, int], None] | None = None,
    look_back: bool,
) -> Counts:
    """Compute and commit the blocks of a plan, in order; go on where a row has no feature.

    Args:
        task: where the texts are.
        writer: of the cache.
        plan: the blocks to do.
        extractor: for all missing layers.
        on_batch: called with the number of rows and real tokens of each batch that is done.
        look_back: take the features of texts that stood in blocks before, which are all committed.

    Returns:
        What was done, and what keeps blocks from being done.
    """
    counts = Counts()
    examples = task.corpus.splits[plan.split]
    different_texts = _looking_back(examples) if look_back else partial(_within, examples)
    texts = (examples.batch(slice(block.compute_from, block.stop)) for block in plan.blocks)
    tokenized_blocks = one_ahead(map(extractor.tokenize, texts))
    with OneBehind() as writing:
        for block, tokenized in zip(plan.blocks, tokenized_blocks, strict=True):
            different = different_texts(block.compute_from, block.stop)
            row_names = _RowNames(plan.split, block.compute_from + different.own)
            try:
                features = extractor.compute(tokenized.take(different.own), on_batch, row_names)
            except RowError as error:
                counts += _left(error)
                counts.refuse_hopeless()
                different_texts = partial(_within, examples)  # who looked back would miss rows
                continue
            n_tokens = tokenized.n_tokens
            writing.do(
                partial(_write, task.cache, writer, plan, block, n_tokens, features, different)
            )
            return_freed_memory()
            if on_batch is not None:
                on_batch(len(n_tokens) - len(different.own), 0)
            counts += Counts.of(tokenized, n_computed=len(different.own))
    return counts


def _left(error: RowError) -> Counts:
    warnings.warn(f"{error} Going on with the other blocks of rows.", LLMEmbedWarning, stacklevel=3)
    return Counts(left=(str(error),))


def _looking_back(examples: Examples) -> Callable[[int, int], DifferentTexts]:
    return partial(DifferentTexts.among, first_occurrences(examples))


def _within(examples: Examples, start: int, stop: int) -> DifferentTexts:
    part = examples.part(start, stop)
    return DifferentTexts.among(first_occurrences(part), 0, len(part))


def _write(
    cache: str,
    writer: BlockWriter,
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
