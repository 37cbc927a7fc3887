"""Compute blocks of rows and commit them: the loop that every way of extracting runs.

A block is tokenised, batched and computed as a whole. Beside the device, one thread tokenises the
next block and another writes the last one, so memory does not grow with the data set.

A text that stood in the split before is not computed again: its feature is read. Who does a part of
the blocks looks back within a block only, since the blocks before belong to others; what such a
block holds depends on its rows alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import Block, CacheWriter, SplitPlan, open_cache
from llmembed.cache_format.writing import UnitWriter
from llmembed.common.errors import LLMEmbedWarning, RowError
from llmembed.common.process import return_freed_memory
from llmembed.extract.engines.outcome import Counts
from llmembed.extract.engines.task import Task
from llmembed.extract.features.extractor import Extractor, Features
from llmembed.extract.texts.corpora import DifferentTexts, Examples, first_occurrences

T = TypeVar("T")


def extract_blocks(
    task: Task,
    writer: CacheWriter | UnitWriter,
    plan: SplitPlan,
    extractor: Extractor,
    *,
    on_batch: Callable[[int, int], None] = lambda *_: None,
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
    originals = first_occurrences(examples) if look_back else None
    texts = (examples.batch(slice(block.compute_from, block.stop)) for block in plan.blocks)
    tokenized_blocks = one_ahead(map(extractor.tokenize, texts))
    with one_behind() as write:
        for block, tokenized in zip(plan.blocks, tokenized_blocks, strict=True):
            first, stop = block.compute_from, block.stop
            if originals is None:
                different = _within(examples.part(first, stop))
            else:
                different = DifferentTexts.among(originals, first, stop)
            name = partial(_row_name, plan.split, first + different.own)
            try:
                features = extractor.compute(tokenized.take(different.own), on_batch, name)
            except RowError as error:
                going_on = f"{error} Going on with the other blocks of rows."
                warnings.warn(going_on, LLMEmbedWarning, stacklevel=2)
                counts += Counts(left=(str(error),))
                counts.refuse_hopeless()
                originals = None  # this block, which later ones would look back to, is missing
                continue
            n_tokens = tokenized.n_tokens
            write(partial(_write, task.cache, writer, plan, block, n_tokens, features, different))
            return_freed_memory()
            on_batch(len(n_tokens) - len(different.own), 0)
            counts += Counts.of(tokenized, n_computed=len(different.own))
    return counts


def _within(examples: Examples) -> DifferentTexts:
    return DifferentTexts.among(first_occurrences(examples), 0, len(examples))


def _row_name(split: str, rows: npt.NDArray[np.int64], index: int) -> str:
    return f"split {split!r}, row {rows[index]}"


def _write(
    cache: str,
    writer: CacheWriter | UnitWriter,
    plan: SplitPlan,
    block: Block,
    n_tokens: npt.NDArray[np.int32],
    features: Features,
    different: DifferentTexts,
) -> None:
    def committed(pooling: str, layer: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        split = open_cache(cache)[plan.split]
        return split.features(layer, plan.source, pooling, rows, allow_partial=True)

    of_all_rows = {
        key: different.spread(features[key], partial(committed, *key)) for key in block.missing
    }
    writer.write(plan, block, n_tokens=n_tokens, features=of_all_rows)


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Make each item in a thread while the one before it is used; errors come at its turn.

    >>> list(one_ahead(number * 10 for number in range(3)))
    [0, 10, 20]
    """
    coming_items = ([item] for item in items)
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(next, coming_items, None)
        while made := coming.result():
            coming = thread.submit(next, coming_items, None)
            yield made[0]


@contextlib.contextmanager
def one_behind() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Do work in a thread, in order, while the caller goes on to the next.

    What is given waits for the work before and raises its error. Leaving waits for the last work;
    its error comes out there, unless another one does.
    """
    last: list[Future[None]] = []

    def do(work: Callable[[], None]) -> None:
        while last:
            last.pop().result()
        last.append(thread.submit(work))

    with ThreadPoolExecutor(1, "behind") as thread:
        yield do
    while last:
        last.pop().result()
