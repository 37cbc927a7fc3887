"""What Ray costs: the driver's CPU and memory, and the time a unit waits for anything but its work.

The workers are the engine's own, except that a unit takes a given time instead of computing: what
is left of the wall time is the engine's. Its cost a unit does not depend on how long units take, so
it is measured with short ones, 100 a minute, and told as a share of `UNIT_S`.

    python benchmarks ray [--n-units 101] [--seconds 1.2]

Every unit must have its receipt, once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import harness

from llmembed.cache_format import Block, SplitPlan
from llmembed.common.cluster import joined
from llmembed.extract.engines import ray_engine
from llmembed.extract.engines.outcome import Counts
from llmembed.extract.engines.worker import Worker

UNIT_S = 10.0
"""A unit on a GPU takes at least so long."""


class Waiting(Worker):
    """A worker whose units take a given time and do nothing."""

    def _open(self) -> None:
        """Load nothing."""

    def _do(self, unit: SplitPlan) -> Counts:
        del unit
        time.sleep(self._job["seconds"])
        return Counts(n_rows_computed=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure units that take a while, and many that take no time."""
    parser = harness.command_line(__doc__, "speed/ray.json")
    parser.add_argument("--n-units", type=int, default=101)
    parser.add_argument("--n-many", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=1.2)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    ray_engine.Worker = Waiting  # type: ignore[attr-defined]
    started = time.perf_counter()
    with joined(None, options.workers, ray_engine.STORE_BYTES):
        start_s = time.perf_counter() - started
        paced = measure(options.n_units, options.seconds, options.workers)
        many = measure(options.n_many, 0.0, options.workers)
    found = shares(paced)
    for key, value in found.items():
        print(f"{key} {value:.4f}")
    result = {"ray_start_s": start_s, **harness.load(), **found, "paced": paced, "many": many}
    harness.finish(result, options.output)


def measure(n_units: int, seconds: float, n_workers: int) -> dict[str, float]:
    """Have units done, and time the driver from the first receipt to the last."""
    job = json.dumps({"seconds": seconds})
    units = {number: toy_unit(number) for number in range(n_units)}
    began, memory = time.perf_counter(), harness.memory()["VmHWM"]
    marks: list[tuple[float, float]] = []
    numbers = []
    for receipt in ray_engine.receipts(n_workers, 0.0, job, 2, units):
        numbers.append(receipt["number"])
        marks.append((time.perf_counter(), time.process_time()))
    if sorted(numbers) != list(range(n_units)):
        raise AssertionError("some units have no receipt, or two")
    (first, first_cpu), (last, last_cpu) = marks[0], marks[-1]
    return {
        "n_units": n_units,
        "n_workers": n_workers,
        "unit_s": seconds,
        "until_first_receipt_s": first - began,
        "wall_s": last - first,
        "driver_cpu_s": last_cpu - first_cpu,
        "driver_bytes_a_unit": (harness.memory()["VmHWM"] - memory) / n_units,
    }


def shares(paced: dict[str, float]) -> dict[str, float]:
    """Tell the engine's cost as the shares that are promised.

    >>> paced = {"n_units": 21, "n_workers": 2, "unit_s": 1.0, "wall_s": 10.5, "driver_cpu_s": 0.21}
    >>> [round(value, 4) for value in shares(paced).values()]
    [0.05, 0.005, 114.2857, 0.02]
    """
    n_done = paced["n_units"] - 1
    engine_s = paced["wall_s"] * paced["n_workers"] / n_done - paced["unit_s"]
    return {
        "engine_s_a_unit": engine_s,
        "engine_share": engine_s / UNIT_S,
        "units_a_minute": n_done / paced["wall_s"] * 60,
        "driver_cpu_share": paced["driver_cpu_s"] / paced["wall_s"],
    }


def toy_unit(number: int) -> SplitPlan:
    """Make a unit of 16 blocks with four layers, as large as any."""
    keys = tuple(("mean", layer) for layer in (8, 16, 24, 32))
    first = number * 16
    blocks = tuple(
        Block(
            start=k * 1024,
            stop=(k + 1) * 1024,
            compute_from=k * 1024,
            missing=keys,
            texts="0" * 32,
            old={},
        )
        for k in range(first, first + 16)
    )
    plan: dict[str, Any] = {"split": "train", "source": "s", "n_rows": 10**9, "block_rows": 1024}
    plan |= {"hidden_size": 4096, "dtype": "float16", "arrays": keys, "blocks": blocks}
    return SplitPlan(**plan)
