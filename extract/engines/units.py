"""Hand out units of blocks to workers, Ray's or this machine's, and collect their receipts.

A unit is done at least once; the store counts each block once, since its commit record is created
only if absent. A row without a feature comes back in the receipt, and is named while all others are
done. A unit that failed, or has no receipt since its worker was lost, is handed out again, in a
round after the others; one that no worker can do is named at last.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llmembed.cache_format import SplitPlan
from llmembed.common.cluster import absolute
from llmembed.common.errors import warn
from llmembed.extract.engines.outcome import HOPELESS, Counts
from llmembed.extract.engines.task import Task
from llmembed.extract.texts import DatasetOptions

MOST_BLOCKS = 16
"""Blocks of a unit at most. Within a unit the next block is tokenised and the last one written
beside the device."""
_IN_FLIGHT = 2
"""Units at a worker, the one it works on included, so that it never waits for the driver. In the
rounds after the first it is one: a deadly unit then takes no other with it."""
_IDLE_ROUNDS = 2
"""Rounds in which no unit was done, after which those that are left are given up."""
_MOST_NAMED = 20
"""Units given up that are named; all of them are counted."""
_LOST = "they ended their worker each time; what it last said stands above, or in Ray's logs."


def collect(
    units: Sequence[SplitPlan],
    start_round: Callable[[int, Mapping[int, SplitPlan]], Iterator[dict[str, Any]]],
    on_unit: Callable[[int, int], None],
) -> Counts:
    """Have units done until each is done, or none of those left can be.

    A lost worker takes the units with it that it had, so there are rounds: Ray's own retries count
    how often a machine that is gone does not answer, and cannot tell that from a deadly unit.
    """
    counts, warned, reasons = Counts(), set[str](), dict[int, str]()
    pending, n_idle, in_flight = dict(enumerate(units)), 0, _IN_FLIGHT
    while pending and n_idle < _IDLE_ROUNDS:
        n_before, n_failed = len(pending), 0
        for receipt in start_round(in_flight, pending.copy()):
            number = receipt["number"]
            warn_once(receipt["warnings"], warned)
            if receipt["reason"]:
                reasons[number] = receipt["reason"]
                n_failed += 1
                if n_failed == HOPELESS and len(pending) == n_before:
                    break
                continue
            del pending[number]
            done = Counts.from_record(receipt["counts"])
            counts += done
            counts.refuse_hopeless()
            on_unit(done.n_rows_computed, done.n_tokens)
        n_idle = n_idle + 1 if len(pending) == n_before else 0
        in_flight = 1
        pending = dict(reversed(pending.items()))  # who waited behind a deadly unit goes first
    left = [_rows(unit, reasons.get(number, _LOST)) for number, unit in pending.items()]
    warn_once(left[:_MOST_NAMED], warned)
    return counts + Counts(left=tuple(left))


def job_of(
    task: Task,
    layers: Sequence[int],
    texts: DatasetOptions,
    *,
    lease: str = "",
    n_rows: int,
) -> str:
    """Say what every worker must know, in absolute paths: it may stand in another folder.

    Each is to compute `n_rows`, about.
    """
    texts = dataclasses.replace(texts, dataset=absolute(texts.dataset))
    recipe = {**task.source.recipe, "model": absolute(task.recipe.model)}
    return json.dumps(
        {
            "texts": dataclasses.asdict(texts),
            "source": dataclasses.asdict(dataclasses.replace(task.source, recipe=recipe)),
            "layers": list(layers),
            "poolings": task.poolings,
            "cache": absolute(task.cache),
            "placement": dataclasses.asdict(task.placement),
            "lease": lease,
            "n_rows": n_rows,
        }
    )


def warn_once(messages: Sequence[str], warned: set[str]) -> None:
    """Warn of what was not warned of before, and keep it in `warned`."""
    for message in messages:
        if message not in warned:
            warned.add(message)
            warn(message)


def _rows(unit: SplitPlan, reason: str) -> str:
    blocks = unit.blocks
    return f"rows {blocks[0].start}-{blocks[-1].stop} of split {unit.split!r}: {reason}"
