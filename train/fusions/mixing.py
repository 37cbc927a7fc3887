"""What every fusion is, and those that take features with fixed or learned shares.

Mean, max and concat are those of Liu et al., "LLMEmbed: Rethinking Lightweight LLM's Genuine
Function in Text Classification" (ACL 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """Standardised features side by side in, float32 `[B, F]`; one vector out, float32 `[B, K]`.

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
        self.fused_width = widths[0]

    def forward(self, x: Tensor) -> Tensor:
        """Average, `[B, n * H]` -> `[B, H]`."""
        return torch.unflatten(x, 1, (-1, self.fused_width)).mean(dim=1)


class Max(Mean):
    """Maximum over the features, element by element: K = H."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the maximum, `[B, n * H]` -> `[B, H]`."""
        return torch.unflatten(x, 1, (-1, self.fused_width)).amax(dim=1)


class ScalarMix(Fusion):
    """Learned weighted mean over the features: `gamma sum_i softmax(s)_i x_i`, K = H.

    Peters et al., "Deep Contextualized Word Representations" (2018), equation 1.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.fused_width = widths[0]
        self.scores = nn.Parameter(torch.zeros(len(widths)))
        self.gamma = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Mix, `[B, n * H]` -> `[B, H]`."""
        features = torch.unflatten(x, 1, (-1, self.fused_width))
        return self.gamma * torch.einsum("n,bnh->bh", self.scores.softmax(dim=0), features)


class Attention(Fusion):
    """Weighted mean whose weights depend on the example: K = H.

    `u_i = tanh(W x_i + b_i)`, `a = softmax_i(u_i . q)`, `sum_i a_i x_i`, after Yang et al.,
    "Hierarchical Attention Networks for Document Classification" (2016), equations 5 to 7.
    """

    def __init__(self, widths: Sequence[int], key_width: int = 64) -> None:
        super().__init__()
        self.fused_width = widths[0]
        self.key = nn.Linear(self.fused_width, key_width, bias=False)
        self.bias = nn.Parameter(torch.zeros(len(widths), key_width))
        self.query = nn.Parameter(torch.zeros(key_width))  # from equal weights on

    def forward(self, x: Tensor) -> Tensor:
        """Attend, `[B, n * H]` -> `[B, H]`."""
        features = torch.unflatten(x, 1, (-1, self.fused_width))
        scores = torch.tanh(self.key(features) + self.bias) @ self.query  # [B, n]
        return torch.einsum("bn,bnh->bh", scores.softmax(dim=1), features)


class Gated(Fusion):
    """Sum of views, each let through as far as all features together say.

    `h_i = tanh(W_i x_i)`, `z_i = sigmoid(V_i x)`, `sum_i z_i * h_i`: the gated multimodal unit of
    Arevalo et al., "Gated Multimodal Units for Information Fusion" (2017), equation 2.
    """

    def __init__(self, widths: Sequence[int], view_width: int = 256) -> None:
        super().__init__()
        self.widths, self.fused_width = list(widths), view_width
        self.views = nn.ModuleList(nn.Linear(width, view_width) for width in widths)
        self.gates = nn.Linear(sum(widths), len(widths) * view_width)

    def forward(self, x: Tensor) -> Tensor:
        """Fuse, `[B, F]` -> `[B, K]`."""
        parts = torch.split(x, self.widths, dim=1)
        views = torch.stack([view(part) for view, part in zip(self.views, parts, strict=True)], 1)
        gates = self.gates(x).reshape(views.shape)  # [B, n, K]
        return (torch.sigmoid(gates) * torch.tanh(views)).sum(dim=1)
