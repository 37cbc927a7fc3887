"""How Lightning trains a classifier: its module, its data, its callbacks.

`ClassifierModule` trains fusion and head on features that are already standardised; logits go
into a cross-entropy, which has the only softmax. `KeepBest` is early stopping and checkpoint in
one: the best weights stay in memory, because writing them each epoch costs more than the epoch.

Some forty hooks and contexts that Lightning passes through for a batch cost as much as a third of a
small step. So what it takes for a batch is a pack of several, each of which is a step.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from llmembed.common.progress import Steps
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.fusions.heads import Dropout
from llmembed.train.gradient.workspace import Clock
from llmembed.train.inputs.data import Batch, FeatureBatches, FitData
from llmembed.train.inputs.shares import Rows
from llmembed.train.inputs.weighing import SMALLEST, mean_loss

_SHARE = 0.8  # of the free memory of a GPU that a split may take
MIN_IMPROVEMENT = 1e-3  # nats; less is noise of a small share
VALIDATION_ROWS = 1024  # of a batch, where the steps' are smaller


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Numbers of AdamW and the weights of the loss."""

    lr: float
    """Learning rate."""
    weight_decay: float
    """Weight decay."""
    class_weights: Tensor | None = None
    """float32 `[C]`, weight of each class in the loss."""


