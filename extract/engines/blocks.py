"""Compute blocks of rows and commit them: the loop that every way of extracting runs.

A block is tokenised, batched and computed as a whole. Beside the device, one thread tokenises and
plans the next block, and another waits for the last one and writes it: on a GPU a block is launched
before the features of the last one are there. So memory does not grow with the data set.

A text that stands twice in a block is computed once. No block takes a feature of another: what it
holds depends on its rows alone, so whoever computes it writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import Block, CacheWriter, SplitPlan
from llmembed.cache_format.writing import UnitWriter
from llmembed.common.errors import LLMEmbedWarning, RowError
from llmembed.common.process import return_freed_memory
from llmembed.extract.engines.outcome import Counts
from llmembed.extract.engines.task import Task
from llmembed.extract.features.extractor import Extractor, Features, Planned
from llmembed.extract.features.forward import Tokenized
from llmembed.extract.texts.corpora import DifferentTexts

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
) -> Counts:
    """Compute and commit the blocks of a plan, in order; go on where a row has no feature.

    Args:
        task: where the texts are.
        writer: of the cache.
        plan: the blocks to do.
        extractor: for all missing layers.
        on_batch: called with the number of rows and real tokens of each batch that is launched.

    Returns:
        What was done, and what keeps blocks from being done.
    """
    done = _Blocks(task, writer, plan, extractor, on_batch).done()
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
    ) -> None:
        self._examples = task.corpus.splits[plan.split]
        self._writer, self._plan, self._extractor = writer, plan, extractor
        self._on_batch, self._counts = on_batch, Counts()

    def done(self) -> Counts:
        """Do them all."""
        last: Future[Counts] | None = None
        with ThreadPoolExecutor(1, "behind") as behind:
            for coming in one_ahead(map(self._tokenize, self._plan.blocks)):
                features = self._launch(coming)
                self._on_batch(len(coming.tokenized.ids) - len(coming.different.own), 0)
                if last is not None:
                    self._count(last)
                last = behind.submit(self._write, coming, features)
        if last is not None:
            self._count(last)
        return self._counts

    def _tokenize(self, block: Block) -> _Ready:
        part = self._examples.part(block.compute_from, block.stop)
        tokenized = self._extractor.tokenize(part.batch(slice(None)))
        different = DifferentTexts.among(part)
        planned = self._extractor.prepare(tokenized.take(different.own))
        return _Ready(block=block, tokenized=tokenized, different=different, planned=planned)

    def _launch(self, ready: _Ready) -> Callable[[], Features]:
        rows = ready.block.compute_from + ready.different.own
        name = partial(_row_name, self._plan.split, rows)
        try:
            return self._extractor.launch(ready.planned, self._on_batch, name)
        except RowError as error:
            return partial(_refuse, error)

    def _write(self, ready: _Ready, awaited: Callable[[], Features]) -> Counts:
        """Wait for the features of a block and commit it, or say why it cannot be."""
        try:
            features = awaited()
        except RowError as error:
            return Counts(left=(str(error),))
        places, block = ready.different.places, ready.block
        of_all_rows = {key: features[key][places] for key in block.missing}
        n_tokens = ready.tokenized.n_tokens
        self._writer.write(self._plan, block, n_tokens=n_tokens, features=of_all_rows)
        return_freed_memory()
        return Counts.of(ready.tokenized, n_computed=len(ready.different.own))

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
