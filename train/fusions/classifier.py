"""The classifier as a run stores it: standardisation, fusion, head.

Plain torch: neither a prediction nor a solved head waits for Lightning's import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmembed.common.errors import ConfigError
from llmembed.common.process import full_float32
from llmembed.common.registry import loaded
from llmembed.train.fusions import FUSIONS, HEADS
from llmembed.train.fusions.mixing import Concat, Fusion
from llmembed.train.measures import Floats, HeldOutRows, Labels, Sets, decided, find_thresholds

_CHUNK_ROWS = 8192
_CACHED_NUMBERS = 1 << 17


class Standardiser(nn.Module):
    """Gives each column mean 0 and standard deviation 1.

    The scale of a constant column is infinite, so that it is 0 in other rows too: nothing is known
    of what its values mean, and weights that no row has trained would multiply them.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @classmethod
    def of(cls, x: Tensor, rows: Tensor, weights: Tensor | None = None) -> Self:
        """Take the statistics of some rows of float32 `[N, F]`, weighted by `[N]`, in float64."""
        w = torch.ones(len(rows)).double() if weights is None else weights[rows].double()
        w /= w.sum()
        mean = torch.zeros(x.shape[1], dtype=torch.float64)
        squares = torch.zeros_like(mean)
        step = _rows_in_caches(x)
        for chunk, share in zip(torch.split(rows, step), torch.split(w, step), strict=True):
            block = x.index_select(0, chunk).double()
            mean += share @ block
            squares += share @ block.square_()
        scale = (squares - mean.square()).clamp(min=0).sqrt().float()  # 0 if it is less
        standardiser = cls(x.shape[1])
        standardiser.mean.copy_(mean)
        standardiser.scale.copy_(torch.where(scale > mean.abs() * 1e-6, scale, torch.inf))
        return standardiser

    def select(self, columns: Tensor) -> Self:
        """Take the statistics of some columns, int64 `[c]`."""
        chosen = type(self)(len(columns))
        chosen.mean.copy_(self.mean[columns])
        chosen.scale.copy_(self.scale[columns])
        return chosen

    def forward(self, x: Tensor) -> Tensor:
        """Standardise `[B, F]`."""
        return (x - self.mean) / self.scale

    def apply_(self, x: Tensor) -> Tensor:
        """Standardise `[N, F]` in place, to hold a split in memory only once."""
        for chunk in torch.split(x, _rows_in_caches(x)):
            chunk.sub_(self.mean).div_(self.scale)
        return x


