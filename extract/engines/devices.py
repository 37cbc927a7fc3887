"""Extraction by several processes of this machine, each with a share of its devices.

Units go out and receipts come back through pipes, so the processes need nothing but the cache and
the one that started them. They load their backbones before anything is written. When that one ends,
however it does, its pipes close, and they end, too.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeAlias

import torch

from llmembed.cache_format import SplitPlan
from llmembed.common import errors
from llmembed.common.errors import ConfigError, ExtractionError
from llmembed.extract.engines.outcome import Counts
from llmembed.extract.engines.task import Task, layers_to_run
from llmembed.extract.engines.units import MOST_BLOCKS, collect, job_of, warn_once
from llmembed.extract.texts import DatasetOptions

MOST_SILENT_S = 1800.0
"""A process that computes tells of each batch; after so long without a word it stands still."""
_PROGRAM = "from llmembed.extract.engines.worker import serve; serve()"
_DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
_QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
}
"""What the one process that users see says, the others need not say again."""

OnBatch: TypeAlias = Callable[[int, int], None]
_Waiting: TypeAlias = "queue.SimpleQueue[tuple[int, str, str]]"


def device_groups(
    devices: str | None, gpus_a_process: float | None, device: str
) -> tuple[str, ...]:
    """Share devices of this machine among processes.

    Args:
        devices: how many, or `all`; None is as many as one process has.
        gpus_a_process: how many GPUs lie under one model; None is one device.
        device: the kind, as `--device` names it.

    Returns:
        CUDA_VISIBLE_DEVICES of each process; nothing where this process can do without others.

    Raises:
        ConfigError: this machine has not so many.
    """
    if devices is None and gpus_a_process is None:
        return ()
    size = int(gpus_a_process or 1)
    if device not in {"auto", "cuda", "cpu"}:
        raise ConfigError(
            f"--device is {device}, but --devices and --gpus-per-worker choose devices themselves. "
            "Pass --device auto, cuda or cpu."
        )
    if device == "cpu" and gpus_a_process is None:
        n_processes = 1 if devices in {None, "all"} else int(devices or 1)
        return ("",) * n_processes if n_processes > 1 else ()
    gpus = [] if device == "cpu" else _gpus()
    wanted = (len(gpus) or 1) if devices == "all" else int(devices or size)
    if wanted == size == 1 and gpus_a_process is None:
        return ()
    if max(wanted, size) > len(gpus):
        name, n = ("--devices", wanted) if wanted > size else ("--gpus-per-worker", size)
        raise ConfigError(
            f"{name} is {n}, but --device {device} has {len(gpus)} GPUs on this machine. Pass no "
            "more than it has; --device cpu shares the cores among --devices processes."
        )
    if wanted % size:
        raise ConfigError(
            f"{wanted} devices cannot be shared out by --gpus-per-worker {size}. Pass a multiple "
            "of it to --devices."
        )
    groups = [",".join(gpus[first : first + size]) for first in range(0, wanted, size)]
    return tuple(groups) if len(groups) > 1 or size > 1 else ()


def _gpus() -> list[str]:
    """Name the GPUs that this process sees, as CUDA_VISIBLE_DEVICES does."""
    n_gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:n_gpus] if visible else [str(index) for index in range(n_gpus)]


def begin(
    task: Task, plans: Sequence[SplitPlan], texts: DatasetOptions, *, n_rows: int
) -> Callable[[OnBatch], Counts]:
    """Start the processes, and wait until all have their backbones.

    Each is to compute `n_rows`, about.
    """
    workers = Workers(task.groups, job_of(task, layers_to_run(plans), texts, n_rows=n_rows))
    return functools.partial(_extract, task, workers)


def _extract(task: Task, workers: Workers, on_batch: OnBatch) -> Counts:
    with workers, task.open_writer() as writer:
        plans = task.make_plans(writer)
        writer.register()
        units = [unit for plan in plans for unit in _cut(plan, len(task.groups))]
        units.sort(key=lambda unit: -len(unit.blocks))
        n_rows = sum(plan.n_rows_missing for plan in plans)
        ask = functools.partial(workers.receipts, writer.lease, _at_most(n_rows, on_batch))
        try:
            counts = collect(units, ask, lambda *_: None)
        finally:
            workers.stop()  # before the lock goes
        for plan in plans:
            writer.finish(plan.split, plan.source)
    return counts


def _cut(plan: SplitPlan, n_workers: int) -> Iterator[SplitPlan]:
    """Cut a plan into units of neighbouring blocks, large ones first: few seams, short waits."""
    first = 0
    while n_left := len(plan.blocks) - first:
        n_blocks = min(MOST_BLOCKS, max(1, n_left // (2 * n_workers)))
        yield plan.part(plan.blocks[first : first + n_blocks])
        first += n_blocks


def _at_most(n_rows: int, on_batch: OnBatch) -> OnBatch:
    """Count no more rows than there are: those of a block whose process was lost come again."""
    left = n_rows

    def count(rows: int, tokens: int) -> None:
        nonlocal left
        on_batch(min(rows, left), tokens)
        left -= min(rows, left)

    return count


class Workers:
    """Processes of this machine that do units, each on devices of its own.

    Args:
        groups: CUDA_VISIBLE_DEVICES of each.
        job: what they must know.

    Raises:
        ExtractionError: none of them could begin.
        LLMEmbedError: what one of them met, as every other would.
    """

    def __init__(self, groups: Sequence[str], job: str) -> None:
        self._groups, self._job = groups, job
        self._warned: set[str] = set()
        self._processes: list[_Process] = []
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all, at once: what they have committed is safe."""
        self._kill()
        while self._processes:
            self._processes.pop().close()

    def receipts(
        self, lease: str, on_batch: OnBatch, _in_flight: int, units: Mapping[int, SplitPlan]
    ) -> Iterator[dict[str, Any]]:
        """Have units done by the processes that are left, or by new ones if none is."""
        if not self._processes:
            self._start()
        waiting: _Waiting = queue.SimpleQueue()
        for number, unit in units.items():
            waiting.put((number, unit.dumps(), lease))
        answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        with ThreadPoolExecutor(len(self._processes)) as threads:
            try:
                serving = [
                    threads.submit(process.serve, waiting, answers.put)
                    for process in self._processes
                ]
                n_serving = len(serving)
                while n_serving:
                    answer = answers.get()
                    if answer is None:
                        n_serving -= 1
                    elif "rows" in answer:
                        on_batch(answer["rows"], answer["tokens"])
                    else:
                        _refuse_known(answer)
                        yield answer
            except BaseException:
                self._kill()  # so that the threads end
                raise
        for one in serving:
            one.result()
        self._part_from_lost()

    def _start(self) -> None:
        try:
            for group in self._groups:
                self._processes.append(_Process(group, len(self._groups)))
            for process in self._processes:
                process.ask(self._job)
            for process in self._processes:
                answer = process.answer()
                if answer is not None:
                    warn_once(answer["warnings"], self._warned)
                    _refuse_known(answer)
            ends = self._part_from_lost()
            if not self._processes:
                raise ExtractionError(f"{ends[0]} None could load the backbone.")
        except BaseException:
            self.stop()
            raise

    def _part_from_lost(self) -> list[str]:
        """Forget the processes that have ended, and tell of them."""
        lost = [process for process in self._processes if process.end is not None]
        self._processes = [process for process in self._processes if process.end is None]
        ends = []
        for process in lost:
            process.close()
            on = f" on GPU {process.group}" if process.group else ""
            ends.append(f"a process{on} ended, {process.end}.")
        if self._processes:
            warn_once([f"{end} The others go on without it." for end in ends], set())
        return ends

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


