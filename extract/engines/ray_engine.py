"""Extraction on Ray: units of blocks go out, receipts come back, workers write the cache.

Ray Data hands units to a pool of actors, and again to others when an actor or its node is lost. So
the engine does a unit at least once; the store counts each block once, since its commit record is
created only if absent. No feature passes through Ray. A row without a feature comes back in the
receipt, and is named while all others are done. A unit that failed, or has no receipt since its
worker was lost, is handed out again, in a round after the others; one that no worker can do is
named at last.
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
from llmembed.extract.engines.outcome import HOPELESS, Counts
from llmembed.extract.engines.ray_worker import Worker, hash_part
from llmembed.extract.engines.task import Cluster, Task, layers_to_run

_IN_FLIGHT = 2
"""Units at a worker, the one it works on included, so that it never waits for the driver. In the
rounds after the first it is one: a deadly unit then takes no other with it."""
_UNITS_A_WORKER = 32
"""At least so many units for each worker where there are blocks enough: the last of them, when
other workers have nothing left, is then 3 % of its work."""
_MOST_BLOCKS = 16
"""Blocks of a unit at most. Within a unit the next block is tokenised and the last one written
beside the device."""
_MANY_CHUNKS = 4096
"""Chunks that workers hash, at the end. The command itself hashes fewer: of 8 MiB, 32 GB."""
_IDLE_ROUNDS = 2
"""Rounds in which no unit was done, after which those that are left are given up."""
_MOST_NAMED = 20
"""Units given up that are named; all of them are counted."""
_LOST = "they ended their worker each time; Ray's logs say how."
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
            job = _job(task, layers, cluster, writer.lease)
            start_round = functools.partial(receipts, cluster.workers, n_gpus, job)
            counts = _collect(units, start_round, on_unit)
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
    return min(_MOST_BLOCKS, max(1, n_blocks // (_UNITS_A_WORKER * n_workers)))


def _collect(
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
            _warn_once(receipt["warnings"], warned)
            if receipt["reason"]:
                reasons[number] = receipt["reason"]
                n_failed += 1
                if n_failed == HOPELESS and len(pending) == n_before:
                    break
                continue
            del pending[number]
            done = Counts(**receipt["counts"] | {"left": tuple(receipt["counts"]["left"])})
            counts += done
            counts.refuse_hopeless()
            on_unit(done.n_rows_computed, done.n_tokens)
        n_idle = n_idle + 1 if len(pending) == n_before else 0
        in_flight = 1
        pending = dict(reversed(pending.items()))  # who waited behind a deadly unit goes first
    left = [_rows(unit, reasons.get(number, _LOST)) for number, unit in pending.items()]
    _warn_once(left[:_MOST_NAMED], warned)
    return counts + Counts(left=tuple(left))


def _warn_once(messages: Sequence[str], warned: set[str]) -> None:
    for message in messages:
        if message not in warned:
            warned.add(message)
            warnings.warn(message, LLMEmbedWarning, stacklevel=2)


def _rows(unit: SplitPlan, reason: str) -> str:
    blocks = unit.blocks
    return f"rows {blocks[0].start}-{blocks[-1].stop} of split {unit.split!r}: {reason}"


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


def _job(task: Task, layers: Sequence[int], cluster: Cluster, lease: str) -> str:
    """Say what every worker must know, in absolute paths: it stands in another folder."""
    texts = dataclasses.replace(cluster.texts, dataset=absolute(cluster.texts.dataset))
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
        }
    )


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
