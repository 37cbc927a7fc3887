"""Run one case of a suite: fit it with each seed, see which rows it has right, and time it."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from compare import Ints
from suites import CachePlan, FitPlan
from yardstick import cpu_seconds, yardstick_s

from llmembed.common.errors import LLMEmbedWarning
from llmembed.train import FitConfig, Run, fit


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a case came to."""

    fingerprint: str
    """Of the cache's texts, labels and sources."""
    seeds: tuple[int, ...]
    """Seeds of its fits."""
    correct: Ints
    """int64 `[n]`, how many of the seeds have each evaluation row right."""
    seconds: float
    """CPU seconds of a fit, mean over the seeds: read, fit, evaluate and write."""
    yardsticks: float
    """The same in yardsticks measured beside it."""
    n_parameters: int
    """Weights of the classifier."""

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
            config = dataclasses.replace(
                FitConfig(cache=cache, **{**chosen, **options}), seed=seed, output=f"{folder}/run"
            )
            spent, run = cpu_seconds(functools.partial(fit, config))
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


def warm_up() -> None:
    """Import what fits import, and let the first, slower yardstick pass."""
    yardstick_s()


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
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # Texts that stand in both splits and classes of one example: known of R8 and R52.
            warnings.simplefilter("ignore", LLMEmbedWarning)
            yield
    finally:
        torch.set_num_threads(n_threads)
