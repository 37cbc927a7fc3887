"""Fits by gradient, through Lightning: fusions and heads that have no closed form."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from llmembed.common.errors import ConfigError, LLMEmbedWarning
from llmembed.common.process import keep_freed_memory
from llmembed.train.config import FitConfig
from llmembed.train.fusions.classifier import Classifier, Trained
from llmembed.train.fusions.paper import SIGMAS, PaperCooc
from llmembed.train.gradient.module import (
    ClassifierModule,
    EpochLog,
    EpochProgress,
    FeatureDataModule,
    KeepBest,
    Optimisation,
    SaveCheckpoint,
)
from llmembed.train.gradient.workspace import (
    check_checkpoint,
    checkpoint_name,
    close_loggers,
    make_logger,
)
from llmembed.train.inputs.data import FitData, architecture_of, class_weights
from llmembed.train.linear.parallel import one_thread_each
from llmembed.train.measures.calibration import calibrate, calibrate_trained

_POLL_S = 0.05
_SMALL_STEP = 1 << 28  # multiply-adds, about 3 ms on one core
_PACK = 1 << 32


def train_by_gradient(
    config: FitConfig,
    data: FitData,
    seeds: Sequence[int],
    *,
    workspace: Path | None = None,
    show_progress: bool = False,
) -> list[Trained]:
    """Train a classifier a seed, several at a time where their steps are small.

    Args:
        config: options.
        data: features and labels.
        seeds: of the first weights, the order of batches and dropout.
        workspace: folder of checkpoints and logs; None writes neither.
        show_progress: show on stderr how far it is.
    """
    configs = [config]
    if config.preset == "paper" and config.sigma is None:
        configs = [dataclasses.replace(config, sigma=sigma) for sigma in SIGMAS]
    with _quiet_lightning():
        fits = [
            _Fit(one, data, seed, workspace, show_progress=show_progress)
            for seed in seeds
            for one in configs
        ]
        _run_all(fits)
    trained = [fit.trained() for fit in fits]
    return [
        _choose_sigma(trained[first : first + len(configs)])
        for first in range(0, len(trained), len(configs))
    ]


class _Fit:
    """One fit through Lightning, early stopping included: made, run, then looked at."""

    def __init__(
        self,
        config: FitConfig,
        data: FitData,
        seed: int,
        workspace: Path | None,
        *,
        show_progress: bool,
    ) -> None:
        self.config, self.data, self.seed = config, data, seed
        self.keep_best = KeepBest(config.training.patience)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = _new_module(config, data, seed)
        callbacks: list[pl.Callback] = [self.keep_best, EpochLog()]
        if show_progress:
            callbacks.append(EpochProgress(config.training.epochs, seed))
        self.trainer, self.checkpoint = _prepare(config, data, seed, callbacks, workspace)
        self.fit_s = 0.0

    @property
    def n_products(self) -> int:
        """Multiply-adds of a forward pass, about."""
        n_weights = sum(weight.numel() for weight in self.module.parameters())
        return self.config.training.batch_size * n_weights

    @property
    def _steps_of_pack(self) -> int:
        """Steps that Lightning takes for one: half a second on one core, more where steps are."""
        return max(8, min(64, _PACK // self.n_products))

    def run(self) -> None:
        """Train."""
        started = time.perf_counter()
        datamodule = FeatureDataModule(
            self.data,
            self.config.training.batch_size,
            self.seed,
            steps_of_pack=1 if self.config.fast_dev_run else self._steps_of_pack,
        )
        _fit(self.trainer, self.module, datamodule, self.checkpoint)
        close_loggers(self.trainer.loggers)
        self.fit_s = time.perf_counter() - started

    def trained(self) -> Trained:
        """Check, calibrate and describe what came out."""
        config, data, module = self.config, self.data, self.module
        classifier = module.classifier.cpu().eval()
        classifier.standardise.load_state_dict(data.standardiser.state_dict())
        self._warn_of_max_time()
        _check_converged(config, data, classifier, self.keep_best)
        if config.calibrate == "temperature" and len(data.shares.validation):
            _calibrate(config, data, classifier)
        return Trained(
            seed=self.seed,
            classifier=classifier,
            val_loss=self.keep_best.best_loss if len(data.shares.validation) else None,
            fit_s=self.fit_s,
            device=str(self.trainer.strategy.root_device),
            details={
                "head": config.gradient_head,
                "n_epochs": self.trainer.current_epoch,
                "saturated_share": module.saturated,
                **({"sigma": config.sigma} if config.preset == "paper" else {}),
            },
        )

    def _warn_of_max_time(self) -> None:
        trainer: Any = self.trainer  # whose class does not declare its callbacks
        timers = [one for one in trainer.callbacks if isinstance(one, pl.callbacks.Timer)]
        if any((timer.time_remaining() or math.inf) <= 0 for timer in timers):
            warnings.warn(
                f"--max-time {self.config.max_time} ended the fit of seed {self.seed} after "
                f"{self.trainer.current_epoch} complete epochs of {self.config.training.epochs}; "
                "the best weights up to then are kept. Pass a longer --max-time to train on.",
                LLMEmbedWarning,
                stacklevel=2,
            )


def _run_all(fits: Sequence[_Fit]) -> None:
    """Run fits whose steps are small each on one thread, as many at a time as there are threads.

    A step of 128 rows and 460,000 weights took 11 ms on one thread and 16-20 ms on two; with
    another process on the cores, two threads that waited for each other took up to 600 ms. Products
    let other Python threads run meanwhile, so two fits on two cores take little longer than one.
    """
    on_cpu = fits[0].trainer.strategy.root_device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    if not on_cpu or fits[0].n_products >= _SMALL_STEP:
        for fit in fits:
            fit.run()
        return
    with one_thread_each() as n_threads:
        if len(fits) == 1 or n_threads == 1 or fits[0].config.logger == "wandb":
            for fit in fits:  # in the main thread; wandb has one run at a time
                fit.run()
        else:
            _run_in_threads(fits, n_threads)


def _run_in_threads(fits: Sequence[_Fit], n_threads: int) -> None:
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = [pool.submit(fit.run) for fit in fits]
        try:
            wait(running, return_when=FIRST_EXCEPTION)  # Ctrl-C reaches the main thread alone
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while wait(running, timeout=_POLL_S).not_done:
                for fit in fits:  # again and again: a fit that is about to start resets it
                    fit.trainer.should_stop = True
    for one in running:
        if not one.cancelled():
            one.result()


def _calibrate(config: FitConfig, data: FitData, classifier: Classifier) -> None:
    rows = torch.from_numpy(data.shares.validation)
    logits = classifier.logits_all(data.x, rows).numpy()
    # The paper's outputs are probabilities, and no temperature near 1 suits them.
    find = calibrate if config.preset == "paper" else calibrate_trained
    own = None if data.sample_weights is None else data.sample_weights[rows].numpy()
    classifier.temperature.fill_(find(logits, data.y[rows].numpy(), own))


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


def _name(config: FitConfig, seed: int) -> str:
    return f"seed-{seed}" if config.sigma is None else f"seed-{seed}-sigma-{config.sigma:g}"


def _prepare(
    config: FitConfig,
    data: FitData,
    seed: int,
    callbacks: list[pl.Callback],
    workspace: Path | None,
) -> tuple[pl.Trainer, Path | None]:
    """Make the trainer of one fit, and say where its checkpoint lies if it has one."""
    if workspace is None or config.fast_dev_run:
        return _trainer(config, callbacks, logger=False), None
    checkpoint = workspace / checkpoint_name(config, data, seed)
    callbacks.append(SaveCheckpoint(checkpoint, config.checkpoint_s))
    logger = make_logger(config, workspace, _name(config, seed))
    return _trainer(config, callbacks, logger), checkpoint


def _fit(
    trainer: pl.Trainer,
    module: ClassifierModule,
    datamodule: FeatureDataModule,
    checkpoint: Path | None,
) -> None:
    """Run Lightning's fit, from a checkpoint where there is one; Ctrl-C stays Ctrl-C."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    found = checkpoint if checkpoint is not None and checkpoint.exists() else None
    if found is not None:
        check_checkpoint(found)
        logging.getLogger("llmembed").info("The fit goes on from a checkpoint.")
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=found, weights_only=True)
    except SystemExit as error:
        if trainer.interrupted:  # by then Lightning has silenced the signal and exits with 1
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from error
        raise


