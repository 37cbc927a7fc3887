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


def begin(
    task: Task, plans: Sequence[SplitPlan], cluster: Cluster
) -> Callable[[Callable[[int, int], None]], Counts]:
    """Load the backbone, here or in a process for each group of devices."""
    n_rows = sum(plan.n_rows_missing for plan in plans) // (len(task.groups) or 1)
    if task.groups:
        return devices.begin(task, plans, cluster.texts, n_rows=n_rows)
    extractor = task.load_extractor(layers_to_run(plans), n_rows=n_rows)
    return partial(_extract_here, task, extractor)


def _extract_here(task: Task, extractor: Extractor, on_batch: Callable[[int, int], None]) -> Counts:
    counts, rank = Counts(), task.rank
    if rank is not None:
        task.register()
    shared = None if rank is None else f"rank-{rank.number}-of-{rank.world}"
    with task.open_writer(shared=shared) as writer:
        for plan in task.make_plans(writer):
            counts += extract_blocks(task, writer, plan, extractor, on_batch=on_batch)
            if rank is None:
                writer.finish(plan.split, plan.source)
    return counts


def finish(task: Task) -> None:
    """Write what indexes are missing."""
    with task.open_writer() as writer:
        for plan in task.make_plans(writer):
            writer.finish(plan.split, plan.source)
