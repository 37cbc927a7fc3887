"""Fits by gradient, through Lightning: fusions and heads that have no closed form."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import scipy.stats
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import WandbLogger

from llmembed.common.errors import ConfigError, LLMEmbedWarning
from llmembed.train.config import Plan
from llmembed.train.fusions import AUTO, HEADS
from llmembed.train.fusions.classifier import Classifier, Trained
from llmembed.train.fusions.heads import LinearHead
from llmembed.train.fusions.tricks import small_steps
from llmembed.train.gradient.module import (
    LOSS,
    MIN_IMPROVEMENT,
    AtomicFiles,
    ClassifierModule,
    Epochs,
    LogLines,
    SaveLast,
    epoch_seed,
    seed_draws,
)
from llmembed.train.gradient.workspace import checkpoint_folder, find_checkpoint, make_logger
from llmembed.train.inputs import FeatureBatches, FitData, mean_loss
from llmembed.train.linear.devices import fits, free_bytes
from llmembed.train.linear.sweep import are_few
from llmembed.train.measures import Floats, HeldOutRows, calibrate, calibrate_trained

VALIDATION_ROWS = 1024  # of a batch, where the steps' are smaller


def train_by_gradient(
    plan: Plan, data: FitData, *, workspace: Path | None = None, show_progress: bool = False
) -> list[Trained]:
    """Train a classifier a seed, one after the other.

    Args:
        plan: what to train.
        data: features and labels.
        workspace: folder of checkpoints and logs; None writes neither.
        show_progress: show on stderr how far it is.
    """
    fit = functools.partial(_fit, plan, data, workspace=workspace, show_progress=show_progress)
    sigmas = plan.sigmas or (None,)
    with _quiet_lightning():
        return [_choose_sigma([fit(seed, sigma) for sigma in sigmas]) for seed in plan.seeds]


def _fit(
    plan: Plan,
    data: FitData,
    seed: int,
    sigma: float | None,
    *,
    workspace: Path | None,
    show_progress: bool,
) -> Trained:
    """Train one classifier, then check, calibrate and describe it."""
    started, watches = time.perf_counter(), bool(len(data.shares.validation))
    least = MIN_IMPROVEMENT / (len(data.labels) if data.multilabel else 1)  # of a mean over labels
    epochs, folder, logger = Epochs(least), None, None
    callbacks: list[pl.Callback] = [epochs]
    if watches:
        callbacks.append(EarlyStopping(LOSS, least, plan.training.patience))
    if workspace is not None and not plan.trainer.fast_dev_run:
        folder = workspace / checkpoint_folder(plan, data, seed, sigma)
        callbacks.append(SaveLast(folder, plan.checkpoint_s))
        name = f"seed-{seed}" if sigma is None else f"seed-{seed}-sigma-{sigma:g}"
        logger = make_logger(plan, workspace, name)
    if show_progress and not sys.stderr.isatty():
        callbacks.append(LogLines(plan.training.epochs, seed))
    trainer = _trainer(plan, callbacks, logger, has_bar=show_progress and sys.stderr.isatty())
    device = trainer.strategy.root_device
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus, device_type="cuda"):
        seed_draws(seed, device)
        head = "linear" if plan.method.head == AUTO else plan.method.head
        classifier = Classifier(data.architecture(plan.method.fusion, head, plan.training.dropout))
        if sigma is not None:
            classifier.fusion.get_buffer("sigma").fill_(sigma)
        module = ClassifierModule(classifier, plan.training, data.class_weights(), seed)
        n_products = plan.training.batch_size * sum(one.numel() for one in module.parameters())
        with small_steps(device, n_products):
            _run(trainer, module, _batches(plan, data, module, trainer), folder)
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()  # the next seed has a run of its own
    _warn_of_max_time(plan, trainer, seed)
    classifier = classifier.cpu().eval()
    classifier.standardise.load_state_dict(data.standardiser.state_dict())
    _refuse_diverged(plan, classifier, epochs, watches=watches)
    val_loss, taken_back = epochs.loss, watches and _adds_nothing_sure(data, classifier)
    if taken_back:
        val_loss = _take_back(data, classifier)
    if plan.method.calibrate == "temperature" and watches:
        _calibrate(data, classifier)
    saturated = classifier.fusion.saturated  # by the rows that are watched, not by none
    rows = torch.from_numpy(data.shares.validation)
    proba = classifier.proba(classifier.logits_all(data.x, rows, data.base_logits)).numpy()
    if data.multilabel:
        _set_thresholds(plan, data, classifier, proba)
    tells = watches and not data.multilabel
    return Trained(
        seed=seed,
        classifier=classifier,
        val_loss=val_loss if watches else None,
        fit_s=time.perf_counter() - started,
        device=str(device),
        details={
            "head": head,
            "n_epochs": trainer.current_epoch,
            "losses": epochs.losses,
            "saturated_share": None if saturated is None else saturated.item(),
            **({"taken_back": True} if taken_back else {}),
            **({} if sigma is None else {"sigma": sigma}),
        },
        held_out=HeldOutRows.of(proba, data.y[rows].numpy()) if tells else None,
    )


def _refuse_diverged(plan: Plan, classifier: Classifier, epochs: Epochs, *, watches: bool) -> None:
    finite = all(bool(weight.isfinite().all()) for weight in classifier.parameters())
    if not finite or (watches and not epochs.best and not math.isfinite(epochs.last_loss)):
        raise ConfigError(
            f"the training diverged: the loss became NaN or infinite with lr {plan.training.lr}. "
            "Pass a smaller --lr."
        )


def _trainer(plan: Plan, callbacks: list[pl.Callback], logger: Any, *, has_bar: bool) -> pl.Trainer:
    flags: dict[str, Any] = dataclasses.asdict(plan.trainer)
    try:
        return pl.Trainer(
            **flags,
            max_epochs=plan.training.epochs,
            callbacks=callbacks,
            logger=logger or False,
            plugins=[AtomicFiles()],
            enable_checkpointing=any(isinstance(one, SaveLast) for one in callbacks),
            enable_progress_bar=has_bar,
            enable_model_summary=False,
            num_sanity_val_steps=-1,  # the first weights may be the best
        )
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"Lightning refuses --accelerator {flags['accelerator']} with --devices "
            f"{flags['devices']} and --precision {flags['precision']}: {error} Pass --accelerator "
            "auto --devices 1 --precision 32-true."
        ) from error


def _batches(
    plan: Plan, data: FitData, module: ClassifierModule, trainer: pl.Trainer
) -> list[FeatureBatches]:
    """Give shuffled batches to train on, and those to watch; on the device where all fits there."""
    device, size = trainer.strategy.root_device, plan.training.batch_size
    if device.type == "cuda" and fits(data.x.nbytes, free_bytes(device)):
        data = data.to(device)
    train, validation = data.shares.train, data.shares.validation
    batches = [
        FeatureBatches(
            data, train, size, device, lambda: epoch_seed(module.seed, module.current_epoch)
        )
    ]
    if len(validation):
        batches.append(FeatureBatches(data, validation, max(size, VALIDATION_ROWS), device))
    return batches


def _run(
    trainer: pl.Trainer,
    module: ClassifierModule,
    batches: Sequence[FeatureBatches],
    folder: Path | None,
) -> None:
    """Run Lightning's fit, from a checkpoint where there is one; Ctrl-C stays Ctrl-C."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    found = None if folder is None else find_checkpoint(folder)
    if found is not None:
        logging.getLogger("llmembed").info("The fit goes on from a checkpoint.")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Lightning's bar; stdout is for results
            train, *watched = batches
            validation = watched[0] if watched else None
            trainer.fit(module, train, validation, ckpt_path=found, weights_only=True)
    except SystemExit as error:
        if trainer.interrupted:  # by then Lightning has silenced the signal and exits with 1
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from error
        raise