class ClassifierModule(pl.LightningModule):
    """Trains a classifier on standardised features.

    Dropout draws from a generator of the module's own, so that a fit comes out the same whatever
    is trained beside it in the process.
    """

    class_weights: Tensor | None

    def __init__(self, classifier: Classifier, optimisation: Optimisation, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.classifier, self.seed = classifier, seed
        self.optimisation = optimisation
        self.register_buffer("class_weights", optimisation.class_weights, persistent=False)
        self.val_loss = math.nan
        self._train_losses: list[Tensor] = []
        self._val_losses: list[Tensor] = []
        self._val_weights: list[Tensor] = []

    def setup(self, stage: str) -> None:
        """Seed the generator, on the device that is trained on."""
        del stage
        self.seed_dropout(self.trainer.strategy.root_device)

    def seed_dropout(self, device: torch.device) -> None:
        """Make the generator, and give it to what draws."""
        self.generator = torch.Generator(device).manual_seed(self.seed)
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generator = self.generator

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the generator."""
        checkpoint["generator"] = self.generator.get_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Draw on from a checkpoint."""
        self.generator.set_state(checkpoint["generator"])

    def training_step(self, pack: Iterable[Batch], batch_idx: int) -> None:
        """Take a step for each batch of a pack.

        Lightning's wrappers of the backward pass and of the optimizer scale the loss in float16;
        where nothing is scaled, a small step takes a tenth less without them.
        """
        del batch_idx
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        backward: Callable[[Tensor], None] = self.manual_backward
        step: Callable[[], Any] = optimizer.step
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            backward, step = Tensor.backward, optimizer.optimizer.step
        for batch in pack:
            loss = self.loss_of(batch)
            optimizer.zero_grad()
            backward(loss)
            step()
            torch.clear_autocast_cache()  # it keeps rounded weights until training_step ends

    def loss_of(self, batch: Batch) -> Tensor:
        """Give the loss of a batch."""
        loss = mean_loss(self._logits(batch), batch[1], self.class_weights, batch[2])
        self._train_losses.append(loss.detach())
        return loss

    def average_train_loss(self) -> float:
        """Average over the steps of an epoch, at its end: a step waits for no figure."""
        average = torch.stack(self._train_losses).mean().item()
        self._train_losses.clear()
        return average

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the loss that is trained on over a batch, on the device."""
        del batch_idx
        x, y, own = batch
        weights = torch.ones_like(y, dtype=torch.float32) if own is None else own
        if self.class_weights is not None:
            weights = weights * self.class_weights[y]
        losses = F.cross_entropy(self.classifier.logits(x), y, reduction="none").detach()
        self._val_losses.append(losses * weights)
        self._val_weights.append(weights)

    def on_validation_epoch_end(self) -> None:
        """Average over examples, not over batches, which may differ in size."""
        weight = torch.cat(self._val_weights).sum().clamp(min=SMALLEST)
        self.val_loss = (torch.cat(self._val_losses).sum() / weight).item()
        self._val_losses.clear()
        self._val_weights.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give AdamW."""
        return torch.optim.AdamW(
            self.classifier.parameters(),
            lr=self.optimisation.lr,
            weight_decay=self.optimisation.weight_decay,
            fused=True,  # a seventh of the step less on a CPU
        )

    @property
    def saturated(self) -> float | None:
        """Share of saturated co-occurrence entries in the last batch; None for other fusions."""
        saturated = self.classifier.fusion.saturated
        return None if saturated is None else saturated.item()

    def _logits(self, batch: Batch) -> Tensor:
        return self.classifier.logits(batch[0])


class KeepBest(pl.Callback):
    """Keeps the weights with the lowest validation loss, and stops when it no longer falls.

    Attributes:
        best_loss: lowest validation loss; infinite where there is none.
        best_epoch: epoch it was reached after; 0 for the first weights.
        last_loss: validation loss of the last epoch.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_loss, self.best_epoch, self.last_loss = math.inf, 0, math.inf
        self._weights: Mapping[str, Any] | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the epoch with the best one so far.

        Lightning calls a callback's `on_validation_epoch_end` before the module's own, so there
        the loss would still be that of the epoch before.
        """
        assert isinstance(pl_module, ClassifierModule)
        epoch = 0 if trainer.sanity_checking else trainer.current_epoch + 1
        self.last_loss = pl_module.val_loss
        if pl_module.val_loss < self.best_loss - MIN_IMPROVEMENT:
            self.best_loss, self.best_epoch = pl_module.val_loss, epoch
            weights = pl_module.classifier.state_dict()
            self._weights = {name: weight.clone() for name, weight in weights.items()}
        elif epoch - self.best_epoch >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint holds."""
        best = {"loss": self.best_loss, "epoch": self.best_epoch}
        return best | {"weights": None if self._weights is None else dict(self._weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint holds."""
        self.best_loss, self.best_epoch = state_dict["loss"], state_dict["epoch"]
        self._weights = state_dict["weights"]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best weights back."""
        del trainer
        assert isinstance(pl_module, ClassifierModule)
        if self._weights is not None:
            pl_module.classifier.load_state_dict(self._weights)


class FeatureDataModule(pl.LightningDataModule):
    """The training and validation shares, moved to the trainer's device once if they fit there.

    What does not fit stays where it is, and each batch is moved.
    """

    def __init__(self, data: FitData, batch_size: int, seed: int, steps_of_pack: int) -> None:
        super().__init__()
        self.data, self.batch_size, self.steps_of_pack = data, batch_size, steps_of_pack
        self._order = torch.Generator().manual_seed(seed)
        self._held: tuple[Tensor, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Give the state of what shuffles."""
        return {"order": self._order.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Shuffle on from a checkpoint."""
        self._order.set_state(state_dict["order"])

    def train_dataloader(self) -> Packs:
        """Give packs of shuffled batches of the training share."""
        batches = self._batches(self.data.shares.train, self.batch_size, self._order)
        return Packs(batches, self.steps_of_pack)

    def val_dataloader(self) -> FeatureBatches | list[Batch]:
        """Give batches of the validation share; none where it is empty."""
        rows = self.data.shares.validation
        if not len(rows):
            return []
        return self._batches(rows, max(self.batch_size, VALIDATION_ROWS), None)

    def _batches(
        self, rows: Rows, batch_size: int, generator: torch.Generator | None
    ) -> FeatureBatches:
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        if self._held is None:  # once for both shares
            x, y = self.data.x, self.data.y
            fits = device.type != "cuda" or x.nbytes < _SHARE * torch.cuda.mem_get_info(device)[0]
            self._held = (x.to(device), y.to(device)) if fits else (x, y)
        x, y = self._held
        chosen = torch.from_numpy(rows).to(x.device)
        own = self.data.sample_weights
        weights = None if own is None else own.to(x.device)
        return FeatureBatches(x, y, chosen, batch_size, generator, device, weights)


class Packs:
    """Batches in packs, each made when its turn comes.

    >>> [len(list(pack)) for pack in Packs([(torch.ones(1), torch.ones(1))] * 5, 2)]
    [2, 2, 1]
    """

    def __init__(self, batches: FeatureBatches | list[Batch], size: int) -> None:
        self.batches, self.size = batches, size

    def __len__(self) -> int:
        """Count the packs of a pass."""
        return math.ceil(len(self.batches) / self.size)

    def __iter__(self) -> Iterator[Iterable[Batch]]:
        """Yield packs; each must be used up before the next."""
        batches = iter(self.batches)
        for _ in range(len(self)):
            yield itertools.islice(batches, self.size)


class EpochProgress(pl.Callback):
    """Shows on stderr how many epochs are done, with the validation loss."""

    def __init__(self, n_epochs: int, seed: int) -> None:
        self.steps = Steps(n_epochs, "epochs", name=f"seed {seed}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin where a checkpoint ends."""
        del pl_module
        self.steps.start(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count an epoch."""
        del trainer
        assert isinstance(pl_module, ClassifierModule)
        self.steps.count(1, f"validation loss {pl_module.val_loss:.4f}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the last state."""
        del trainer, pl_module
        self.steps.close()


class EpochLog(pl.Callback):
    """Gives the logger the losses of each epoch, those before a resumption included."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint holds."""
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint holds."""
        self._rows = list(state_dict["rows"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat the epochs of an earlier process."""
        del pl_module
        for epoch, row in enumerate(self._rows, start=1):
            _log(trainer, row, epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log an epoch."""
        assert isinstance(pl_module, ClassifierModule)
        row = {"train_loss": pl_module.average_train_loss()}
        if math.isfinite(pl_module.val_loss):
            row["val_loss"] = pl_module.val_loss
        self._rows.append(row)
        _log(trainer, row, trainer.current_epoch + 1)


class SaveCheckpoint(pl.Callback):
    """Saves the state after an epoch, every so many seconds, in place of the one before."""

    def __init__(self, path: Path, every_s: float) -> None:
        self.path, self._clock = path, Clock(every_s)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where it is time; what has come to its end is not saved, for it ends again."""
        del pl_module
        if trainer.should_stop or not self._clock.is_due():
            return
        partial = self.path.with_suffix(f".{os.getpid()}.tmp")
        # A fit of the same run in another process may end now, and clear the folder.
        with contextlib.suppress(FileNotFoundError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(partial)
            partial.replace(self.path)


def _log(trainer: pl.Trainer, row: dict[str, float], epoch: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(row, step=epoch)
