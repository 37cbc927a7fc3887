"""What a method costs: wall time, CPU time, peak memory and energy, each in a process of its own.

Peak memory belongs to a process, and so does a warm cache, so every method starts in a fresh one.
Energy is read from RAPL where the kernel lets one, else it is CPU seconds times a nominal number of
watts a busy core takes; the result names which. Neither sees what another process draws.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llmembed.common.process import peak_memory_bytes

RAPL = Path("/sys/class/powercap")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a call cost."""

    wall_s: float
    """Seconds on the clock; other work on the machine lengthens them."""
    cpu_s: float
    """CPU seconds, threads included."""
    peak_memory_bytes: int
    """Most memory the process ever held, Python and libraries included; 0 where it is unknown."""
    joules: float
    """Energy."""
    energy_method: str
    """How the energy was found."""


def measured(call: Callable[[], _T], watts_per_core: float) -> tuple[_T, Cost]:
    """Call a function that can be pickled in a fresh process; give its result and its cost."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, call, watts_per_core).result()


def _measure(call: Callable[[], _T], watts_per_core: float) -> tuple[_T, Cost]:
    before, wall, cpu = rapl_joules(), time.perf_counter(), time.process_time()
    result = call()
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    after = rapl_joules()
    if before is not None and after is not None and after >= before:
        joules, method = after - before, "RAPL, whole package"
    else:
        joules, method = cpu_s * watts_per_core, f"CPU seconds x {watts_per_core:g} W a core"
    return result, Cost(
        wall_s=wall_s,
        cpu_s=cpu_s,
        peak_memory_bytes=peak_memory_bytes() or 0,
        joules=joules,
        energy_method=method,
    )


def rapl_joules(folder: Path = RAPL) -> float | None:
    """Read the energy counters of all packages; None where there are none to be read."""
    try:
        counters = sorted(folder.glob("intel-rapl:[0-9]/energy_uj"))
        return sum(int(path.read_text()) for path in counters) / 1e6 if counters else None
    except OSError:
        return None
