"""What Lightning trains, and the callbacks that its own lack."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from llmembed.common.progress import Steps
from llmembed.common.replace import replacing
from llmembed.train.config import Training
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.gradient.workspace import CHECKPOINT
from llmembed.train.inputs import Batch
from llmembed.train.inputs.weighing import SMALLEST, mean_loss, weights_of

LOSS = "val_loss"
MIN_IMPROVEMENT = 1e-3  # nats a text; less is noise of a small share


class ClassifierModule(pl.LightningModule):
    """Trains fusion and head on features that are already standardised.

    Logits go into a cross-entropy, which has the only softmax. The order of the batches and dropout
    have a seed an epoch, so that a fit that goes on from a checkpoint draws what it would have.
    """

    class_weights: Tensor

    def __init__(
        self, classifier: Classifier, numbers: Training, class_weights: Tensor, seed: int
    ) -> None:
        super().__init__()
        self.classifier, self.numbers, self.seed = classifier, numbers, seed
        self.register_buffer("class_weights", class_weights, persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Give the loss of a batch."""
        if batch_idx == 0:  # of a resumed epoch Lightning leaves on_train_epoch_start out
            self.seed_dropout(self.current_epoch)
        loss = self.loss_of(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, logger=False)
        return loss

    def seed_dropout(self, epoch: int) -> None:
        """Seed what dropout draws from."""
        seed_draws(epoch_seed(self.seed, epoch) + 1, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss that is trained on, averaged over rows by their weights."""
        weights = weights_of(batch.y, slice(None), self.class_weights, batch.weights)
        total = cast("int", weights.sum().clamp(min=SMALLEST))  # Lightning multiplies by any number
        self.log(LOSS, self.loss_of(batch), prog_bar=True, logger=False, batch_size=total)

    def loss_of(self, batch: Batch) -> Tensor:
        """Give the loss of a batch."""
        logits = self.classifier.logits(batch.x, batch.base_logits)
        return mean_loss(logits, batch.y, self.class_weights, batch.weights)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give AdamW; fused takes a seventh of a step less on a CPU."""
        numbers = self.numbers
        return torch.optim.AdamW(
            self.classifier.parameters(),
            lr=numbers.lr,
            weight_decay=numbers.weight_decay,
            fused=True,
        )


def epoch_seed(seed: int, epoch: int) -> int:
    """Give the seed of an epoch: of the order of its batches, and one more of its dropout."""
    return (seed << 24) + 2 * epoch


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed what the CPU and this device draw; torch's own function seeds every GPU there is."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class Epochs(pl.Callback):
    """Keeps the best weights, the first ones included, and gives loggers a row an epoch.

    The weights stay in memory: the folder of Lightning's own best checkpoint may be cleared by
    another fit of the same run that ends, and writing it takes longer than an epoch of a small fit.
    Loggers are given the rows before a resumption anew, which that of csv would lose.

    Attributes:
        loss: lowest validation loss; infinite where there is none.
        best: epoch it was reached after; 0 for the first weights.
        last_loss: validation loss of the last epoch.
    """

    _KEPT = ("loss", "best", "_weights", "_rows")

    def __init__(self, min_improvement: float = MIN_IMPROVEMENT) -> None:
        self.loss, self.best, self.last_loss = math.inf, 0, math.inf
        self._min_improvement = min_improvement
        self._weights: Mapping[str, Tensor] | None = None
        self._rows: list[dict[str, float]] = []

    @property
    def losses(self) -> dict[str, list[float | None]]:
        """What was logged, an epoch after the other, by its name; None where it was not finite."""
        names = self._rows[0] if self._rows else ()
        found = {name: [row.get(name, math.nan) for row in self._rows] for name in names}
        return {
            name: [one if math.isfinite(one) else None for one in own]
            for name, own in found.items()
        }

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the epoch with the best one so far."""
        self.last_loss = trainer.callback_metrics[LOSS].item()
        if self.last_loss < self.loss - self._min_improvement:
            self.loss = self.last_loss
            self.best = 0 if trainer.sanity_checking else trainer.current_epoch + 1
            weights = pl_module.state_dict()
            self._weights = {name: weight.clone() for name, weight in weights.items()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat the rows of an earlier process; after its last epoch no training would start."""
        for epoch, row in enumerate(self._rows, start=1):
            _log(trainer, row, epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log an epoch."""
        self._rows.append({name: loss.item() for name, loss in trainer.callback_metrics.items()})
        _log(trainer, self._rows[-1], trainer.current_epoch + 1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best weights back."""
        if self._weights is not None:
            pl_module.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint holds."""
        return {name: getattr(self, name) for name in self._KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint holds."""
        for name in self._KEPT:
            setattr(self, name, state_dict[name])


class LogLines(pl.Callback):
    """Tells in a log how many epochs are done, where Lightning's bar has no place."""

    def __init__(self, n_epochs: int, seed: int) -> None:
        self._steps = Steps(n_epochs, "epochs", name=f"seed {seed}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin where a checkpoint ends."""
        self._steps.start(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count an epoch."""
        loss = trainer.callback_metrics.get(LOSS)
        self._steps.count(1, "" if loss is None else f"validation loss {loss:.4f}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the last state."""
        self._steps.close()


class SaveLast(ModelCheckpoint):
    """Saves after an epoch, every so many seconds; an end is not saved, for it would end again."""

    def __init__(self, folder: Path, every_s: float) -> None:
        super().__init__(folder, Path(CHECKPOINT).stem, enable_version_counter=False)
        self._every_s, self._saved_at = every_s, time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where it is time."""
        if not trainer.should_stop and time.monotonic() - self._saved_at >= self._every_s:
            super().on_train_epoch_end(trainer, pl_module)
            self._saved_at = time.monotonic()


class AtomicFiles(TorchCheckpointIO):
    """Puts a checkpoint in its place whole; Lightning's way copies where /tmp is another disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save, unless a fit of the same run in another process ends now, and clears the folder."""
        path = Path(path)
        with contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()  # of a file that cannot be written, torch's writer tells nothing
            torch.save(checkpoint, content)
            with replacing(path) as partial:
                partial.write_bytes(content.getbuffer())


def _log(trainer: pl.Trainer, row: dict[str, float], epoch: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(row, step=epoch)
