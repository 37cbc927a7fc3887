"""What linear heads are solved from: rows in folds, and the moments of their features.

One pass accumulates, for every fold, the Gram matrix `sum x x^T` and the sums of each class. What
a fold is tested on is left out by subtraction, so k folds cost one pass, not k.

The price is memory: k K^2 numbers. Products are float32 within a chunk of rows, sums over chunks
float64, and what is kept is float32: for standardised features this agrees with float64 to 1e-6 of
the diagonal. Of the symmetric product only the half below the diagonal is computed.

A row that is alone in its class cannot be held out: without it there is no such class; nor can rows
that one group keeps in one fold. They are scored by the classifier fitted to all rows. So they have
no part in the held-out accuracy; losses and temperatures count them, since without them the class
would have no row at all.

Where a text may have several labels, each is a problem of its own with the same Gram matrix: rows
with the label and all others. No row is alone then, for there are the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmembed.common.progress import phase
from llmembed.train.inputs import mean_loss, weights_of
from llmembed.train.measures import fit_temperature

_CHUNK_ROWS = 4096
_BLOCK_ROWS = 8192
_SPAN_ROUNDING = 1e-9  # of the largest square: what float32 features leave unknown
_LEAST_LENGTH = 1e-12  # where all rows are alike
_BLOCK_COLUMNS = 384  # of a product: wide enough for its full speed

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over some rows."""

    gram: Tensor
    """`[K, K]`, sum of `w x x^T`."""
    class_sums: Tensor
    """float64 `[C, K]`, sum of `w x` over the rows of each class."""
    counts: Tensor
    """float64 `[C]`, sum of w over the rows of each class."""
    n: Tensor
    """float64, sum of w over all rows."""
    row_sums: Tensor
    """float64 `[K]`, sum of `w x` over all rows."""

    @property
    def mean(self) -> Tensor:
        """Mean of the rows, float64 `[K]`."""
        return self.row_sums / self.n


@dataclass(frozen=True, kw_only=True)
class FoldMoments:
    """Moments of each of k folds."""

    gram: Tensor
    """float32 `[k, K, K]`."""
    class_sums: Tensor
    """float64 `[k, C, K]`."""
    counts: Tensor
    """float64 `[k, C]`."""
    n: Tensor
    """float64 `[k]`."""
    row_sums: Tensor
    """float64 `[k, K]`."""

    def total(self) -> Moments:
        """Moments of all rows; the Gram matrix is float64."""
        return Moments(
            gram=self.gram.sum(dim=0, dtype=torch.float64),
            class_sums=self.class_sums.sum(dim=0),
            counts=self.counts.sum(dim=0),
            n=self.n.sum(),
            row_sums=self.row_sums.sum(dim=0),
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
            n=self.n[others].sum(),
            row_sums=self.row_sums[others].sum(dim=0),
        )


