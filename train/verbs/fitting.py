"""The verb: read a cache, train one classifier a seed, measure, write the run.

The evaluation rows are touched once, after the last choice.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from llmembed.cache_format import open_cache
from llmembed.common.errors import ConfigError
from llmembed.common.process import memory_told, peak_memory_bytes
from llmembed.train.config import FitConfig, Plan
from llmembed.train.fusions import FUSIONS
from llmembed.train.fusions.classifier import Classifier, Trained
from llmembed.train.fusions.heads import LinearHead
from llmembed.train.fusions.mixing import Concat, ScalarMix
from llmembed.train.fusions.tricks import import_meanwhile
from llmembed.train.gradient import LOGS, check_logger, open_workspace
from llmembed.train.inputs import FitData, load_data
from llmembed.train.inputs.near import find_repeated
from llmembed.train.inputs.sets import check_method
from llmembed.train.linear.devices import device_of
from llmembed.train.linear.domain import Domain
from llmembed.train.linear.ray_moments import joined_if_asked
from llmembed.train.linear.solved import solve_base, train_solved, train_stack
from llmembed.train.measures import summarise, summarise_sets
from llmembed.train.measures.doubt import report_abstaining
from llmembed.train.reports.baselines import measure_baselines, size_of_features
from llmembed.train.reports.run_page import RunParts, find_sweep, report_page
from llmembed.train.reports.texts import TextsNotFoundError, find_texts
from llmembed.train.runs.export import check_can_export, onnx_of
from llmembed.train.runs.folder import check_replaceable, write_run
from llmembed.train.runs.predictions import Predictions
from llmembed.train.runs.record import ONNX_FILE, record_config
from llmembed.train.runs.run import Run
from llmembed.train.verbs.sweeping import choose_fusion

REPORT_FILE = "report.html"
_SPREAD_FIGURES = ("accuracy", "macro_f1", "nll")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training came to, before any evaluation row is looked at."""

    data: FitData  # with the features of the chosen fusion alone
    trained: Sequence[Trained]  # a classifier a seed
    chosen: Mapping[str, Any] | None  # what `--fusion auto` chose; None where it was not asked to

    @property
    def kept(self) -> int:
        """Position of the classifier with the lowest validation loss."""
        return min(range(len(self.trained)), key=lambda k: self.trained[k].val_loss or 0.0)

    @property
    def best(self) -> Trained:
        """The classifier with the lowest validation loss."""
        return self.trained[self.kept]


def fit(config: FitConfig, *, show_progress: bool = False) -> Run:
    """Fit a classifier on a cache and write its run; `show_progress` tells stderr how far it is.

    Raises:
        ConfigError: an option does not fit the cache or this machine, memory runs out, or the
            output folder is a run of another fusion and `overwrite` is not given.
        DataError: labels or features cannot be trained on.
        CacheError: the cache is missing, malformed or incomplete.
        RunFormatError: the output folder is not a run, so it is not replaced.
        RunLockedError: another fit is making a run there.
        RunStorageError: the disk failed or refused; an earlier run is kept.
        MissingPackageError: the engine is Ray, which is not installed.
        EngineError: Ray gave up.
    """
    if config.compare:
        raise ConfigError(
            "compare=True fits several runs, and fit gives one. Call compare_fusions(config)."
        )
    started = time.perf_counter()
    check_fit(config)
    plan = config.plan()
    with joined_if_asked(plan.method):
        data = load_data(plan.reading)
        read_s = time.perf_counter() - started
        return fit_on(data, config, read_s=read_s, show_progress=show_progress)


def check_fit(config: FitConfig) -> None:
    """Refuse what cannot be fitted here or written there, before anything is read.

    Raises:
        As `fit` does, of what needs no cache.
    """
    check_replaceable(config)
    if config.export is not None:
        check_can_export()
    check_logger(config.logger)
    device_of(config.accelerator, config.devices)


def fit_on(data: FitData, config: FitConfig, *, read_s: float, show_progress: bool = False) -> Run:
    """Fit on data that was read, in `read_s` seconds, as `config` asks for, and write the run."""
    started = time.perf_counter() - read_s
    texts = _texts_to_store(config, data)
    import_meanwhile("matplotlib.backends.backend_svg")  # 0.4 s, for the page
    with open_workspace(config.run_path) as workspace:
        outcome = train(config.plan(), data, workspace=workspace, show_progress=show_progress)
        return _finish(config, outcome, workspace, started, read_s, texts)


def _texts_to_store(config: FitConfig, data: FitData) -> list[str] | None:
    """Find the texts of the evaluation rows, where the run is to hold them."""
    if not config.store_texts:
        return None
    split = data.shares.eval_split
    try:
        texts = find_texts(open_cache(config.cache), [split])[split]
    except TextsNotFoundError as error:
        raise ConfigError(
            f"--store-texts finds no texts of {config.cache}: {error}. Put the data set back where "
            "it was when it was extracted, or leave the option out."
        ) from error
    return [texts[row] for row in data.shares.eval]


