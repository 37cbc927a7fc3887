"""Fusions without weights, and what every fusion is.

A fusion takes standardised features side by side, float32 `[B, F]`, and gives float32 `[B, K]`. It
is made from the width of each feature, so that features of several sources may differ in width
where it allows that.

Mean, max, concat and cooc are those of Liu et al., "LLMEmbed: Rethinking Lightweight LLM's
Genuine Function in Text Classification" (ACL 2024). `Cooc` keeps their idea, the power-normalised
Gram matrix of compressed features, and differs on purpose: see its docstring.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """Features side by side in, one vector out.

    It is made from the widths of the features, a sequence of whole numbers.

    Attributes:
        fused_width: K, width of the fused vector.
        saturated: share of the co-occurrence entries of the last batch beyond 0.99; None where
            there are none.
    """

    fused_width: int
    saturated: Tensor | None = None


class Concat(Fusion):
    """All features side by side: K = F."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.fused_width = sum(widths)

    def forward(self, x: Tensor) -> Tensor:
        """Give `x` itself, `[B, F]`."""
        return x


class Mean(Fusion):
    """Mean over the features, element by element: K = H."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.n_features, self.fused_width = len(widths), widths[0]

    def forward(self, x: Tensor) -> Tensor:
        """Average, `[B, n * H]` -> `[B, H]`."""
        return torch.unflatten(x, 1, (self.n_features, self.fused_width)).mean(dim=1)


class Max(Mean):
    """Maximum over the features, element by element: K = H."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the maximum, `[B, n * H]` -> `[B, H]`."""
        return torch.unflatten(x, 1, (self.n_features, self.fused_width)).amax(dim=1)
