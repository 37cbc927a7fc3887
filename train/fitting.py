"""The verb: read a cache, train one classifier a seed, measure, write the run.

The evaluation rows are touched once, after the last choice. With several seeds the folder holds
the classifier with the lowest validation loss, and `over_seeds` tells how far they lie apart.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from tqdm import tqdm

from llmembed.cache_format.errors import ConfigError
from llmembed.train.config import FitConfig
from llmembed.train.data import FeatureDataModule, FitData, load_data
from llmembed.train.metrics import Floats, summarise
from llmembed.train.module import (
    Architecture,
    Classifier,
    ClassifierModule,
    KeepBest,
    Optimisation,
)
from llmembed.train.run import Predictions, Run, check_replaceable, record_config, write_run

_EVAL_ROWS = 4096
_SPREAD_FIGURES = ("accuracy", "macro_f1", "nll")


@dataclass(frozen=True, kw_only=True)
class TrainedSeed:
    """One trained classifier and what it says about the evaluation rows."""

    seed: int
    """Seed it was trained with."""
    classifier: Classifier
    """The classifier, with its best weights."""
    val_loss: float | None
    """Lowest validation loss; None without a validation share."""
    n_epochs: int
    """Epochs trained."""
    saturated: float | None
    """Share of saturated co-occurrence entries; None for other fusions."""
    fit_s: float
    """Seconds of training."""


def fit(config: FitConfig, *, show_progress: bool = False) -> Run:
    """Fit a classifier on a cache and write its run.

    Args:
        config: all options.
        show_progress: show a bar on stderr where that is a terminal.

    Returns:
        The run that was written, ready to predict.

    Raises:
        ConfigError: an option does not fit the cache.
        DataError: labels or features cannot be trained on.
        CacheError: the cache is missing, malformed or incomplete.
        RunFormatError: the output folder is not a run, so it is not replaced.
    """
    started = time.perf_counter()
    check_replaceable(config.run_path)
    data = load_data(config)
    read_s = time.perf_counter() - started
    trained = [
        train_seed(config, data, config.seed + k, show_progress=show_progress)
        for k in range(config.n_seeds)
    ]
    eval_started = time.perf_counter()
    log_probas = [_log_proba(one.classifier, data.x_eval) for one in trained]
    kept = min(range(len(trained)), key=lambda k: trained[k].val_loss or 0.0)
    labels = data.y_eval.numpy()
    metrics = _metrics(data, trained, log_probas, kept)
    now = time.perf_counter()
    metrics["seconds"] = {
        "read": read_s,
        "fit": sum(one.fit_s for one in trained),
        "eval": now - eval_started,
        "total": now - started,
    }
    predictions = Predictions(rows=data.shares.eval, labels=labels, log_proba=log_probas[kept])
    record = record_config(config, data, trained[kept].seed, architecture_of(config, data))
    return write_run(config.run_path, record, trained[kept].classifier, metrics, predictions)


def train_seed(
    config: FitConfig, data: FitData, seed: int, *, show_progress: bool = False
) -> TrainedSeed:
    """Train one classifier, early stopping included."""
    started = time.perf_counter()
    keep_best = KeepBest(config.patience)
    with _quiet_lightning(), torch.random.fork_rng():
        torch.manual_seed(seed)
        module = ClassifierModule(
            Classifier(architecture_of(config, data)),
            Optimisation(
                lr=config.lr,
                weight_decay=config.weight_decay,
                class_weights=_class_weights(config, data),
            ),
        )
        bar = EpochBar(config.epochs, seed) if show_progress else None
        trainer = _trainer(config, [keep_best, *([bar] if bar else [])])
        trainer.fit(module, datamodule=FeatureDataModule(data, config.batch_size, seed))
    classifier = module.classifier.cpu().eval()
    classifier.standardise.load_state_dict(data.standardiser.state_dict())
    _check_converged(config, data, classifier, keep_best)
    return TrainedSeed(
        seed=seed,
        classifier=classifier,
        val_loss=keep_best.best_loss if len(data.shares.validation) else None,
        n_epochs=trainer.current_epoch,
        saturated=module.saturated,
        fit_s=time.perf_counter() - started,
    )


def _trainer(config: FitConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Make a lean trainer: bars, loggers and checkpoints cost more than such a small step."""
    try:
        return pl.Trainer(
            accelerator=config.accelerator,
            devices=1,
            precision=cast("Any", config.precision),
            max_epochs=config.epochs,
            max_time=config.max_time,
            deterministic=config.deterministic,
            fast_dev_run=config.fast_dev_run,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"Lightning refuses --accelerator {config.accelerator} with --precision "
            f"{config.precision}: {error} Pass --accelerator auto --precision 32-true."
        ) from error