def train(
    plan: Plan, data: FitData, *, workspace: Path | None = None, show_progress: bool = False
) -> Outcome:
    """Choose the fusion where that is asked for, and train a classifier a seed.

    Heads that are solved need no Lightning; what seeds share is solved once. A fit by gradient
    writes checkpoints and logs to the folder `workspace`, if there is one.

    Raises:
        ConfigError: there is no such device, memory runs out, the training diverges, or the method
            is not for the number of labels that a text may have.
    """
    device = device_of(plan.method.accelerator, plan.method.devices)
    check_method(plan.method, multilabel=data.multilabel)
    ways = ["fewer --layers"]
    ways += [] if plan.method.solved_heads else ["a smaller --batch-size"]
    ways += [] if device.type == "cpu" else ["--accelerator cpu"]
    with memory_told(f"Pass {', or '.join(ways)}."):
        return _train(plan, data, workspace, show_progress=show_progress)


def _train(plan: Plan, data: FitData, workspace: Path | None, *, show_progress: bool) -> Outcome:
    chosen = choose_fusion(plan.method, data)
    method, data = chosen.method, chosen.data
    if chosen.members:
        trained = [train_stack(method, data, chosen.members, seed) for seed in plan.seeds]
    elif method.solved_heads:
        trained = [train_solved(method, data, seed) for seed in plan.seeds]
    else:
        plan = dataclasses.replace(plan, method=method)
        trained = _train_by_gradient(plan, data, workspace, show_progress=show_progress)
    return Outcome(data=data, trained=trained, chosen=chosen.record)


def _train_by_gradient(
    plan: Plan, data: FitData, workspace: Path | None, *, show_progress: bool
) -> list[Trained]:
    """Train by gradient, above a solved classifier where the fusion completes one."""
    base = None
    if FUSIONS[plan.method.fusion].completes_base:
        import_meanwhile("llmembed.train.gradient.fit")
        base = solve_base(plan.method, data)
    from llmembed.train.gradient.fit import train_by_gradient

    trained = train_by_gradient(
        plan,
        data if base is None else base.beneath(data, plan.method),
        workspace=workspace,
        show_progress=show_progress,
    )
    return trained if base is None else [base.complete(one) for one in trained]


def _finish(
    config: FitConfig,
    outcome: Outcome,
    workspace: Path,
    started: float,
    read_s: float,
    texts: Sequence[str] | None,
) -> Run:
    """Evaluate what was trained, and write the run."""
    eval_started = time.perf_counter()
    logits = [one.classifier.logits_all(outcome.data.x_eval) for one in outcome.trained]
    metrics = _metrics(outcome, logits)
    metrics["seconds"] = _seconds(started, read_s, eval_started)
    metrics |= _comparisons(config, outcome.data)
    predictions = _predictions(outcome, logits[outcome.kept], texts)
    run = _run_of(config, outcome, metrics)
    files = _extra_files(config, run, predictions)
    check_replaceable(config)  # once more: the place may have changed meanwhile
    write_run(run, predictions, files, logs=workspace / LOGS)
    return run


def _metrics(outcome: Outcome, logits: Sequence[Tensor]) -> dict[str, Any]:
    """Compute the figures of all classifiers from their logits, float64 `[n, C]` each."""
    data, kept = outcome.data, outcome.kept
    summaries = [
        _summary(one.classifier, own, data)
        for one, own in zip(outcome.trained, logits, strict=True)
    ]
    return {
        "eval_split": data.shares.record()["eval"]["split"],
        **summaries[kept],
        **_certainty(outcome, logits[kept]),
        "n_parameters": sum(weight.numel() for weight in outcome.best.classifier.parameters()),
        "splits": data.shares.record(),
        "peak_memory_bytes": peak_memory_bytes(),
        "per_seed": _per_seed(outcome, summaries),
        "over_seeds": {
            name: _spread([summary[name] for summary in summaries]) for name in _SPREAD_FIGURES
        },
        **({} if outcome.chosen is None else {"chosen": outcome.chosen}),
        "feature_shares": _feature_shares(outcome),
    }


def _summary(classifier: Classifier, logits: Tensor, data: FitData) -> dict[str, Any]:
    """Compute the figures of logits, float64 `[n, C]`, of the evaluation rows."""
    log_proba, y = classifier.log_proba(logits).numpy(), data.y_eval.numpy()
    if classifier.thresholds is None:
        return summarise(log_proba, y, data.labels)
    return summarise_sets(log_proba, y, data.labels, classifier.thresholds.double().numpy())


def _certainty(outcome: Outcome, logits: Tensor) -> dict[str, Any]:
    """Say what the temperature does for the classifier that is kept, and what abstaining would."""
    data, classifier, held_out = outcome.data, outcome.best.classifier, outcome.best.held_out
    temperature, proba = float(classifier.temperature), classifier.proba(logits).numpy()
    uncalibrated = _summary(classifier, logits * temperature, data)
    labels = data.y_eval.numpy()
    return {
        "temperature": temperature,
        "nll_uncalibrated": uncalibrated["nll"],
        "ece_uncalibrated": uncalibrated["ece"],
        "abstain": None if held_out is None else report_abstaining(held_out, proba, labels),
    }


