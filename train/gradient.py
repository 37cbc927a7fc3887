"""Fits by gradient, through Lightning: fusions and heads that have no closed form."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from llmembed.cache_format.errors import ConfigError
from llmembed.train.calibration import fit_temperature
from llmembed.train.classifier import Classifier, Trained
from llmembed.train.config import FitConfig
from llmembed.train.data import FitData, architecture_of, class_weights
from llmembed.train.module import (
    ClassifierModule,
    EpochBar,
    FeatureDataModule,
    KeepBest,
    Optimisation,
)
from llmembed.train.paper import SIGMAS, PaperCooc

_SMALL_STEP = 1 << 28  # multiply-adds of a forward pass, about 3 ms on one core


def train_seed(
    config: FitConfig, data: FitData, seed: int, *, show_progress: bool = False
) -> Trained:
    """Train one classifier, early stopping included."""
    started = time.perf_counter()
    keep_best = KeepBest(config.training.patience)
    with _quiet_lightning(), torch.random.fork_rng():
        torch.manual_seed(seed)
        module = ClassifierModule(
            _new_classifier(config, data),
            Optimisation(
                lr=config.training.lr,
                weight_decay=config.training.weight_decay,
                class_weights=class_weights(config, data),
            ),
        )
        bar = EpochBar(config.training.epochs, seed) if show_progress else None
        trainer = _trainer(config, [keep_best, *([bar] if bar else [])])
        with _threads_for(module, config.training.batch_size):
            trainer.fit(
                module, datamodule=FeatureDataModule(data, config.training.batch_size, seed)
            )
    classifier = module.classifier.cpu().eval()
    classifier.standardise.load_state_dict(data.standardiser.state_dict())
    _check_converged(config, data, classifier, keep_best)
    if config.calibrate == "temperature" and len(data.shares.validation):
        rows = torch.from_numpy(data.shares.validation)
        temperature = fit_temperature(
            classifier.logits_all(data.x[rows]).numpy(), data.y[rows].numpy()
        )
        classifier.temperature.fill_(temperature)
    return Trained(
        seed=seed,
        classifier=classifier,
        val_loss=keep_best.best_loss if len(data.shares.validation) else None,
        fit_s=time.perf_counter() - started,
        device=str(trainer.strategy.root_device),
        details={
            "head": config.gradient_head,
            "n_epochs": trainer.current_epoch,
            "saturated_share": module.saturated,
            **({"sigma": config.sigma} if config.preset == "paper" else {}),
        },
    )


def train_paper(
    config: FitConfig, data: FitData, seed: int, *, show_progress: bool = False
) -> Trained:
    """Train the published recipe; without a sigma, one fit each, of which one is kept."""
    if config.sigma is not None:
        return train_seed(config, data, seed, show_progress=show_progress)
    configs = [dataclasses.replace(config, sigma=sigma) for sigma in SIGMAS]
    fits = [train_seed(one, data, seed, show_progress=show_progress) for one in configs]
    best = min(fits, key=lambda one: cast("float", one.val_loss))
    tried = {str(one.details["sigma"]): one.val_loss for one in fits}
    return dataclasses.replace(
        best,
        fit_s=sum(one.fit_s for one in fits),
        details={**best.details, "val_loss_of_sigma": tried},
    )


def _new_classifier(config: FitConfig, data: FitData) -> Classifier:
    classifier = Classifier(architecture_of(config, data, config.gradient_head))
    if isinstance(classifier.fusion, PaperCooc):
        classifier.fusion.sigma.fill_(cast("float", config.sigma))
    return classifier


def _trainer(config: FitConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Make a lean trainer: bars, loggers and checkpoints cost more than such a small step."""
    try:
        return pl.Trainer(
            accelerator=config.accelerator,
            devices=1,
            precision=cast("Any", config.precision),
            max_epochs=config.training.epochs,
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


@contextmanager
def _threads_for(module: torch.nn.Module, batch_size: int) -> Iterator[None]:
    """Give a small step one CPU thread.

    A step of 128 rows and 460,000 weights took 11 ms on one thread and 16-20 ms on two; with
    another process on the cores, two threads that waited for each other took up to 600 ms.
    """
    n_threads = torch.get_num_threads()
    n_products = batch_size * sum(weight.numel() for weight in module.parameters())
    torch.set_num_threads(1 if n_products < _SMALL_STEP else n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


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


def _check_converged(
    config: FitConfig, data: FitData, classifier: Classifier, keep_best: KeepBest
) -> None:
    finite = all(bool(weight.isfinite().all()) for weight in classifier.parameters())
    validated = math.isfinite(keep_best.best_loss) or not len(data.shares.validation)
    if not finite or not validated:
        raise ConfigError(
            f"the training diverged: the loss became NaN or infinite with lr {config.training.lr}. "
            "Pass a smaller --lr."
        )
