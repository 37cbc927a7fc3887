"""Co-occurrence pooling: how alike the features of a text are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmembed.train.fusions.mixing import Fusion
from llmembed.train.fusions.tricks import pair_dots

_MAX_GROUPS, _MAX_ENTRIES = 32, 4096
_SMALLEST_SQUARE = 1e-24  # so that a zero vector is like none
SATURATED = 0.99  # a power-normalised entry beyond this no longer tells examples apart


class CoocCosine(Fusion):
    """Co-occurrence pooling in several learned views of the features.

    Each of the n features is compressed to `phi_i = relu(W_i x_i + b_i)`, cut into G groups of
    equal width and scaled to length 1 there. Each group gives a Gram matrix `M = Phi Phi^T`
    `[n, n]`, whose entries are cosines. The fused vector is the upper triangle of all G matrices,
    K = G n (n + 1) / 2; G is at most 32, and less where there are many features.
    """

    def __init__(self, widths: Sequence[int], group_width: int = 8) -> None:
        super().__init__()
        self.widths = list(widths)
        n_entries = len(widths) * (len(widths) + 1) // 2
        self.n_groups = max(1, min(_MAX_GROUPS, _MAX_ENTRIES // n_entries))
        compressed = self.n_groups * group_width
        self.compress = nn.ModuleList(nn.Linear(width, compressed) for width in widths)
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
        dots = pair_dots(phi.to(torch.promote_types(phi.dtype, torch.float32)))
        n = phi.shape[1]
        row, column = torch.triu_indices(n, n, device=phi.device)
        first = torch.arange(n, device=phi.device)
        squares = dots.index_select(1, first * (2 * n + 1 - first) // 2)  # on the diagonal
        inverse = squares.clamp(min=_SMALLEST_SQUARE).rsqrt()
        return dots * inverse.index_select(1, row) * inverse.index_select(1, column)


class Cooc(CoocCosine):
    """Co-occurrence pooling with the power normalisation of the paper, whose sigma is learned.

    `PN(M) = 2 sigmoid(sigma M) - 1 = tanh(sigma M / 2)`. The paper (`llmembed.train.fusions.paper`)
    has one group, raw scales and a fixed sigma, so that PN saturates at 1 for every example; here
    the entries are cosines. The paper puts the mean of the features beside the Gram matrix; here
    it is a solved linear classifier, and the co-occurrences learn what that leaves
    (`Classifier.base`).
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(widths)
        self.sigma = nn.Parameter(torch.tensor(2.0))

    def entries(self, phi: Tensor) -> Tensor:
        """Compare features `[B, n, G, k]`: the upper triangles, `[B, P, G]`."""
        return power_normalise(super().entries(phi), self.sigma)


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


def power_normalise(gram: Tensor, sigma: Tensor | float) -> Tensor:
    """Give `2 sigmoid(sigma M) - 1`, which lies in (-1, 1) and keeps the sign.

    >>> power_normalise(torch.tensor([0.0, 1e9]), 1.0).tolist()
    [0.0, 1.0]
    """
    return torch.tanh(gram * sigma / 2)
