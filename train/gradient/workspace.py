"""What a fit keeps beside its run until that is written: a lock, by gradient checkpoints and logs.

    runs/.sst2-cooc-0.partial/
      .llmembed/lock          who makes the run, as `llmembed.cache_format.writing.lock` says
      <hash>/last.ckpt        the state after an epoch, a few seconds old at most
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
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llmembed.cache_format.stores import open_store
from llmembed.cache_format.writing import WriterLock
from llmembed.common.errors import (
    CacheError,
    CacheLockedError,
    LLMEmbedError,
    MissingPackageError,
    RunFormatError,
    RunLockedError,
    RunStorageError,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from llmembed.train.config import Plan
    from llmembed.train.inputs import FitData

LOGS, CHECKPOINT = "logs", "last.ckpt"
_PROJECT = "llmembed"
_NO_MATTER = ("cache", "memory_gb", "address")
_PACKAGES = ("llmembed-cache", "torch", "lightning")


@contextlib.contextmanager
def open_workspace(run_path: Path) -> Iterator[Path]:
    """Give the folder beside a run; it stays after an interruption or a fault of the disk alone.

    Raises:
        RunLockedError: another fit is making a run there.
        RunStorageError: the disk failed or refused.
    """
    folder = run_path.with_name(f".{run_path.name}.partial")
    missing = [parent for parent in folder.parents if not parent.exists()]
    with _alone(run_path, folder):
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
                f"the disk failed or refused while {run_path} was made: {error}. Make room or "
                "check the permissions, and run the same command again; an earlier run there is "
                "kept."
            ) from error
        with contextlib.suppress(OSError):  # that are not ignored; the run is there
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone(run_path: Path, folder: Path) -> Iterator[None]:
    """Lock out other fits to the same place, whose logs, checkpoints and run would be mixed."""
    try:
        lock = WriterLock(open_store(folder))
    except CacheLockedError as error:
        raise RunLockedError(f"another fit is making the run {run_path}: {error}") from error
    except CacheError as error:
        raise RunStorageError(f"{run_path} cannot be written: {error}") from error
    with lock:
        yield


def checkpoint_folder(plan: Plan, data: FitData, seed: int, sigma: float | None) -> str:
    """Hash all that the result of a fit depends on."""
    rows = hashlib.sha256(data.shares.train.tobytes() + data.shares.validation.tobytes())
    rows.update(data.class_weights().numpy().tobytes())
    if data.sample_weights is not None:
        rows.update(data.sample_weights.numpy().tobytes())
    method = dataclasses.asdict(plan.method)
    identity = {
        "method": {name: value for name, value in method.items() if name not in _NO_MATTER},
        "seeds": [seed, sigma],
        "numbers": dataclasses.asdict(plan.training),
        "trainer": dataclasses.asdict(plan.trainer),
        "fingerprint": data.fingerprint,
        "features": data.features,
        "rows": rows.hexdigest(),
        "versions": {package: version(package) for package in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def find_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint that a fit goes on from.

    Raises:
        RunFormatError: it is damaged, or holds more than tensors and plain values.
    """
    import torch

    path = folder / CHECKPOINT
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except FileNotFoundError:
        return None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise RunFormatError(
            f"the checkpoint {path} is damaged or was not written by llmembed-fit "
            f"({type(error).__name__}). Remove it, and the fit starts anew."
        ) from error
    return path


def check_logger(name: str) -> None:
    """Refuse a logger whose package is missing, before anything is trained.

    Raises:
        MissingPackageError: tensorboard or wandb is not installed.
    """
    if name != "csv" and find_spec(name) is None:
        raise MissingPackageError.of(name, name, f"--logger {name}")


def make_logger(plan: Plan, folder: Path, name: str) -> pl.loggers.Logger:
    """Make Lightning's logger for one fit; wandb goes on- or offline by its own variables."""
    from lightning.pytorch import loggers

    if plan.logger == "wandb":
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        return loggers.WandbLogger(
            name=f"{plan.name}-{name}",
            project=_PROJECT,
            save_dir=folder / LOGS,
            config=dataclasses.asdict(plan),
        )
    kind = loggers.TensorBoardLogger if plan.logger == "tensorboard" else loggers.CSVLogger
    return kind(folder, name=LOGS, version=name)
