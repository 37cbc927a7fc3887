"""Heads: a fused vector in, one logit a class out. Never a softmax: the loss has its own."""

from __future__ import annotations

from torch import Tensor, nn

from llmembed.train.fusions.tricks import Dropout


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