def _per_seed(outcome: Outcome, summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "seed": one.seed,
            "kept": k == outcome.kept,
            **one.details,
            "val_loss": one.val_loss,
            **{name: summary[name] for name in _SPREAD_FIGURES},
        }
        for k, (one, summary) in enumerate(zip(outcome.trained, summaries, strict=True))
    ]


def _spread(values: list[float | None]) -> dict[str, float | None]:
    figures = [value for value in values if value is not None]
    if not figures:  # nothing was evaluated
        return {"mean": None, "std": None}
    deviation = float(np.std(figures, ddof=1)) if len(figures) > 1 else 0.0
    return {"mean": float(np.mean(figures)), "std": deviation}


def _feature_shares(outcome: Outcome) -> dict[str, Any] | None:
    """Say how much of a classifier each of its features is, where that can be said."""
    classifier, fusion = outcome.best.classifier, outcome.best.classifier.fusion
    widths = classifier.architecture.widths
    if outcome.chosen is not None and "members" in outcome.chosen:
        return _shares_in_stack(outcome.chosen["members"], len(outcome.data.features))
    if isinstance(fusion, ScalarMix):
        shares = fusion.scores.detach().softmax(dim=0).numpy()
        return {"measure": "the weight of each feature in the mix", "shares": shares.tolist()}
    if type(fusion) is Concat and isinstance(classifier.head, LinearHead):
        return _shares_of_weights(classifier.head.logits, "the head", widths)
    if classifier.base is not None:
        return _shares_of_weights(
            classifier.base, "the solved classifier beneath the fusion", widths
        )
    return None


def _shares_in_stack(members: Sequence[Mapping[str, Any]], n_features: int) -> dict[str, Any]:
    shares = np.zeros(n_features)
    for member in members:
        shares[list(member["features"])] += member["weight"] / len(member["features"])
    return {
        "measure": "the weight of each feature in the stack, that of a member with several "
        "features in equal parts",
        "shares": shares.tolist(),
    }


def _shares_of_weights(linear: nn.Linear, of: str, widths: Sequence[int]) -> dict[str, Any] | None:
    """Say it by the weights of a linear classifier; of none but zeros it can't be said."""
    if not linear.weight.any():
        return None
    squares = linear.weight.detach().double().square().sum(dim=0).numpy()
    starts = np.cumsum([0, *widths[:-1]])
    sums = np.add.reduceat(squares, starts)
    return {
        "measure": f"the squared weights of {of} on the standardised features of each layer",
        "shares": (sums / sums.sum()).tolist(),
    }


def _seconds(started: float, read_s: float, eval_started: float) -> dict[str, float]:
    """Say how long the parts of a fit took that ends now."""
    now = time.perf_counter()
    return {
        "read": read_s,
        "fit": eval_started - started - read_s,
        "eval": now - eval_started,
        "total": now - started,
    }


def _comparisons(config: FitConfig, data: FitData) -> dict[str, Any]:
    """Give what the figures are read beside: sizes, repeated rows, baselines."""
    cache = open_cache(config.cache)
    return {
        "size": size_of_features(cache, data),
        "repeated": find_repeated(cache, data) if len(data.y_eval) else None,
        "baselines": measure_baselines(data, config.cache, config.baseline),
    }


def _predictions(outcome: Outcome, logits: Tensor, texts: Sequence[str] | None) -> Predictions:
    """Give what the classifier that is kept says of the evaluation rows."""
    classifier, data = outcome.best.classifier, outcome.data
    log_proba = classifier.log_proba(logits).numpy()
    return Predictions(
        rows=data.shares.eval,
        labels=data.y_eval.numpy(),
        log_proba=log_proba,
        predicted=classifier.decide(log_proba),
        texts=texts,
    )


def _run_of(config: FitConfig, outcome: Outcome, metrics: Mapping[str, Any]) -> Run:
    data, best = outcome.data, outcome.best
    return Run(
        path=config.run_path,
        config=record_config(config, data, best),
        metrics=metrics,
        classifier=best.classifier,
        held_out=best.held_out,
        domain=None if data.multilabel else Domain.of(data, config.seed),
    )


def _extra_files(config: FitConfig, run: Run, predictions: Predictions) -> dict[str, bytes]:
    """Make what lies in a run for people and other programs: the page, and the graph if asked."""
    sweep = find_sweep(run.path, run.config["cache"]["fingerprint"])
    parts = RunParts(config=run.config, metrics=run.metrics, predictions=predictions, sweep=sweep)
    files = {REPORT_FILE: report_page(parts).encode()}
    if config.export is not None:
        files[ONNX_FILE] = onnx_of(run.classifier, run.config)
    return files
