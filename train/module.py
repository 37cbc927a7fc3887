"""The classifier, and how Lightning trains it.

`Classifier` is plain torch: standardisation, fusion and head, all that a run stores.
`ClassifierModule` trains its fusion and head on features that are already standardised; logits go
into a cross-entropy, which has the only softmax. `KeepBest` is early stopping and checkpoint in
one: the best weights stay in memory, because writing them each epoch costs more than the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmembed.train.fusion import FUSIONS, Cooc
from llmembed.train.heads import HEADS, NATURAL_HEADS

_CHUNK_ROWS = 8192
_MIN_IMPROVEMENT = 1e-3  # nats; less is noise of a small share


class Standardiser(nn.Module):
    """Gives each column mean 0 and standard deviation 1; a constant column becomes 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @classmethod
    def of(cls, x: Tensor, rows: Tensor) -> Self:
        """Take the statistics of some rows of float32 `[N, F]`, summed in float64."""
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        squares = torch.zeros_like(total)
        for chunk in torch.split(rows, _CHUNK_ROWS):
            block = x[chunk].double()
            total += block.sum(dim=0)
            squares += block.square().sum(dim=0)
        mean = total / len(rows)
        scale = (squares / len(rows) - mean.square()).clamp(min=0).sqrt()
        standardiser = cls(x.shape[1])
        standardiser.mean.copy_(mean)
        standardiser.scale.copy_(torch.where(scale > mean.abs() * 1e-6, scale, 1.0))
        return standardiser

    def forward(self, x: Tensor) -> Tensor:
        """Standardise `[B, F]`."""
        return (x - self.mean) / self.scale

    def apply_(self, x: Tensor) -> Tensor:
        """Standardise `[N, F]` in place, to hold a split in memory only once."""
        return x.sub_(self.mean).div_(self.scale)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What fixes the names and shapes of a classifier's weights."""

    fusion: str
    """Name of the fusion."""
    head: str
    """Name of the head, never `auto`."""
    widths: tuple[int, ...]
    """Width of each feature."""
    n_classes: int
    """C, number of classes."""
    dropout: float
    """Share of the fused vector dropped while training."""

    @classmethod
    def of(
        cls, fusion: str, head: str, widths: tuple[int, ...], n_classes: int, dropout: float
    ) -> Self:
        """Resolve `auto` to the natural head of the fusion."""
        chosen = NATURAL_HEADS[fusion] if head == "auto" else head
        return cls(fusion=fusion, head=chosen, widths=widths, n_classes=n_classes, dropout=dropout)


class Classifier(nn.Module):
    """Raw features `[B, F]` in, logits `[B, C]` out."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.standardise = Standardiser(sum(architecture.widths))
        self.fusion = FUSIONS[architecture.fusion](architecture.widths)
        self.head = HEADS[architecture.head](
            self.fusion.fused_width, architecture.n_classes, architecture.dropout
        )

    def logits(self, standardised: Tensor) -> Tensor:
        """Classify standardised features, `[B, F]` -> logits `[B, C]`."""
        logits: Tensor = self.head(self.fusion(standardised))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Classify features as they lie in the cache, `[B, F]` -> logits `[B, C]`."""
        return self.logits(self.standardise(x))


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
        )

    @property
    def saturated(self) -> float | None:
        """Share of saturated co-occurrence entries in the last batch; None for other fusions."""
        fusion = self.classifier.fusion
        return fusion.saturated.item() if isinstance(fusion, Cooc) else None

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
