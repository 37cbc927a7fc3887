"""Extraction on this machine: in this process, alone or as one rank of several, or on devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llmembed.cache_format import SplitPlan
from llmembed.extract.engines import devices
from llmembed.extract.engines.blocks import extract_blocks
from llmembed.extract.engines.outcome import Counts
from llmembed.extract.engines.task import Cluster, Task, layers_to_run
from llmembed.extract.features.extractor import Extractor

_COMPILE_FROM_ROWS = 100_000
"""A run of so many texts on one GPU outlasts the minute that compiling takes many times."""


def begin(
    task: Task, plans: Sequence[SplitPlan], cluster: Cluster
) -> Callable[[Callable[[int, int], None]], Counts]:
    """Load the backbone, here or in a process for each group of devices."""
    n_rows = sum(plan.n_rows_missing for plan in plans) // (len(task.groups) or 1)
    worth_compiling = n_rows >= _COMPILE_FROM_ROWS
    if task.groups:
        return devices.begin(task, plans, cluster.texts, compiled=worth_compiling)
    extractor = task.load_extractor(layers_to_run(plans), compiled=worth_compiling)
    return partial(_extract_here, task, extractor)


def _extract_here(task: Task, extractor: Extractor, on_batch: Callable[[int, int], None]) -> Counts:
    counts, rank = Counts(), task.rank
    if rank is not None:
        task.register()
    shared = None if rank is None else f"rank-{rank.number}-of-{rank.world}"
    with task.open_writer(shared=shared) as writer:
        for plan in task.make_plans(writer):
            counts += extract_blocks(
                task, writer, plan, extractor, on_batch=on_batch, look_back=rank is None
            )
            if rank is None:
                writer.finish(plan.split, plan.source)
    return counts


def finish(task: Task) -> None:
    """Write what indexes are missing."""
    with task.open_writer() as writer:
        for plan in task.make_plans(writer):
            writer.finish(plan.split, plan.source)
