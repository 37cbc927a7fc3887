"""Compute blocks of rows and commit them: the loop that every way of extracting runs.

A block is tokenised, batched and computed as a whole. Beside the device, one thread tokenises and
plans the next block, and another waits for the last one and writes it: on a GPU a block is launched
before the features of the last one are there. So memory does not grow with the data set.

A text that stood in the split before is not computed again: its feature is read. Who does a part of
the blocks looks back within a block only, since the blocks before belong to others; what such a
block holds depends on its rows alone.
"""

from __future__ import annotations

import dataclasses
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
from llmembed.extract.features.extractor import Extractor, Features, Planned
from llmembed.extract.features.forward import Tokenized
from llmembed.extract.texts.corpora import DifferentTexts, first_occurrences

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ready:
    """A block that can be launched."""

    block: Block
    tokenized: Tokenized
    """Its texts."""
    different: DifferentTexts
    planned: Planned
    """Those of its texts that are computed."""


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
        on_batch: called with the number of rows and real tokens of each batch that is launched.
        look_back: take the features of texts that stood in blocks before, which are all committed.

    Returns:
        What was done, and what keeps blocks from being done.
    """
    originals = first_occurrences(task.corpus.splits[plan.split]) if look_back else None
    done = _Blocks(task, writer, plan, extractor, on_batch, originals).done()
    return done + Counts(ways=(extractor.way,))


class _Blocks:
    """The blocks of a plan, and what is done of them."""

    def __init__(
        self,
        task: Task,
        writer: CacheWriter | UnitWriter,
        plan: SplitPlan,
        extractor: Extractor,
        on_batch: Callable[[int, int], None],
        originals: npt.NDArray[np.int64] | None,
    ) -> None:
        self._examples, self._cache = task.corpus.splits[plan.split], task.cache
        self._writer, self._plan, self._extractor = writer, plan, extractor
        self._on_batch, self._originals, self._counts = on_batch, originals, Counts()

    def done(self) -> Counts:
        """Do them all."""
        last: Future[Counts] | None = None
        with ThreadPoolExecutor(1, "behind") as behind:
            for coming in one_ahead(map(self._tokenize, self._plan.blocks)):
                ready, features = coming, self._launch(coming, self._on_batch)
                self._on_batch(len(ready.tokenized.ids) - len(ready.different.own), 0)
                if last is not None:
                    self._count(last)
                if self._counts.left and len(ready.different.earlier):
                    ready = self._prepare(ready.block, ready.tokenized)
                    features = self._launch(ready, lambda *_: None)
                last = behind.submit(self._write, ready, features)
        if last is not None:
            self._count(last)
        return self._counts

    def _tokenize(self, block: Block) -> _Ready:
        texts = self._examples.batch(slice(block.compute_from, block.stop))
        return self._prepare(block, self._extractor.tokenize(texts))

    def _prepare(self, block: Block, tokenized: Tokenized) -> _Ready:
        first, stop = block.compute_from, block.stop
        if self._originals is None or self._counts.left:  # what it looks back to may be missing
            part = self._examples.part(first, stop)
            different = DifferentTexts.among(first_occurrences(part), 0, len(part))
        else:
            different = DifferentTexts.among(self._originals, first, stop)
        planned = self._extractor.prepare(tokenized.take(different.own))
        return _Ready(block=block, tokenized=tokenized, different=different, planned=planned)

    def _launch(
        self, ready: _Ready, on_batch: Callable[[int, int], None]
    ) -> Callable[[], Features]:
        rows = ready.block.compute_from + ready.different.own
        name = partial(_row_name, self._plan.split, rows)
        try:
            return self._extractor.launch(ready.planned, on_batch, name)
        except RowError as error:
            return partial(_refuse, error)

    def _write(self, ready: _Ready, awaited: Callable[[], Features]) -> Counts:
        """Wait for the features of a block and commit it, or say why it cannot be."""
        try:
            features = awaited()
        except RowError as error:
            return Counts(left=(str(error),))
        spread, block = ready.different.spread, ready.block
        of_all_rows = {
            key: spread(features[key], partial(self._committed, *key)) for key in block.missing
        }
        n_tokens = ready.tokenized.n_tokens
        self._writer.write(self._plan, block, n_tokens=n_tokens, features=of_all_rows)
        return_freed_memory()
        return Counts.of(ready.tokenized, n_computed=len(ready.different.own))

    def _committed(self, pooling: str, layer: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        split = open_cache(self._cache)[self._plan.split]
        return split.features(layer, self._plan.source, pooling, rows, allow_partial=True)

    def _count(self, written: Future[Counts]) -> None:
        done = written.result()
        for reason in done.left:
            going_on = f"{reason} Going on with the other blocks of rows."
            warnings.warn(going_on, LLMEmbedWarning, stacklevel=4)
        self._counts += done
        self._counts.refuse_hopeless()


def _row_name(split: str, rows: npt.NDArray[np.int64], index: int) -> str:
    return f"split {split!r}, row {rows[index]}"


def _refuse(error: RowError) -> Features:
    raise error


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
