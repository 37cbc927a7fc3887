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
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmembed.common.errors import ConfigError

_MAX_GROUPS, _MAX_ENTRIES = 32, 4096  # of cooc
_SMALLEST_SQUARE = 1e-24
SATURATED = 0.99  # a power-normalised entry beyond this no longer tells examples apart


class Fusion(nn.Module):
    """Features side by side in, one vector out.

    Attributes:
        fused_width: K, width of the fused vector.
        saturated: share of the co-occurrence entries of the last batch beyond 0.99; None where
            there are none.
        completes_a_base: whether the head adds to the logits of a solved linear classifier on the
            features, instead of making them.
    """

    fused_width: int
    saturated: Tensor | None = None
    completes_a_base: ClassVar[bool] = False


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
    tanh(sigma M / 2)`. The fused vector is the upper triangle of all G matrices, K = G n (n + 1)
    / 2; G is at most 32, and less where there are many features.

    The paper (`llmembed.train.fusions.paper`) has one group (n^2 numbers in all), raw scales and a
    fixed sigma, with which PN saturates at 1 for every example; here the entries are cosines, sigma
    is learned, and the saturated share is measured. The paper puts the mean of the features beside
    the Gram matrix; here a linear classifier on all of them, solved to its optimum, stands beside
    it, and the co-occurrences learn what it leaves (`Classifier.base`).
    """

    completes_a_base = True

    def __init__(self, widths: Sequence[int], group_width: int = 8) -> None:
        super().__init__()
        self.widths = list(widths)
        n_entries = len(widths) * (len(widths) + 1) // 2
        self.n_groups = max(1, min(_MAX_GROUPS, _MAX_ENTRIES // n_entries))
        compressed = self.n_groups * group_width
        self.compress = nn.ModuleList(nn.Linear(width, compressed) for width in widths)
        self.sigma = nn.Parameter(torch.tensor(2.0))
        self.fused_width = self.n_groups * n_entries
        self.saturated = torch.tensor(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Fuse, `[B, F]` -> `[B, K]`."""
        parts = torch.split(x, self.widths, dim=1)
        phi = [F.relu(layer(part)) for layer, part in zip(self.compress, parts, strict=True)]
        grouped = torch.unflatten(torch.stack(phi, dim=1), 2, (self.n_groups, -1))
        entries = self.entries(grouped)
        self.saturated = (entries.detach().abs() > SATURATED).float().mean()
        return entries.flatten(1)

    def entries(self, phi: Tensor) -> Tensor:
        """Compare features `[B, n, G, k]`: the upper triangles, `[B, P, G]`."""
        return power_normalise(_cosines(phi), self.sigma)


class CoocCosine(Cooc):
    """Co-occurrence pooling with the cosines as they are, `M` in place of `PN(M)`."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(widths)
        del self.sigma

    def entries(self, phi: Tensor) -> Tensor:
        """Compare features `[B, n, G, k]`: the upper triangles, `[B, P, G]`."""
        return _cosines(phi)


class CoocSqrt(CoocCosine):
    """Co-occurrence pooling with the matrix square root of M in place of PN(M).

    By the coupled Newton-Schulz iteration on M / tr(M), as in Li et al., "Towards Faster Training
    of Global Covariance Pooling Networks by Iterative Matrix Square Root Normalization" (2018),
    equations 4 to 6.
    """

    def entries(self, phi: Tensor) -> Tensor:
        """Compare features `[B, n, G, k]`: the upper triangles, `[B, P, G]`."""
        groups = F.normalize(phi, dim=3).transpose(1, 2)  # [B, G, n, k]
        root = matrix_sqrt(groups @ groups.transpose(2, 3))
        row, column = torch.triu_indices(root.shape[2], root.shape[2], device=root.device)
        return root[:, :, row, column].transpose(1, 2)


def matrix_sqrt(gram: Tensor, n_steps: int = 7) -> Tensor:
    """Approximate the square roots of positive semidefinite matrices `[..., n, n]`.

    >>> matrix_sqrt(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).round(decimals=3).tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None].clamp(min=1e-6)
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    root, inverse = gram / trace, identity
    for _ in range(n_steps):
        step = (3 * identity - inverse @ root) / 2
        root, inverse = root @ step, step @ inverse
    return root * trace.sqrt()


def _cosines(phi: Tensor) -> Tensor:
    """Compare all pairs of features, `[B, n, G, k]` -> `[B, P, G]`; a zero vector is like none."""
    dots: Tensor = _PairDots.apply(phi.float())  # type: ignore[no-untyped-call]
    n = phi.shape[1]
    row, column = torch.triu_indices(n, n, device=phi.device)
    own = torch.arange(n, device=phi.device)
    squares = dots.index_select(1, own * (2 * n + 1 - own) // 2)  # where row == column
    inverse = squares.clamp(min=_SMALLEST_SQUARE).rsqrt()
    return dots * inverse.index_select(1, row) * inverse.index_select(1, column)


class _PairDots(torch.autograd.Function):
    """Dot products of all pairs of features, `[B, n, G, k]` -> `[B, P, G]`.

    Matrices are n x k with n of 3 to 8, too small for batched products. Each feature is multiplied
    with those from itself on, without the copies that indexed pairs and their gradients need: for
    four features in two thirds of their time, for seven in half of it.
    """

    @staticmethod
    def forward(ctx: Any, phi: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(phi)
        return torch.cat([(phi[:, i : i + 1] * phi[:, i:]).sum(3) for i in range(phi.shape[1])], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Give `sum_j (g_ij + g_ji) phi_j` for each feature i."""
        (phi,), (grad,) = ctx.saved_tensors, grads
        n_pairs = list(range(phi.shape[1], 0, -1))
        total = torch.zeros_like(phi)
        for i, of_row in enumerate(torch.split(grad[..., None], n_pairs, dim=1)):
            total[:, i] += (of_row * phi[:, i:]).sum(dim=1)
            total[:, i:].addcmul_(of_row, phi[:, i : i + 1])
        return total


def power_normalise(gram: Tensor, sigma: Tensor | float) -> Tensor:
    """Give `2 sigmoid(sigma M) - 1`, which lies in (-1, 1) and keeps the sign.

    >>> power_normalise(torch.tensor([0.0, 1e9]), 1.0).tolist()
    [0.0, 1.0]
    """
    return torch.tanh(gram * sigma / 2)


FUSIONS: dict[
    str, type[Concat | Mean | Max | ScalarMix | Attention | Gated | Cooc | CoocCosine]
] = {
    "mean": Mean,
    "max": Max,
    "concat": Concat,
    "cooc": Cooc,
    "cooc-cosine": CoocCosine,
    "cooc-sqrt": CoocSqrt,
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
