"""Fusions: how several features of an example become one vector.

Every fusion takes standardised features side by side, float32 `[B, F]`, and gives float32
`[B, K]`. It knows the width of each feature, so features of several sources may differ in width
where the operator allows it (concat, cooc and gated).

Mean, max, concat and cooc are those of Liu et al., "LLMEmbed: Rethinking Lightweight LLM's
Genuine Function in Text Classification" (ACL 2024). `Cooc` keeps their idea, the power-normalised
Gram matrix of compressed features, and differs on purpose: see its docstring.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmembed.cache_format.errors import ConfigError

SATURATED = 0.99  # a power-normalised entry beyond this no longer tells examples apart


class Fusion(nn.Module):
    """Features side by side in, one vector out.

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


class Single(Concat):
    """The one feature that is chosen: K = H."""

    def __init__(self, widths: Sequence[int]) -> None:
        if len(widths) != 1:
            raise ConfigError(
                f"fusion 'single' takes one feature and was given {len(widths)}. Choose one with "
                "--layers k (and --source, --pooling where there are several)."
            )
        super().__init__(widths)


class Mean(Fusion):
    """Mean over the features, element by element: K = H."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.fused_width = _one_width(widths, "mean")
        self.n_features = len(widths)

    def forward(self, x: Tensor) -> Tensor:
        """Average, `[B, n * H]` -> `[B, H]`."""
        return torch.unflatten(x, 1, (self.n_features, self.fused_width)).mean(dim=1)


class Max(Fusion):
    """Maximum over the features, element by element: K = H."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.fused_width = _one_width(widths, "max")
        self.n_features = len(widths)

    def forward(self, x: Tensor) -> Tensor:
        """Take the maximum, `[B, n * H]` -> `[B, H]`."""
        return torch.unflatten(x, 1, (self.n_features, self.fused_width)).amax(dim=1)


class ScalarMix(Fusion):
    """Learned weighted mean over the features: `gamma sum_i softmax(s)_i x_i`, K = H.

    Peters et al., "Deep Contextualized Word Representations" (2018), equation 1.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.fused_width = _one_width(widths, "scalar-mix")
        self.scores = nn.Parameter(torch.zeros(len(widths)))
        self.gamma = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Mix, `[B, n * H]` -> `[B, H]`."""
        features = torch.unflatten(x, 1, (-1, self.fused_width))
        return self.gamma * torch.einsum("n,bnh->bh", self.scores.softmax(dim=0), features)


class Attention(Fusion):
    """Weighted mean whose weights depend on the example: K = H.

    `u_i = tanh(W x_i + b_i)`, `a = softmax_i(u_i . q)`, `sum_i a_i x_i`, after Yang et al.,
    "Hierarchical Attention Networks for Document Classification" (2016), equations 5 to 7; the
    bias b_i tells the features apart.
    """

    def __init__(self, widths: Sequence[int], key_width: int = 64) -> None:
        super().__init__()
        self.fused_width = _one_width(widths, "attention")
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


class Cooc(Fusion):
    """Co-occurrence pooling: how alike the features are, in several learned views of them.

    Each of the n features is compressed to `phi_i = relu(W_i x_i + b_i)`, cut into G groups of
    equal width and scaled to length 1 there. Each group gives a Gram matrix `M = Phi Phi^T`
    `[n, n]`, power-normalised as in the paper, `PN(M) = 2 sigmoid(sigma M) - 1 =
    tanh(sigma M / 2)`. The fused vector is the upper triangle of all G matrices, then the
    features themselves: K = G n (n + 1) / 2 + F.

    The paper (`llmembed.train.paper`) has one group (n^2 numbers in all), raw scales and a fixed
    sigma, with which PN saturates at 1 for every example; here the entries are cosines, sigma is
    learned, and the saturated share is measured. It puts the mean of the features beside the Gram
    matrix, where all of them tell more.
    """

    def __init__(self, widths: Sequence[int], n_groups: int = 32, group_width: int = 8) -> None:
        super().__init__()
        self.widths, self.n_groups = list(widths), n_groups
        compressed = n_groups * group_width
        self.compress = nn.ModuleList(nn.Linear(width, compressed) for width in widths)
        self.sigma = nn.Parameter(torch.tensor(2.0))
        n_entries = len(widths) * (len(widths) + 1) // 2
        self.fused_width = n_groups * n_entries + sum(widths)
        self.saturated = torch.tensor(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Fuse, `[B, F]` -> `[B, K]`."""
        parts = torch.split(x, self.widths, dim=1)
        phi = [F.relu(layer(part)) for layer, part in zip(self.compress, parts, strict=True)]
        grouped = torch.unflatten(torch.stack(phi, dim=1), 2, (self.n_groups, -1))
        unit = F.normalize(grouped, dim=3)  # [B, n, G, k]
        row, column = torch.triu_indices(len(phi), len(phi), device=x.device)
        # A product of pairs, not of matrices: they are n x k, and n is 3 to 8.
        gram = (unit.index_select(1, row) * unit.index_select(1, column)).sum(dim=3)  # [B, P, G]
        entries = power_normalise(gram, self.sigma)
        self.saturated = (entries.detach().abs() > SATURATED).float().mean()
        return torch.cat([entries.flatten(1), x], dim=1)


def power_normalise(gram: Tensor, sigma: Tensor | float) -> Tensor:
    """Give `2 sigmoid(sigma M) - 1`, which lies in (-1, 1) and keeps the sign.

    >>> power_normalise(torch.tensor([0.0, 1e9]), 1.0).tolist()
    [0.0, 1.0]
    """
    return torch.tanh(gram * sigma / 2)


FUSIONS: dict[str, type[Concat | Mean | Max | ScalarMix | Attention | Gated | Cooc]] = {
    "mean": Mean,
    "max": Max,
    "concat": Concat,
    "cooc": Cooc,
    "scalar-mix": ScalarMix,
    "attention": Attention,
    "gated": Gated,
    "single": Single,
}


def _one_width(widths: Sequence[int], fusion: str) -> int:
    distinct = sorted(set(widths))
    if len(distinct) != 1:
        raise ConfigError(
            f"fusion {fusion!r} needs features of one width and was given the widths "
            f"{', '.join(map(str, distinct))}. Choose one source with --source, or pass "
            "--fusion concat, cooc or gated, which take several."
        )
    return distinct[0]