def _rows_in_caches(x: Tensor) -> int:
    """Count the rows of `[N, F]` that a core's caches hold, so that passes over them are cheap."""
    return max(1, _CACHED_NUMBERS // x.shape[1])


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What fixes the names and shapes of a classifier's weights."""

    fusion: str
    head: str  # never `auto`
    widths: tuple[int, ...]  # width of each feature
    n_classes: int
    dropout: float  # share of the fused vector dropped while training
    multilabel: bool = False  # whether a text may have several labels


def make_fusion(name: str, widths: Sequence[int]) -> Fusion:
    """Make a fusion of features of these widths.

    Raises:
        ConfigError: there is no such fusion, or it does not take such features.
    """
    check_fusion(name, widths)
    fusion: Fusion = loaded(FUSIONS[name].home)(widths)
    return fusion


def check_fusion(name: str, widths: Sequence[int]) -> None:
    """Refuse a fusion that does not take features of these widths.

    Raises:
        ConfigError: there is no such fusion, or it takes one feature alone, or of one width alone.
    """
    spec = FUSIONS[name]
    if spec.takes_one_feature and len(widths) != 1:
        raise ConfigError(
            f"fusion {name!r} takes one feature and was given {len(widths)}. Choose one with "
            "--layers k (and --source, --pooling where there are several)."
        )
    if spec.needs_equal_widths and len(set(widths)) != 1:
        raise ConfigError(
            f"fusion {name!r} needs features of one width and was given the widths "
            f"{', '.join(map(str, sorted(set(widths))))}. Choose one source with --source, or pass "
            "--fusion concat, cooc or gated, which take several."
        )


class Classifier(nn.Module):
    """Raw features `[B, F]` in, logits `[B, C]` out.

    Attributes:
        architecture: what it was made from.
        temperature: what the logits are divided by; 1 until it is calibrated.
        thresholds: float32 `[C]`, probabilities from which on labels are given; None where each
            text has one.
        base: solved linear classifier whose logits the head adds to; None with most fusions.
    """

    temperature: Tensor
    thresholds: Tensor | None

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.standardise = Standardiser(sum(architecture.widths))
        self.fusion = make_fusion(architecture.fusion, architecture.widths)
        self.head: nn.Module = loaded(HEADS[architecture.head].home)(
            self.fusion.fused_width, architecture.n_classes, architecture.dropout
        )
        self.register_buffer("temperature", torch.tensor(1.0))
        halves = torch.full((architecture.n_classes,), 0.5)
        self.register_buffer("thresholds", halves if architecture.multilabel else None)
        self.base: nn.Linear | None = None
        if FUSIONS[architecture.fusion].completes_base:
            self.base = nn.Linear(sum(architecture.widths), architecture.n_classes)
            self.base.requires_grad_(requires_grad=False)

    def logits(self, standardised: Tensor, base_logits: Tensor | None = None) -> Tensor:
        """Classify standardised features, float32 `[B, F]` -> logits `[B, C]`.

        `base_logits`, float32 `[B, C]`, take the place of what the base says: of rows that it was
        solved for it leaves too little to learn.
        """
        logits: Tensor = self.head(self.fusion(standardised))
        if self.base is not None:
            logits = logits + (self.base(standardised) if base_logits is None else base_logits)
        return logits / self.temperature

    def forward(self, x: Tensor) -> Tensor:
        """Classify features as they lie in the cache, `[B, F]` -> logits `[B, C]`."""
        return self.logits(self.standardise(x))

    def decide_by(
        self,
        proba: Floats,
        sets: Sets,
        n_trained: Labels,
        *,
        threshold: float | None = None,
        weights: Floats | None = None,
    ) -> None:
        """Set from which probability on each of several labels is given.

        Args:
            proba: float64 `[n, C]`, of rows held out.
            sets: `[n, C]`, their labels.
            n_trained: int64 `[C]`, training rows with each label; without one it is never given.
            threshold: that of all labels; None finds one for each by the rows.
            weights: float64 `[n]`, of the rows; None weighs all alike.
        """
        assert self.thresholds is not None
        found = np.full(sets.shape[1], threshold)
        if threshold is None:
            found = find_thresholds(proba, sets, weights)
        self.thresholds.copy_(torch.from_numpy(np.where(n_trained > 0, found, 1.0)))

    def decide(self, log_proba: Floats) -> Sets | None:
        """Give the labels of each text, int8 `[n, C]`; None where it has one, the likeliest."""
        if self.thresholds is None:
            return None
        return decided(np.exp(log_proba), self.thresholds.double().numpy())

    def log_proba(self, logits: Tensor) -> Tensor:
        """Turn logits `[B, C]` into log-probabilities: shares of 1, or each label's own."""
        return logits.log_softmax(dim=1) if self.thresholds is None else F.logsigmoid(logits)

    def proba(self, logits: Tensor) -> Tensor:
        """Turn logits `[B, C]` into probabilities."""
        return logits.softmax(dim=1) if self.thresholds is None else logits.sigmoid()

    @torch.inference_mode()
    def fuse_all(self, standardised: Tensor) -> Tensor:
        """Fuse `[N, F]` -> `[N, K]` in chunks; a fusion that changes nothing copies nothing."""
        if type(self.fusion) is Concat:
            return standardised
        return torch.cat([self.fusion(chunk) for chunk in torch.split(standardised, _CHUNK_ROWS)])

    @full_float32()
    @torch.inference_mode()
    def logits_all(
        self, standardised: Tensor, rows: Tensor | None = None, base_logits: Tensor | None = None
    ) -> Tensor:
        """Classify in chunks all rows of `[N, F]`, or some, int64 `[n]`: float64 `[n, C]`."""
        rows = torch.arange(len(standardised)) if rows is None else rows
        logits = []
        for chunk in torch.split(rows, _CHUNK_ROWS):
            base = None if base_logits is None else base_logits[chunk]
            logits.append(self.logits(standardised[chunk], base).double())
        return torch.cat(logits)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One trained classifier, and how it came about."""

    seed: int
    classifier: Classifier  # with its best weights, on the CPU
    val_loss: float | None  # on rows of the training split that it was not fitted to, if any
    fit_s: float
    device: str
    details: dict[str, Any] = field(default_factory=dict)  # what else the record says of it
    held_out: HeldOutRows | None = (
        None  # what it said of training rows that it had not seen, if any
    )