class EpochBar(pl.Callback):
    """One bar over the epochs on stderr, with the validation loss; silent without a terminal."""

    def __init__(self, n_epochs: int, seed: int) -> None:
        self.bar = tqdm(total=n_epochs, desc=f"seed {seed}", unit="epoch", disable=None)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Advance by one epoch."""
        del trainer
        assert isinstance(pl_module, ClassifierModule)
        self.bar.set_postfix_str(f"validation loss {pl_module.val_loss:.4f}", refresh=False)
        self.bar.update()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        del trainer, pl_module
        self.bar.close()


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's banners and hints off the user's screen while it trains."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        log.setLevel(level)


def architecture_of(config: FitConfig, data: FitData) -> Architecture:
    """Derive the classifier's shapes from the features that were read."""
    return Architecture.of(
        config.fusion,
        config.head,
        tuple(feature.hidden_size for feature in data.features),
        len(data.cache.labels),
        config.dropout,
    )


def _class_weights(config: FitConfig, data: FitData) -> Tensor | None:
    """Weigh class c by n / (C n_c), C being the classes that occur; an absent class by 0."""
    if config.class_weight == "none":
        return None
    labels = data.y[torch.from_numpy(data.shares.train)]
    counts = torch.bincount(labels, minlength=len(data.cache.labels)).float()
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0)


def _check_converged(
    config: FitConfig, data: FitData, classifier: Classifier, keep_best: KeepBest
) -> None:
    finite = all(bool(weight.isfinite().all()) for weight in classifier.parameters())
    validated = math.isfinite(keep_best.best_loss) or not len(data.shares.validation)
    if not finite or not validated:
        raise ConfigError(
            f"the training diverged: the loss became NaN or infinite with lr {config.lr}. "
            "Pass a smaller --lr."
        )


@torch.inference_mode()
def _log_proba(classifier: Classifier, standardised: Tensor) -> Floats:
    chunks = [classifier.logits(chunk).double() for chunk in torch.split(standardised, _EVAL_ROWS)]
    log_proba: Floats = torch.cat(chunks).log_softmax(dim=1).numpy()
    return log_proba


def _metrics(
    data: FitData, trained: Sequence[TrainedSeed], log_probas: Sequence[Floats], kept: int
) -> dict[str, Any]:
    labels = data.y_eval.numpy()
    summaries = [summarise(log_proba, labels, data.cache.labels) for log_proba in log_probas]
    classifier = trained[kept].classifier
    return {
        "eval_split": data.shares.record()["eval"]["split"],
        **summaries[kept],
        "n_parameters": sum(weight.numel() for weight in classifier.parameters()),
        "saturated_share": trained[kept].saturated,
        "splits": data.shares.record(),
        "peak_memory_bytes": _peak_memory_bytes(),
        "per_seed": [
            {
                "seed": one.seed,
                "kept": k == kept,
                "n_epochs": one.n_epochs,
                "val_loss": one.val_loss,
                **{name: summary[name] for name in _SPREAD_FIGURES},
            }
            for k, (one, summary) in enumerate(zip(trained, summaries, strict=True))
        ],
        "over_seeds": {
            name: _spread([summary[name] for summary in summaries]) for name in _SPREAD_FIGURES
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": deviation}


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
