"""The verb: read a cache, train one classifier a seed, measure, write the run.

The evaluation rows are touched once, after the last choice. With several seeds the folder holds
the classifier with the lowest validation loss, and `over_seeds` tells how far they lie apart.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from torch import Tensor

from llmembed.common.process import peak_memory_bytes
from llmembed.train.config import FitConfig
from llmembed.train.fusions.classifier import Classifier, Trained
from llmembed.train.fusions.fusion import FUSIONS
from llmembed.train.gradient.workspace import LOGS, check_logger, open_workspace
from llmembed.train.inputs.data import FitData, load_data
from llmembed.train.linear.crossfit import solve_base, train_solved, train_stack
from llmembed.train.linear.ray_moments import joined_if_asked
from llmembed.train.measures.metrics import Floats, summarise
from llmembed.train.runs.export import check_can_export, onnx_of
from llmembed.train.runs.run import (
    ONNX_FILE,
    Predictions,
    Run,
    check_replaceable,
    record_config,
    write_run,
)
from llmembed.train.sweeping import Chosen, choose_fusion

_SPREAD_FIGURES = ("accuracy", "macro_f1", "nll")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training came to, before any evaluation row is looked at."""

    data: FitData
    """What was trained on: of the features that were read, those of the chosen fusion."""
    trained: Sequence[Trained]
    """A classifier a seed."""
    chosen: Mapping[str, Any] | None
    """What `--fusion auto` chose; None where it was not asked to."""

    @property
    def kept(self) -> int:
        """Position of the classifier with the lowest validation loss."""
        return min(range(len(self.trained)), key=lambda k: self.trained[k].val_loss or 0.0)

    @property
    def best(self) -> Trained:
        """The classifier with the lowest validation loss."""
        return self.trained[self.kept]


def fit(config: FitConfig, *, show_progress: bool = False) -> Run:
    """Fit a classifier on a cache and write its run.

    Args:
        config: all options.
        show_progress: show on stderr how far it is.

    Returns:
        The run that was written, ready to predict.

    Raises:
        ConfigError: an option does not fit the cache, or the output folder is a run of another
            fusion and `overwrite` is not given.
        DataError: labels or features cannot be trained on.
        CacheError: the cache is missing, malformed or incomplete.
        RunFormatError: the output folder is not a run, so it is not replaced.
        RunStorageError: the disk failed or refused; an earlier run is kept.
        MissingPackageError: the engine is Ray, which is not installed.
        EngineError: Ray gave up.
    """
    started = time.perf_counter()
    check_replaceable(config)
    if config.export is not None:
        check_can_export()
    check_logger(config.logger)
    with joined_if_asked(config):
        data = load_data(config)
        read_s = time.perf_counter() - started
        with open_workspace(config.run_path) as workspace:
            outcome = train(config, data, workspace=workspace, show_progress=show_progress)
            return _finish(config, outcome, workspace, started, read_s)


def _finish(
    config: FitConfig, outcome: Outcome, workspace: Path, started: float, read_s: float
) -> Run:
    """Evaluate what was trained, and write the run."""
    data, trained = outcome.data, outcome.trained
    eval_started = time.perf_counter()
    log_probas = [_log_proba(one.classifier.logits_all(data.x_eval)) for one in trained]
    metrics = _metrics(outcome, log_probas)
    now = time.perf_counter()
    metrics["seconds"] = {
        "read": read_s,
        "fit": eval_started - started - read_s,
        "eval": now - eval_started,
        "total": now - started,
    }
    predictions = Predictions(
        rows=data.shares.eval, labels=data.y_eval.numpy(), log_proba=log_probas[outcome.kept]
    )
    record = record_config(config, data, outcome.best)
    run = Run(
        path=config.run_path, config=record, metrics=metrics, classifier=outcome.best.classifier
    )
    files = {} if config.export is None else {ONNX_FILE: onnx_of(run.classifier, record)}
    check_replaceable(config)  # once more: the place may have changed meanwhile
    write_run(run, predictions, files, logs=workspace / LOGS)
    return run