def _adds_nothing_sure(data: FitData, classifier: Classifier) -> bool:
    """Say whether few rows leave it open that a head adds anything to its base.

    The few of them that are watched let a head pass that fits its own rows alone, epoch after epoch
    anew. So it has to lower their loss beyond chance.
    """
    n_rows = len(data.shares.train) + len(data.shares.validation)
    if data.base_logits is None or not isinstance(classifier.head, LinearHead):
        return False
    if data.multilabel or not are_few(n_rows, data.x.shape[1]):
        return False
    rows = torch.from_numpy(data.shares.validation)
    with_head, base = (
        F.cross_entropy(logits, data.y[rows], reduction="none")
        for logits in (
            classifier.logits_all(data.x, rows, data.base_logits),
            data.base_logits[rows].double(),
        )
    )
    return not is_gain((base - with_head).numpy())


def is_gain(differences: Floats) -> bool:
    """Say whether the mean of float64 `[n]` is above 0 beyond chance: a t-test at 5 %.

    >>> import numpy as np
    >>> is_gain(np.array([0.5, 0.4, 0.6])), is_gain(np.array([0.5, -0.4, 0.3]))
    (True, False)
    >>> is_gain(np.array([0.5]))
    False
    """
    n = len(differences)
    if n < 2:
        return False
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    return float(differences.mean()) > error * float(scipy.stats.t.ppf(0.95, n - 1))


