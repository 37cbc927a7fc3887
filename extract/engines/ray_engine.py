"""Extraction on Ray: units of blocks go out, receipts come back, workers write the cache.

Ray Data hands units to a pool of actors, and again to others when an actor or its node is lost. No
feature passes through Ray.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llmembed.cache_format import SplitPlan
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import Part, finalize
from llmembed.common.cluster import absolute, joined
from llmembed.common.errors import (
    ConfigError,
    ExtractionError,
    LLMEmbedWarning,
)
from llmembed.extract.backbones.load import resolve_device
from llmembed.extract.engines.outcome import Counts
from llmembed.extract.engines.task import Cluster, Task, layers_to_run
from llmembed.extract.engines.units import MOST_BLOCKS, collect, job_of
from llmembed.extract.engines.worker import Worker, hash_part

_UNITS_A_WORKER = 32
"""At least so many units for each worker where there are blocks enough: the last of them, when
other workers have nothing left, is then 3 % of its work."""
_MANY_CHUNKS = 4096
"""Chunks that workers hash, at the end. The command itself hashes fewer: of 8 MiB, 32 GB."""
STORE_BYTES = 2**27
"""Memory of a Ray that is started here, for what passes through it: receipts are small."""
_SHARED = "ray"
"""Name of the driver's lock: a driver that is started again takes the place of the first."""


def begin(
    task: Task, plans: Sequence[SplitPlan], cluster: Cluster
) -> Callable[[Callable[[int, int], None]], Counts]:
    """Leave everything to the work."""
    return functools.partial(_extract_on_ray, task, layers_to_run(plans), cluster)


def _extract_on_ray(
    task: Task, layers: Sequence[int], cluster: Cluster, on_unit: Callable[[int, int], None]
) -> Counts:
    """Do the missing blocks of a task on Ray, then close the cache.

    Raises:
        ConfigError: Ray cannot be joined, or has not the GPUs that were asked for.
        ExtractionError: what no worker can go on with.
        MissingPackageError: Ray is not installed.
    """
    with joined(cluster.address, cluster.workers, STORE_BYTES):
        n_gpus = _gpus_per_worker(cluster)
        task.register()
        task = dataclasses.replace(task, overwrite=False)
        with task.open_writer(shared=_SHARED) as writer:
            units = [
                unit for plan in task.make_plans(writer) for unit in cut(plan, cluster.workers)
            ]
            n_rows = sum(unit.n_rows_missing for unit in units) // cluster.workers
            job = job_of(task, layers, cluster.texts, lease=writer.lease, n_rows=n_rows)
            start_round = functools.partial(receipts, cluster.workers, n_gpus, job)
            counts = collect(units, start_round, on_unit)
        finalize(task.cache, only_new=True, check=functools.partial(_check, task.cache))
    return counts


def finish(task: Task) -> None:
    """Hash what is new, and write what indexes are missing."""
    finalize(task.cache, only_new=True)


def cut(plan: SplitPlan, n_workers: int) -> Iterator[SplitPlan]:
    """Cut a plan into units of neighbouring blocks."""
    n_blocks = blocks_a_unit(len(plan.blocks), n_workers)
    for first in range(0, len(plan.blocks), n_blocks):
        yield plan.part(plan.blocks[first : first + n_blocks])


def blocks_a_unit(n_blocks: int, n_workers: int) -> int:
    """Choose how many of so many blocks a unit has.

    >>> blocks_a_unit(100, 8), blocks_a_unit(1000, 8), blocks_a_unit(10**6, 8)
    (1, 3, 16)
    """
    return min(MOST_BLOCKS, max(1, n_blocks // (_UNITS_A_WORKER * n_workers)))


def receipts(
    n_workers: int, n_gpus: float, job: str, in_flight: int, units: Mapping[int, SplitPlan]
) -> Iterator[dict[str, Any]]:
    """Have units done, in any order; those whose worker was lost have no receipt."""
    import ray.data

    items = [{"number": number, "unit": unit.dumps()} for number, unit in units.items()]
    pool = ray.data.ActorPoolStrategy(
        min_size=1, max_size=n_workers, max_tasks_in_flight_per_actor=in_flight
    )
    for row in _mapped(
        Worker,
        items,
        n_may_fail=len(items),
        fn_constructor_args=(job,),
        compute=pool,
        num_gpus=n_gpus or None,
        max_task_retries=0,
    ):
        receipt = json.loads(row["receipt"])
        if receipt["fatal"]:
            where = f"a worker on {receipt['host']} cannot go on"
            raise ExtractionError(f"{where}: {receipt['fatal']}")
        yield receipt


def _check(cache: str, parts: Sequence[Part]) -> Iterator[tuple[Part, list[int]]]:
    """Hash parts where the CPUs of the cluster are, or here where there are few."""
    if sum(len(part.hashes) for part in parts) < _MANY_CHUNKS:
        store = open_store(cache)
        yield from ((part, part.bad_blocks(store)) for part in parts)
        return
    items = [{"part": part.dumps()} for part in parts]
    for row in _mapped(hash_part, items, n_may_fail=0, fn_args=(absolute(cache),)):
        yield Part.loads(row["part"]), json.loads(row["bad"])


def _mapped(
    function: Any, items: Sequence[Any], *, n_may_fail: int, **options: Any
) -> Iterator[dict[str, Any]]:
    """Have Ray Data call a function with each item alone, and give the answers in any order.

    Raises:
        ExtractionError: Ray cannot; it is told in one sentence.
    """
    import ray.data
    from ray.exceptions import RayError

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = n_may_fail
    context.op_resource_reservation_enabled = False  # one operator: a tenth of the driver's CPU
    data = ray.data.from_items(list(items), override_num_blocks=len(items))
    try:
        yield from data.map_batches(function, batch_size=1, num_cpus=1, **options).iter_rows()
    except RayError as error:
        raise ExtractionError(
            f"Ray gave up: {str(error).splitlines()[0]}. Committed blocks are safe: see Ray's logs "
            "for the cause, and run the same command again to go on."
        ) from error


def _gpus_per_worker(cluster: Cluster) -> float:
    """Take what was asked for, else one GPU where there are any.

    What this machine lacks is refused; a cluster may still get it, and is waited for.
    """
    import ray

    n_gpus = cluster.gpus_per_worker
    if n_gpus is None:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        n_gpus = float(resources.get("GPU", 0) > 0 and not cluster.on_cpu)
    if n_gpus and cluster.arithmetic_is_ours and resolve_device("auto").type != "cuda":
        raise ConfigError(
            "--compute-dtype auto would suit the machine of this command, which has no GPU, but "
            "the workers have. Pass --compute-dtype bfloat16 or float32, or --gpus-per-worker 0."
        )
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    most = max(node["Resources"].get("GPU", 0) for node in nodes if node["Alive"])
    if n_gpus > most:
        lack = f"--gpus-per-worker is {n_gpus:g}, but no machine of Ray has more than {most:g} GPUs"
        if cluster.address is None:
            raise ConfigError(f"{lack}. Pass fewer, or the --address of a cluster that has them.")
        warnings.warn(f"{lack}: waiting for one.", LLMEmbedWarning, stacklevel=2)
    return n_gpus
