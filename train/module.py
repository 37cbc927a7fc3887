"""How Lightning trains a classifier: its module, its data, its callbacks.

`ClassifierModule` trains fusion and head on features that are already standardised; logits go
into a cross-entropy, which has the only softmax. `KeepBest` is early stopping and checkpoint in
one: the best weights stay in memory, because writing them each epoch costs more than the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llmembed.train.classifier import Classifier
from llmembed.train.data import Batch, FeatureBatches, FitData
from llmembed.train.shares import Rows

_MIN_IMPROVEMENT = 1e-3  # nats; less is noise of a small share


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
    """Trains a classifier on standardised features."""

    class_weights: Tensor | None

    def __init__(self, classifier: Classifier, optimisation: Optimisation) -> None:
        super().__init__()
        self.classifier = classifier
        self.optimisation = optimisation
        self.register_buffer("class_weights", optimisation.class_weights, persistent=False)
        self.val_loss = math.nan
        self._val_losses: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Give the loss of a batch."""
        del batch_idx
        return F.cross_entropy(self._logits(batch), batch[1], weight=self.class_weights)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add up the unweighted loss of a batch, on the device."""
        del batch_idx
        losses = F.cross_entropy(self._logits(batch), batch[1], reduction="none")
        self._val_losses.append(losses.detach())

    def on_validation_epoch_end(self) -> None:
        """Average over examples, not over batches, which may differ in size."""
        self.val_loss = torch.cat(self._val_losses).mean().item()
        self._val_losses.clear()

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

    def _logits(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.classifier.logits(batch[0])


class KeepBest(pl.Callback):
    """Keeps the weights with the lowest validation loss, and stops when it no longer falls.

    Attributes:
        best_loss: lowest validation loss; infinite where there is none.
        best_epoch: epoch it was reached after, from 1.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_loss, self.best_epoch = math.inf, 0
        self._weights: Mapping[str, Any] | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the epoch with the best one so far.

        Lightning calls a callback's `on_validation_epoch_end` before the module's own, so there
        the loss would still be that of the epoch before.
        """
        assert isinstance(pl_module, ClassifierModule)
        epoch = trainer.current_epoch + 1
        if pl_module.val_loss < self.best_loss - _MIN_IMPROVEMENT:
            self.best_loss, self.best_epoch = pl_module.val_loss, epoch
            weights = pl_module.classifier.state_dict()
            self._weights = {name: weight.clone() for name, weight in weights.items()}
        elif epoch - self.best_epoch >= self.patience:
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best weights back."""
        del trainer
        assert isinstance(pl_module, ClassifierModule)
        if self._weights is not None:
            pl_module.classifier.load_state_dict(self._weights)


class FeatureDataModule(pl.LightningDataModule):
    """The training and validation shares, moved to the trainer's device once."""

    def __init__(self, data: FitData, batch_size: int, seed: int) -> None:
        super().__init__()
        self.data, self.batch_size, self.seed = data, batch_size, seed

    def train_dataloader(self) -> FeatureBatches:
        """Give shuffled batches of the training share."""
        generator = torch.Generator().manual_seed(self.seed)
        return self._batches(self.data.shares.train, generator)

    def val_dataloader(self) -> FeatureBatches | list[Batch]:
        """Give batches of the validation share; none where it is empty."""
        rows = self.data.shares.validation
        return self._batches(rows, None) if len(rows) else []

    def _batches(self, rows: Rows, generator: torch.Generator | None) -> FeatureBatches:
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        x, y = self.data.x.to(device), self.data.y.to(device)
        chosen = torch.from_numpy(rows).to(device)
        return FeatureBatches(x, y, chosen, self.batch_size, generator)


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