def _take_back(data: FitData, classifier: Classifier) -> float:
    """Leave the base alone, and give its loss on the rows that are watched."""
    assert isinstance(classifier.head, LinearHead)
    assert data.base_logits is not None
    classifier.head.logits.weight.data.zero_()
    classifier.head.logits.bias.data.zero_()
    rows = torch.from_numpy(data.shares.validation)
    own = None if data.sample_weights is None else data.sample_weights[rows]
    return mean_loss(data.base_logits[rows], data.y[rows], data.class_weights(), own).item()


def _calibrate(data: FitData, classifier: Classifier) -> None:
    rows = torch.from_numpy(data.shares.validation)
    logits = classifier.logits_all(data.x, rows, data.base_logits).numpy()
    of_probabilities = HEADS[classifier.architecture.head].gives_probabilities
    find = calibrate if of_probabilities else calibrate_trained  # no temperature near 1 suits them
    own = None if data.sample_weights is None else data.sample_weights[rows].numpy()
    classifier.temperature.fill_(find(logits, data.y[rows].numpy(), own))


def _set_thresholds(plan: Plan, data: FitData, classifier: Classifier, proba: Floats) -> None:
    """Set the thresholds of labels by the probabilities `[n, C]` of the validation share."""
    rows, own = torch.from_numpy(data.shares.validation), data.sample_weights
    classifier.decide_by(
        proba,
        data.y[rows].numpy(),
        data.y[torch.from_numpy(data.shares.train)].sum(dim=0).numpy(),
        threshold=plan.method.threshold,
        weights=None if own is None else own[rows].numpy(),
    )


def _choose_sigma(fits: Sequence[Trained]) -> Trained:
    """Keep the fit with the lowest validation loss of those of one seed."""
    if len(fits) == 1:
        return fits[0]
    best = min(fits, key=lambda one: cast("float", one.val_loss))
    tried = {str(one.details["sigma"]): one.val_loss for one in fits}
    return dataclasses.replace(
        best,
        fit_s=sum(one.fit_s for one in fits),
        details={**best.details, "val_loss_of_sigma": tried},
    )


@contextlib.contextmanager
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


def _warn_of_max_time(plan: Plan, trainer: Any, seed: int) -> None:
    timers = (one for one in trainer.callbacks if isinstance(one, Timer))
    if any((timer.time_remaining() or math.inf) <= 0 for timer in timers):
        warnings.warn(
            f"--max-time {plan.trainer.max_time} ended the fit of seed {seed} after "
            f"{trainer.current_epoch} complete epochs of {plan.training.epochs}; "
            "the best weights up to then are kept. Pass a longer --max-time to train on.",
            LLMEmbedWarning,
            stacklevel=2,
        )
