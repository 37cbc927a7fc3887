"""What a worker does: it loads the backbone once, then does units and gives receipts.

Ray imports this module in every process that it starts, also in those that only hash chunks and
those that end before their first unit: what takes seconds to import is imported by the first unit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import queue
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmembed.cache_format import SplitPlan
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import Part
from llmembed.cache_format.writing import UnitWriter
from llmembed.common.errors import (
    CacheLockedError,
    CacheSpaceError,
    ExtractionError,
    LLMEmbedError,
    LLMEmbedWarning,
)

if TYPE_CHECKING:
    from llmembed.extract.engines.outcome import Counts
    from llmembed.extract.engines.task import Task

_FATAL = (CacheLockedError, CacheSpaceError, ExtractionError)
"""What every other unit would meet as well."""


class Worker:
    """One of several processes: loads the backbone once, then does units.

    Args:
        job: what every worker must know, as `units.job_of` makes it of a task.
        on_batch: called with the number of rows and real tokens of each batch that is done.

    Attributes:
        is_broken: its device failed, and may fail again: another process is to do the next unit.
    """

    def __init__(self, job: str, on_batch: Callable[[int, int], None] = lambda *_: None) -> None:
        self._job: dict[str, Any] = json.loads(job)
        self._on_batch = on_batch
        self._task: Task | None = None
        self.is_broken = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Do a unit, and give its receipt, as Ray Data asks for it."""
        if self.is_broken:
            os._exit(1)
        (number,), (unit,) = batch["number"], batch["unit"]
        return {"receipt": [json.dumps(self.receipt(int(number), unit))]}

    def receipt(self, number: int, unit: str | None) -> dict[str, Any]:
        """Load the backbone, do a unit if there is one, and tell how that went."""
        receipt: dict[str, Any] = {"number": number, "host": platform.node()}
        receipt |= {"counts": {}, "fatal": "", "reason": "", "kind": ""}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LLMEmbedWarning)
            try:
                self._open()
            except (LLMEmbedError, ImportError) as error:
                receipt |= {"fatal": str(error), "kind": type(error).__name__}
            else:
                if unit is not None:
                    self._fill(receipt, unit)
        receipt["warnings"] = [
            str(one.message) for one in caught if issubclass(one.category, LLMEmbedWarning)
        ]
        return receipt

    def borrow(self, lease: str) -> None:
        """Write for another writer than the job names."""
        self._job["lease"] = lease

    def _fill(self, receipt: dict[str, Any], unit: str) -> None:
        try:
            receipt["counts"] = dataclasses.asdict(self._do(SplitPlan.loads(unit)))
        except _FATAL as error:
            receipt |= {"fatal": str(error), "kind": type(error).__name__}
        except LLMEmbedError as error:
            receipt |= {"reason": str(error), "kind": type(error).__name__}
        except (RuntimeError, OSError, MemoryError, ValueError) as error:
            self.is_broken = True
            receipt["reason"] = f"{type(error).__name__}: {error}"

    def _open(self) -> None:
        if self._task is None:
            from llmembed.cache_format import SourceInfo
            from llmembed.extract.backbones.recipe import Recipe
            from llmembed.extract.engines.task import Placement, Task
            from llmembed.extract.texts import DatasetOptions, Dialect
            from llmembed.extract.texts.corpora import load_corpus

            job = self._job
            dialect = Dialect(**job["texts"]["dialect"])
            options = DatasetOptions(**job["texts"] | {"dialect": dialect})
            task = Task(
                corpus=load_corpus(options),
                recipe=Recipe.from_record(job["source"]["recipe"]),
                source=SourceInfo(**job["source"]),
                layers=tuple(job["layers"]),
                poolings=tuple(job["poolings"]),
                cache=job["cache"],
                placement=Placement(**job["placement"]),
            )
            fingerprint = task.source.fingerprint
            self._extractor = task.load_extractor(
                task.layers, expected=fingerprint, n_rows=job["n_rows"]
            )
            self._task = task

    def _do(self, unit: SplitPlan) -> Counts:
        from llmembed.extract.engines.blocks import extract_blocks

        assert self._task is not None
        writer = UnitWriter(self._task.cache, unit, self._job["lease"])
        plan = writer.left()
        examples = self._task.corpus.splits[plan.split]
        for block in plan.blocks:
            writer.check_texts(block, examples.part(block.start, block.stop).text_hash)
        return extract_blocks(self._task, writer, plan, self._extractor, on_batch=self._on_batch)


def serve() -> None:
    """Be a worker of the process that started this one, which asks on stdin, a line each.

    It is answered on stdout. Where stdin ends, that process has ended, and so does this one, at
    once: what it has not committed is nobody's any more.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(answer: dict[str, Any]) -> None:
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except OSError:
            os._exit(1)

    worker = Worker(
        lines.get(), on_batch=lambda rows, tokens: say({"rows": rows, "tokens": tokens})
    )
    say(worker.receipt(-1, None))
    while not worker.is_broken:
        number, unit, lease = json.loads(lines.get())
        worker.borrow(lease)
        say(worker.receipt(number, unit))
    os._exit(1)


def _listen(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def hash_part(batch: dict[str, Any], cache: str) -> dict[str, list[str]]:
    """Hash the chunks of a part of a cache, and name the blocks that are bad."""
    (text,) = batch["part"]
    return {"part": [text], "bad": [json.dumps(Part.loads(text).bad_blocks(open_store(cache)))]}