def train(
    config: FitConfig,
    data: FitData,
    *,
    workspace: Path | None = None,
    show_progress: bool = False,
) -> Outcome:
    """Choose the fusion where that is asked for, and train a classifier a seed.

    Args:
        config: all options.
        data: what to train on.
        workspace: folder of checkpoints and logs of a fit by gradient; None writes neither.
        show_progress: show on stderr how far it is.
    """
    chosen = choose_fusion(config, data)
    trained = _train(chosen, workspace=workspace, show_progress=show_progress)
    return Outcome(data=chosen.data, trained=trained, chosen=chosen.record)


def _train(chosen: Chosen, **options: Any) -> list[Trained]:
    """Solve where that is asked for, which needs no Lightning; what seeds share is solved once."""
    config, data = chosen.config, chosen.data
    seeds = range(config.seed, config.seed + config.n_seeds)
    if chosen.members:
        return [train_stack(config, data, chosen.members, seed) for seed in seeds]
    if config.is_solved:
        return [train_solved(config, data, seed) for seed in seeds]
    completes_a_base = config.preset == "none" and FUSIONS[config.fusion].completes_a_base
    if completes_a_base:
        # Lightning takes seconds to import, and a core that would be idle half of the time.
        Thread(target=import_module, args=["llmembed.train.gradient.fit"], daemon=True).start()
        base = solve_base(config, data)
    from llmembed.train.gradient.fit import train_by_gradient

    if completes_a_base:
        beside = base.beside(data, config)
        return [base.complete(one) for one in train_by_gradient(config, beside, seeds, **options)]
    return train_by_gradient(config, data, seeds, **options)


def _log_proba(logits: Tensor) -> Floats:
    log_proba: Floats = logits.log_softmax(dim=1).numpy()
    return log_proba


def _metrics(outcome: Outcome, log_probas: Sequence[Floats]) -> dict[str, Any]:
    data, trained, kept = outcome.data, outcome.trained, outcome.kept
    labels = data.y_eval.numpy()
    summaries = [summarise(log_proba, labels, data.labels) for log_proba in log_probas]
    classifier = trained[kept].classifier
    return {
        "eval_split": data.shares.record()["eval"]["split"],
        **summaries[kept],
        **_before_calibration(classifier, data),
        "n_parameters": sum(weight.numel() for weight in classifier.parameters()),
        "splits": data.shares.record(),
        "peak_memory_bytes": peak_memory_bytes(),
        "per_seed": [
            {
                "seed": one.seed,
                "kept": k == kept,
                **one.details,
                "val_loss": one.val_loss,
                **{name: summary[name] for name in _SPREAD_FIGURES},
            }
            for k, (one, summary) in enumerate(zip(trained, summaries, strict=True))
        ],
        "over_seeds": {
            name: _spread([summary[name] for summary in summaries]) for name in _SPREAD_FIGURES
        },
        **({} if outcome.chosen is None else {"chosen": outcome.chosen}),
    }


def _before_calibration(classifier: Classifier, data: FitData) -> dict[str, float | None]:
    """Give the temperature, and what the probabilities would be without it."""
    temperature = float(classifier.temperature)
    log_proba = _log_proba(classifier.logits_all(data.x_eval) * temperature)
    before = summarise(log_proba, data.y_eval.numpy(), data.labels)
    return {
        "temperature": temperature,
        "nll_uncalibrated": before["nll"],
        "ece_uncalibrated": before["ece"],
    }


def _spread(values: list[float | None]) -> dict[str, float | None]:
    figures = [value for value in values if value is not None]
    if not figures:  # nothing was evaluated
        return {"mean": None, "std": None}
    deviation = float(np.std(figures, ddof=1)) if len(figures) > 1 else 0.0
    return {"mean": float(np.mean(figures)), "std": deviation}
