"""Heads: a fused vector in, one logit a class out. Never a softmax: the loss has its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """Zeroes a share of the entries while training, and scales the rest up.

    torch's own took a third of a training step on a CPU: it draws a Bernoulli number an entry.
    Here one 64-bit number serves eight entries, so the share is rounded to a multiple of 1/256.

    Attributes:
        generator: what draws; torch's own until the fit gives one.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.threshold = round(share * 256)
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries of any shape."""
        if not self.training or self.threshold == 0:
            return x
        numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        drawn = (
            numbers.random_(-(2**63), None, generator=self.generator)
            .view(torch.uint8)[: x.numel()]
            .view(x.shape)
        )
        return x * ((drawn >= self.threshold) * (256 / (256 - self.threshold)))


class LinearHead(nn.Module):
    """Dropout and one linear map, from zero: what no gradient has touched adds no noise."""

    def __init__(self, fused_width: int, n_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.logits = nn.Linear(fused_width, n_classes)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, fused: Tensor) -> Tensor:
        """Classify, `[B, K]` -> logits `[B, C]`."""
        logits: Tensor = self.logits(self.dropout(fused))
        return logits


class MLPHead(nn.Module):
    """One hidden layer with ReLU, dropout before and after it."""

    def __init__(
        self, fused_width: int, n_classes: int, dropout: float, hidden_width: int = 256
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Dropout(dropout),
            nn.Linear(fused_width, hidden_width),
            nn.ReLU(),
            Dropout(dropout),
            nn.Linear(hidden_width, n_classes),
        )

    def forward(self, fused: Tensor) -> Tensor:
        """Classify, `[B, K]` -> logits `[B, C]`."""
        logits: Tensor = self.layers(fused)
        return logits


HEADS: dict[str, type[LinearHead | MLPHead]] = {
    "linear": LinearHead,
    "mlp": MLPHead,
    "ridge": LinearHead,
    "lda": LinearHead,
}
