"""What a worker of Ray does: it loads the backbone once, then does units and gives receipts.

Ray imports this module in every process that it starts, also in those that only hash chunks and
those that end before their first unit: what takes seconds to import is imported by the first unit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import warnings
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
    """One process of the pool: loads the backbone once, then does units.

    Args:
        job: what every worker must know, as `ray_engine` makes it of a task.
    """

    def __init__(self, job: str) -> None:
        self._job: dict[str, Any] = json.loads(job)
        self._task: Task | None = None
        self._broken = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Do a unit, and give its receipt."""
        if self._broken:  # a device that failed once fails again: another process does this unit
            os._exit(1)
        (number,), (unit,) = batch["number"], batch["unit"]
        receipt: dict[str, Any] = {"number": int(number), "host": platform.node()}
        receipt |= {"counts": {}, "fatal": "", "reason": ""}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LLMEmbedWarning)
            try:
                self._open()
            except (LLMEmbedError, ImportError) as error:
                receipt["fatal"] = str(error)
            else:
                self._fill(receipt, unit)
        receipt["warnings"] = [
            str(one.message) for one in caught if issubclass(one.category, LLMEmbedWarning)
        ]
        return {"receipt": [json.dumps(receipt)]}

    def _fill(self, receipt: dict[str, Any], unit: str) -> None:
        try:
            receipt["counts"] = dataclasses.asdict(self._do(SplitPlan.loads(unit)))
        except _FATAL as error:
            receipt["fatal"] = str(error)
        except LLMEmbedError as error:
            receipt["reason"] = str(error)
        except (RuntimeError, OSError, MemoryError, ValueError) as error:
            self._broken = True
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
            self._extractor = task.load_extractor(task.layers, expected=fingerprint)
            self._task = task

    def _do(self, unit: SplitPlan) -> Counts:
        from llmembed.extract.engines.blocks import extract_blocks

        assert self._task is not None
        writer = UnitWriter(self._task.cache, unit, self._job["lease"])
        plan = writer.left()
        examples = self._task.corpus.splits[plan.split]
        for block in plan.blocks:
            writer.check_texts(block, examples.part(block.start, block.stop).text_hash)
        return extract_blocks(self._task, writer, plan, self._extractor, look_back=False)


def hash_part(batch: dict[str, Any], cache: str) -> dict[str, list[str]]:
    """Hash the chunks of a part of a cache, and name the blocks that are bad."""
    (text,) = batch["part"]
    return {"part": [text], "bad": [json.dumps(Part.loads(text).bad_blocks(open_store(cache)))]}
