"""Moments of features by fold, from which linear heads are solved without another look at the rows.

One pass accumulates, for every fold, the Gram matrix `sum x x^T` and the sums of each class. What
a fold is tested on is left out by subtraction, so k folds cost one pass, not k. Every linear
fusion is a congruence of the Gram matrix: a concatenation of some features is a principal
sub-matrix, and a weighted sum of features of one width is `A^T G A`.

The price is memory: k K^2 numbers. Products are float32 within a chunk of rows, sums over chunks
float64, and what is kept is float32: for standardised features this agrees with float64 to 1e-6 of
the diagonal. Of the symmetric product only the half below the diagonal is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from llmembed.train.inputs.weighing import weights_of

_CHUNK_ROWS = 4096
_BLOCK_COLUMNS = 384  # of a product: wide enough for its full speed


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over some rows."""

    gram: Tensor
    """`[K, K]`, sum of `w x x^T`."""
    class_sums: Tensor
    """float64 `[C, K]`, sum of `w x` over the rows of each class."""
    counts: Tensor
    """float64 `[C]`, sum of w over the rows of each class."""

    @property
    def n(self) -> Tensor:
        """Sum of w over all rows, float64."""
        return self.counts.sum()

    @property
    def mean(self) -> Tensor:
        """Mean of the rows, float64 `[K]`."""
        return self.class_sums.sum(dim=0) / self.n


@dataclass(frozen=True, kw_only=True)
class FoldMoments:
    """Moments of each of k folds."""

    gram: Tensor
    """float32 `[k, K, K]`."""
    class_sums: Tensor
    """float64 `[k, C, K]`."""
    counts: Tensor
    """float64 `[k, C]`."""

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor,
        folds: Sequence[Tensor],
        class_weights: Tensor,
        sample_weights: Tensor | None = None,
    ) -> Self:
        """Accumulate in one pass.

        Args:
            x: float32 `[N, K]`, features.
            y: int64 `[N]`, classes.
            folds: k tensors int64 `[n]`, the rows of each fold.
            class_weights: float32 `[C]`, weight w of each row of a class.
            sample_weights: float32 `[N]`, a factor of the w of each row; None is 1.
        """
        moments = [_moments(x, y, rows, class_weights, sample_weights) for rows in folds]
        return cls(
            gram=torch.stack([one.gram for one in moments]),
            class_sums=torch.stack([one.class_sums for one in moments]),
            counts=torch.stack([one.counts for one in moments]),
        )

    def total(self) -> Moments:
        """Moments of all rows; the Gram matrix is float64."""
        return Moments(
            gram=self.gram.sum(dim=0, dtype=torch.float64),
            class_sums=self.class_sums.sum(dim=0),
            counts=self.counts.sum(dim=0),
        )

    def without(self, fold: int) -> Moments:
        """Moments of all rows but those of a fold; the Gram matrix is float32."""
        others = [k for k in range(len(self.gram)) if k != fold]
        gram = self.gram[others[0]].clone()
        for k in others[1:]:
            gram += self.gram[k]
        return Moments(
            gram=gram,
            class_sums=self.class_sums[others].sum(dim=0),
            counts=self.counts[others].sum(dim=0),
        )

    def select(self, columns: Tensor) -> Self:
        """Moments of some columns, int64 `[c]`: the concatenation of a subset of the features."""
        return type(self)(
            gram=self.gram[:, columns[:, None], columns],
            class_sums=self.class_sums[:, :, columns],
            counts=self.counts,
        )

    def mix(self, weights: Tensor) -> Self:
        """Moments of `sum_i weights_i x_i`, the x_i being features of one width side by side.

        Args:
            weights: float32 `[n]`, weight of each feature.
        """
        k, n = len(self.gram), len(weights)
        width = self.gram.shape[1] // n
        blocks = self.gram.reshape(k, n, width, n, width)
        sums = self.class_sums.reshape(k, -1, n, width)
        return type(self)(
            gram=torch.einsum("i,kiajb,j->kab", weights, blocks, weights),
            class_sums=torch.einsum("i,kcia->kca", weights.double(), sums),
            counts=self.counts,
        )


def _moments(
    x: Tensor, y: Tensor, rows: Tensor, class_weights: Tensor, sample_weights: Tensor | None
) -> Moments:
    n_classes, width = len(class_weights), x.shape[1]
    gram = x.new_zeros(width, width)
    class_sums = torch.zeros(n_classes, width, dtype=torch.float64, device=x.device)
    counts = torch.zeros(n_classes, dtype=torch.float64, device=x.device)
    for index, chunk in enumerate(torch.split(rows, _CHUNK_ROWS)):
        block = x.index_select(0, chunk)
        weights = weights_of(y, chunk, class_weights, sample_weights)[:, None]
        of_class = weights * F.one_hot(y[chunk], n_classes)
        class_sums += of_class.T @ block
        counts += of_class.sum(dim=0, dtype=torch.float64)
        product = _times_transpose(block.mul_(weights.sqrt()))
        gram = gram.double().add_(product) if index else product
    return Moments(gram=gram.float(), class_sums=class_sums, counts=counts)


def _times_transpose(x: Tensor) -> Tensor:
    """Compute `x^T x`, `[n, K]` -> `[K, K]`, by blocks of columns up to the diagonal."""
    width = x.shape[1]
    gram = x.new_empty(width, width)
    for first in range(0, width, _BLOCK_COLUMNS):
        own = slice(first, min(first + _BLOCK_COLUMNS, width))
        torch.mm(x[:, own].T, x[:, : own.stop], out=gram[own, : own.stop])
        gram[:first, own] = gram[own, :first].T
    return gram