def _new_module(config: FitConfig, data: FitData, seed: int) -> ClassifierModule:
    optimisation = Optimisation(
        lr=config.training.lr,
        weight_decay=config.training.weight_decay,
        class_weights=class_weights(config, data),
    )
    return ClassifierModule(_new_classifier(config, data), optimisation, seed)


def _new_classifier(config: FitConfig, data: FitData) -> Classifier:
    classifier = Classifier(architecture_of(config, data, config.gradient_head))
    if isinstance(classifier.fusion, PaperCooc):
        classifier.fusion.sigma.fill_(cast("float", config.sigma))
    return classifier


def _trainer(
    config: FitConfig, callbacks: list[pl.Callback], logger: pl.loggers.Logger | bool
) -> pl.Trainer:
    """Make a lean trainer: Lightning's own bars and checkpoints cost more than such a step."""
    try:
        return pl.Trainer(
            accelerator=config.accelerator,
            devices=cast("Any", config.devices),  # as Lightning reads it, "3," is number 3
            precision=cast("Any", config.precision),
            max_epochs=config.training.epochs,
            max_time=config.max_time,
            deterministic=config.deterministic,
            fast_dev_run=config.fast_dev_run,
            callbacks=callbacks,
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=-1,  # the first weights may be the best
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"Lightning refuses --accelerator {config.accelerator} with --devices {config.devices} "
            f"and --precision {config.precision}: {error} Pass --accelerator auto --devices 1 "
            "--precision 32-true."
        ) from error


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
    validated = math.isfinite(keep_best.last_loss) or keep_best.best_epoch > 0
    validated = validated or not len(data.shares.validation)
    if not finite or not validated:
        raise ConfigError(
            f"the training diverged: the loss became NaN or infinite with lr {config.training.lr}. "
            "Pass a smaller --lr."
        )