class _Process:
    """A process of this machine that is a worker."""

    def __init__(self, group: str, n_processes: int) -> None:
        self.group = group
        n_threads = max(1, torch.get_num_threads() // n_processes)
        n_cpus = max(1, (os.cpu_count() or 1) // n_processes)
        environment = os.environ | _QUIET
        environment |= {"CUDA_VISIBLE_DEVICES": group, "OMP_NUM_THREADS": str(n_threads)}
        environment.setdefault("RAYON_NUM_THREADS", str(n_cpus))
        self._popen = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-c", _DEAF + _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout
        self._stood_still = False

    @property
    def end(self) -> str | None:
        """How it ended; None while it lives."""
        code = self._popen.poll()
        if code is None or code >= 0:
            return None if code is None else f"with exit code {code}"
        if self._stood_still:
            return f"killed since it stood still for {MOST_SILENT_S / 60:g} minutes"
        return f"killed by {signal.Signals(-code).name}"

    def ask(self, line: str) -> None:
        """Send a line; a process that has ended has no answer."""
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._stdin, flush=True)

    def answer(self) -> dict[str, Any] | None:
        """Wait for an answer; None is its end."""
        line = self._stdout.readline()
        if line.endswith("\n"):
            found: dict[str, Any] = json.loads(line)
            return found
        self._popen.wait()
        return None

    def _answer_in_time(self) -> dict[str, Any] | None:
        """Wait for an answer, which comes with every batch; what stands still is killed."""
        watch = threading.Timer(MOST_SILENT_S, self._end_standstill)
        watch.daemon = True
        watch.start()
        try:
            return self.answer()
        finally:
            watch.cancel()

    def _end_standstill(self) -> None:
        self._stood_still = True
        self.kill()

    def serve(self, waiting: _Waiting, say: Callable[[dict[str, Any] | None], None]) -> None:
        """Have units done until none waits, or the process has ended; say None at last."""
        try:
            while self.end is None:
                unit = waiting.get_nowait()
                self.ask(json.dumps(unit))
                while (answer := self._answer_in_time()) is not None:
                    say(answer)
                    if "number" in answer:
                        break
                else:
                    reason = f"a process that did them ended, {self.end}."
                    say({"number": unit[0], "reason": reason, "kind": "", "warnings": []})
                if answer is not None and answer["reason"]:
                    self._popen.wait()  # it ends for that
        except queue.Empty:
            return
        finally:
            say(None)

    def kill(self) -> None:
        """End it."""
        self._popen.kill()

    def close(self) -> None:
        """Wait for its end, and let its pipes go."""
        with contextlib.suppress(BrokenPipeError), self._popen:
            pass


def _refuse_known(receipt: Mapping[str, Any]) -> None:
    """Raise the error of a worker that every other would meet as well, as if it were this one's."""
    kind = receipt["kind"]
    if kind:
        message = receipt["fatal"] or receipt["reason"]
        raise getattr(errors, kind, ExtractionError)(message)
