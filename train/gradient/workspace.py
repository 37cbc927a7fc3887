"""What a fit by gradient keeps beside its run until that is written: checkpoints and logs.

    runs/.sst2-cooc-0.partial/
      <name>.ckpt             the state after an epoch, a few seconds old at most
      logs/seed-0/...         what --logger writes; it moves into the run

A fit that was killed finds its checkpoint by the hash of all that its result depends on, goes on
from there, and ends in the same weights; with other options it starts anew. Checkpoints are
Lightning's, and are read with `weights_only=True`: nothing in them can run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pickle
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmembed.common.errors import (
    LLMEmbedError,
    MissingPackageError,
    RunFormatError,
    RunStorageError,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from llmembed.train.config import FitConfig
    from llmembed.train.inputs.data import FitData

LOGS = "logs"
_PROJECT = "llmembed"
_NO_MATTER = (
    *("output", "export", "n_seeds", "logger", "checkpoint_s", "eval_split", "memory_gb"),
    *("address", "overwrite"),
)
_PACKAGES = ("llmembed-cache", "torch", "lightning")


@contextlib.contextmanager
def open_workspace(run_path: Path) -> Iterator[Path]:
    """Give the folder beside a run; it stays after an interruption or a fault of the disk alone.

    Raises:
        RunStorageError: the disk failed or refused.
    """
    folder = run_path.with_name(f".{run_path.name}.partial")
    missing = [parent for parent in folder.parents if not parent.exists()]
    shutil.rmtree(folder / LOGS, ignore_errors=True)
    try:
        yield folder
    except LLMEmbedError:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    except OSError as error:
        raise RunStorageError(
            f"the disk failed or refused while {run_path} was made: {error}. Make room or check "
            "the permissions, and run the same command again; an earlier run there is kept."
        ) from error
    shutil.rmtree(folder, ignore_errors=True)


def checkpoint_name(config: FitConfig, data: FitData, seed: int) -> str:
    """Hash all that the result of a fit depends on."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NO_MATTER}
    rows = hashlib.sha256(data.shares.train.tobytes() + data.shares.validation.tobytes())
    if data.sample_weights is not None:
        rows.update(data.sample_weights.numpy().tobytes())
    identity = {
        "fit": options | {"seed": seed},
        "fingerprint": data.fingerprint,
        "features": data.features,
        "rows": rows.hexdigest(),
        "versions": {package: version(package) for package in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16] + ".ckpt"


def check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint that cannot be read.

    Raises:
        RunFormatError: it is damaged, or holds more than tensors and plain values.
    """
    import torch

    try:
        torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise RunFormatError(
            f"the checkpoint {path} is damaged or was not written by llmembed-fit "
            f"({type(error).__name__}). Remove it, and the fit starts anew."
        ) from error


class Clock:
    """Says every so many seconds that it is time.

    >>> Clock(0).is_due(), Clock(60).is_due()
    (True, False)
    """

    def __init__(self, every_s: float) -> None:
        self._every_s, self._last = every_s, time.monotonic()

    def is_due(self) -> bool:
        """Whether so many seconds have passed since it last was."""
        if time.monotonic() - self._last < self._every_s:
            return False
        self._last = time.monotonic()
        return True


def check_logger(name: str) -> None:
    """Refuse a logger whose package is missing, before anything is trained.

    Raises:
        MissingPackageError: tensorboard or wandb is not installed.
    """
    if name != "csv" and find_spec(name) is None:
        raise MissingPackageError.of(name, name, f"--logger {name}")


def make_logger(config: FitConfig, folder: Path, name: str) -> pl.loggers.Logger:
    """Make Lightning's logger for one fit; wandb goes on- or offline by its own variables."""
    from lightning.pytorch import loggers

    if config.logger == "wandb":
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        run_name = f"{config.run_path.name}-{name}"
        return loggers.WandbLogger(
            name=run_name, project=_PROJECT, save_dir=folder / LOGS, config=_plain(config)
        )
    kind = loggers.TensorBoardLogger if config.logger == "tensorboard" else loggers.CSVLogger
    return kind(folder, name=LOGS, version=name)


def close_loggers(used: Iterable[pl.loggers.Logger]) -> None:
    """End wandb's run; the next seed has one of its own."""
    from lightning.pytorch import loggers

    for logger in used:
        if isinstance(logger, loggers.WandbLogger):
            logger.experiment.finish()


def _plain(config: FitConfig) -> Mapping[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