@dataclass(frozen=True)
class Problem:
    """Rows to classify, divided into folds.

    The device is that of the labels, the folds and the weights. Features that have no room there
    may stay in memory: all that reads them takes some thousand rows at a time.
    """

    x: Tensor
    """float32 `[N, K]`, features, on the device or in memory."""
    y: Tensor
    """int64 `[N]`, classes; where a text may have several labels, `[N, C]`, 1 for those."""
    folds: list[Tensor]
    """int64 `[n]` each, the rows of a fold; rows in none take no part."""
    class_weights: Tensor
    """float32 `[C]`, weight of each row of a class."""
    sample_weights: Tensor | None = None
    """float32 `[N]`, a factor of the weight of each row; None is 1."""
    summed: Callable[[], FoldMoments] | None = None
    """Sums the moments elsewhere; None is here."""

    @property
    def device(self) -> torch.device:
        """Where numbers are computed."""
        return self.y.device

    def features_of(self, rows: Tensor, width: int | None = None) -> Tensor:
        """Give some rows, int64 `[n]`, and of them the first columns, on the device."""
        return self.x[:, :width].index_select(0, rows.to(self.x.device)).to(self.device)

    def blocks(self, width: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Give all rows, and of them the first columns, on the device: some thousand at a time."""
        for start in range(0, len(self.x), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            yield rows, self.x[rows, :width].to(self.device)

    @functools.cached_property
    def moments(self) -> FoldMoments:
        """Moments of each fold, accumulated in one pass."""
        if self.summed is not None:
            return self.summed()
        moments = []
        with phase("Gram matrices", len(self.folds), "folds") as progress:
            for rows in self.folds:
                moments.append(self._moments(rows))
                progress.count(1)
        return FoldMoments(
            **{
                name: torch.stack([getattr(one, name) for one in moments])
                for name in vars(moments[0])
            }
        )

    def _moments(self, rows: Tensor) -> Moments:
        n_classes, width = len(self.class_weights), self.x.shape[1]
        gram = self.class_weights.new_zeros(width, width)
        class_sums = gram.new_zeros(n_classes, width, dtype=torch.float64)
        counts = gram.new_zeros(n_classes, dtype=torch.float64)
        n, row_sums = counts.new_zeros(()), class_sums.new_zeros(width)
        for index, chunk in enumerate(torch.split(rows, _CHUNK_ROWS)):
            block = self.features_of(chunk)
            weights = self.weights_of(chunk)[:, None]
            has = self.y[chunk] if self.multilabel else F.one_hot(self.y[chunk], n_classes)
            of_class = weights * has
            class_sums += of_class.T @ block
            counts += of_class.sum(dim=0, dtype=torch.float64)
            n += weights.sum(dtype=torch.float64)
            if self.multilabel:  # else each row is in the sums of its class
                row_sums += weights[:, 0] @ block
            product = _times_transpose(block.mul_(weights.sqrt()))
            gram = gram.double().add_(product) if index else product
        return Moments(
            gram=gram.float(),
            class_sums=class_sums,
            counts=counts,
            n=n if self.multilabel else counts.sum(),
            row_sums=row_sums if self.multilabel else class_sums.sum(dim=0),
        )

    @property
    def multilabel(self) -> bool:
        """Whether a text may have several labels."""
        return self.y.ndim == 2

    @property
    def class_counts(self) -> Tensor:
        """Count the rows in folds of each class, int64 `[C]`."""
        y = self.y[self.taking_part]
        if self.multilabel:
            return y.sum(dim=0)
        return torch.bincount(y, minlength=len(self.class_weights))

    @functools.cached_property
    def taking_part(self) -> Tensor:
        """Rows in folds, int64 `[n]`."""
        return torch.cat(self.folds)

    @functools.cached_property
    def _is_alone(self) -> Tensor:
        classes, n_folds = self.y[self.taking_part], len(self.folds)
        if self.multilabel:
            return classes.new_zeros(len(classes), dtype=torch.bool)
        sizes = torch.tensor([len(rows) for rows in self.folds], device=self.device)
        of_fold = torch.arange(n_folds, device=self.device).repeat_interleave(sizes)
        occurs = self.y.new_zeros(len(self.class_weights), n_folds)
        occurs[classes, of_fold] = 1
        return occurs.sum(dim=1)[classes] == 1

    @property
    def held_out(self) -> Tensor:
        """Rows in folds whose class occurs in another fold too, int64 `[n]`."""
        return self.taking_part[~self._is_alone]

    @property
    def alone(self) -> Tensor:
        """The other rows in folds, most each the only one of its class, int64 `[n]`."""
        return self.taking_part[self._is_alone]

    def own_weights(self, rows: Tensor) -> Tensor | None:
        """Give the sample weights of some rows, float32 `[n]`."""
        return None if self.sample_weights is None else self.sample_weights[rows]

    def weights_of(self, rows: Tensor) -> Tensor:
        """Weigh some rows, float32 `[n]`."""
        return weights_of(self.y, rows, self.class_weights, self.sample_weights)

    def merits(self, scores: Tensor, rows: Tensor) -> list[float]:
        """Say how good each of `[S, N, C]` is on some rows, more being better.

        It is the accuracy, or of several labels the loss at the best temperature, less than 0.
        """
        if not self.multilabel:
            return self.accuracies(scores, rows)
        return [-self.loss(one / self.temperature(one, fit_temperature)) for one in scores]

    def accuracies(self, scores: Tensor, rows: Tensor) -> list[float]:
        """Give the weighted accuracy of each of `[S, N, C]` on some rows; 0 of no rows."""
        if not len(rows):
            return [0.0] * len(scores)
        hits = (scores[:, rows].argmax(dim=2) == self.y[rows]).double()
        weights = self.weights_of(rows).double()
        found: list[float] = (hits @ weights / weights.sum()).tolist()
        return found

    def loss(self, scores: Tensor) -> float:
        """Give the weighted loss of scores `[N, C]` of the rows in folds."""
        rows = self.taking_part
        own = self.own_weights(rows)
        return mean_loss(scores[rows], self.y[rows], self.class_weights, own).item()

    def temperature(self, scores: Tensor, find: Callable[..., Found]) -> Found:
        """Calibrate held-out scores `[N, C]`, by a function of `calibration`."""
        rows = self.taking_part
        own = self.own_weights(rows)
        weights = None if own is None else own.cpu().numpy()
        return find(scores[rows].cpu().numpy(), self.y[rows].cpu().numpy(), weights)


def in_span(problem: Problem) -> tuple[Problem, Tensor]:
    """Give the rows by their coordinates in the space that those in folds span.

    A head whose penalty is the same in all directions has no weight outside of that space: of fewer
    rows than columns nothing is lost, and all matrices are of the size of the rows.

    Returns:
        The problem, whose features are `[N, r]`, and an orthonormal basis, float32 `[K, r]`.
    """
    x = problem.features_of(problem.taking_part).double()
    squares, vectors = torch.linalg.eigh(x @ x.T)
    kept = squares >= _SPAN_ROUNDING * squares[-1]
    lengths = squares[kept].sqrt().clamp(min=_LEAST_LENGTH)
    basis = (x.T @ vectors[:, kept] / lengths).float()
    own = torch.cat([block @ basis for _, block in problem.blocks()])
    return dataclasses.replace(problem, x=own), basis


def _times_transpose(x: Tensor) -> Tensor:
    """Compute `x^T x`, `[n, K]` -> `[K, K]`, by blocks of columns up to the diagonal."""
    width = x.shape[1]
    gram = x.new_empty(width, width)
    for first in range(0, width, _BLOCK_COLUMNS):
        own = slice(first, min(first + _BLOCK_COLUMNS, width))
        torch.mm(x[:, own].T, x[:, : own.stop], out=gram[own, : own.stop])
        gram[:first, own] = gram[own, :first].T
    return gram
