"""Run one case of a suite: fit it with each seed, see which rows it has right, and time it.

Seconds differ from machine to machine and from hour to hour on a shared one, so a fit is told in
yardsticks measured beside it: fixed work of the same kinds (products and a Cholesky factor of a
Gram matrix, then small gradient steps, which are all overhead) on one thread, in CPU seconds, so
that waiting for a core doesn't count. Caches and memory that others use up still do, in part in
both.

What a suite came to when its figures were last accepted is one JSON file, kept in git. It holds
which rows each case had right, not only how many, so that a later run is compared row by row.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import platform
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from regression.compare import Ints
from regression.suites import CachePlan, FitPlan

from llmembed.common.errors import DataError, LLMEmbedWarning
from llmembed.train import FitConfig, Run, fit

BASELINES = Path(__file__).parent / "baselines"
PACKAGES = ("torch", "lightning", "numpy", "llmembed-cache")
N_ROWS, WIDTH, N_CLASSES, N_STEPS = 1024, 768, 8, 150


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a case came to."""

    fingerprint: str
    """Of the cache's texts, labels and sources."""
    seeds: tuple[int, ...]
    correct: Ints
    """int64 `[n]`, how many of the seeds have each evaluation row right."""
    seconds: float
    """CPU seconds of a fit, mean over the seeds: read, fit, evaluate and write."""
    yardsticks: float
    """The same in yardsticks measured beside it."""
    n_parameters: int

    @property
    def accuracy(self) -> float:
        """Share of right answers over rows and seeds."""
        return float(self.correct.mean() / len(self.seeds))


def run_case(cache: str, plan: CachePlan, fit_plan: FitPlan, **options: Any) -> Outcome:
    """Fit once a seed.

    Args:
        cache: path of the cache.
        plan: what the cache was found by.
        fit_plan: what to fit.
        options: fields of `FitConfig` in place of the suite's.
    """
    sources = tuple(source.name for source in plan.sources)
    seconds, yards, rights, n_parameters = [], [yardstick_s()], [], 0
    with tempfile.TemporaryDirectory() as folder, one_thread():
        for seed in fit_plan.seeds:
            chosen = {"source": sources, "eval_split": plan.eval_split, **fit_plan.options}
            config = FitConfig(cache=cache, baseline="none", **{**chosen, **options})
            config = dataclasses.replace(config, seed=seed, output=f"{folder}/run")
            spent, run = harness.cpu_seconds(functools.partial(fit, config))
            seconds.append(spent)
            yards.append(yardstick_s())
            rights.append(rows_right(run))
            n_parameters = run.metrics["n_parameters"]
    return Outcome(
        fingerprint=plan.fingerprint,
        seeds=fit_plan.seeds,
        correct=np.sum(rights, axis=0),
        seconds=float(np.mean(seconds)),
        yardsticks=float(np.mean(seconds) / np.median(yards)),
        n_parameters=n_parameters,
    )


def rows_right(run: Run) -> Ints:
    """Read int64 `[n]`, 1 where a run has an evaluation row right."""
    import pyarrow.parquet as pq

    table = pq.read_table(Path(run.path) / "predictions.parquet", columns=["label", "predicted"])
    label, predicted = (np.asarray(column.to_pylist()) for column in table.columns)
    right: Ints = (label == predicted).astype(np.int64)
    return right


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, in the same order everywhere, and pass over what data sets bring."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # Texts that stand in both splits and classes of one example: known of R8 and R52.
            warnings.simplefilter("ignore", LLMEmbedWarning)
            yield
    finally:
        torch.set_num_threads(n_threads)


def yardstick_s() -> float:
    """Do the fixed work once, and give its CPU seconds: 0.1 to 0.2 on a core of 2024.

    The first in a process is slower, since it imports.
    """
    with one_thread():
        return harness.cpu_seconds(_fixed_work)[0]


def _fixed_work() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_ROWS, WIDTH, generator=generator)
    y = torch.randint(0, N_CLASSES, (N_ROWS,), generator=generator)
    gram = x.T @ x + torch.eye(WIDTH)
    for _ in range(4):
        torch.linalg.cholesky(gram)
    weight = torch.zeros(WIDTH, N_CLASSES, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    for step in range(N_STEPS):
        rows = torch.arange(128) + 128 * (step % (N_ROWS // 128))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x[rows] @ weight, y[rows]).backward()
        optimizer.step()


def write_baseline(path: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Accept the figures of a run."""
    document = {
        "machine": {"processor": processor(), "python": platform.python_version()},
        "versions": {package: version(package) for package in PACKAGES},
        "cases": {name: _record(outcome) for name, outcome in outcomes.items()},
    }
    harness.write(document, path)


def read_baseline(path: Path) -> dict[str, Outcome]:
    """Read accepted figures; none where there is no file yet.

    Raises:
        DataError: the file is not a baseline.
    """
    if not path.is_file():
        return {}
    try:
        return {name: _outcome(case) for name, case in harness.read(path)["cases"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a baseline: {error!r}. Write it with --update.") from error


def processor() -> str:
    """Name this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def pack(correct: Ints) -> str:
    """Pack counts below 256, a byte each, or a bit each where they are 0 and 1.

    >>> pack(np.array([1, 0, 1])), unpack(pack(np.array([1, 0, 1])), 3).tolist()
    ('1:oA==', [1, 0, 1])
    >>> unpack(pack(np.array([2, 0, 1])), 3).tolist()
    [2, 0, 1]
    """
    is_bits = correct.max(initial=0) <= 1
    counts = correct.astype(np.uint8)
    packed = np.packbits(counts) if is_bits else counts
    return f"{1 if is_bits else 8}:{base64.b64encode(packed.tobytes()).decode()}"


def unpack(text: str, n: int) -> Ints:
    """Undo `pack`, for n rows."""
    width, _, encoded = text.partition(":")
    packed = np.frombuffer(base64.b64decode(encoded, validate=True), dtype=np.uint8)
    counts = np.unpackbits(packed, count=n) if width == "1" else packed
    if len(counts) != n:
        raise ValueError(f"{len(counts)} rows instead of {n}")
    return counts.astype(np.int64)


def _record(outcome: Outcome) -> dict[str, Any]:
    return {
        "fingerprint": outcome.fingerprint,
        "seeds": list(outcome.seeds),
        "n": len(outcome.correct),
        "accuracy": round(outcome.accuracy, 6),
        "correct": pack(outcome.correct),
        "seconds": round(outcome.seconds, 3),
        "yardsticks": round(outcome.yardsticks, 3),
        "n_parameters": outcome.n_parameters,
    }


def _outcome(case: Mapping[str, Any]) -> Outcome:
    return Outcome(
        fingerprint=str(case["fingerprint"]),
        seeds=tuple(case["seeds"]),
        correct=unpack(case["correct"], case["n"]),
        seconds=float(case["seconds"]),
        yardsticks=float(case["yardsticks"]),
        n_parameters=int(case["n_parameters"]),
    )
