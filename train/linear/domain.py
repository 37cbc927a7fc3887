"""How far a text lies from all that was trained on: the relative Mahalanobis distance.

The squared distance to the nearest mean of a class, by the covariance that the classes share, less
the squared distance to the mean of all rows by the covariance of all (Ren et al., "A simple fix to
Mahalanobis distance for improving near-OOD detection", 2021): what is odd in a text whatever it is
about counts in both, and falls out.

Standardised features of more than 384 columns are projected to the 384 directions in which 1,024
rows differ most (Halko, Martinsson and Tropp, 2011, with one power step, in the space of the rows).
At most 16,384 rows, drawn by the seed, say what is near; each is judged by projection and moments
of the folds that it is not in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from llmembed.common.process import full_float32
from llmembed.train.inputs import FitData, draw_folds, usual_folds
from llmembed.train.inputs.shares import Rows
from llmembed.train.linear.closed import factorise, unit_of
from llmembed.train.linear.moments import Moments, Problem
from llmembed.train.measures import Floats

WIDTH = 384
MAX_ROWS = 16_384
_SKETCH_ROWS = 1024
_CHUNK_ROWS = 4096
_NO_DIRECTION = 1e-6  # of the largest square of a direction, which float32 can't tell from 0
_SHRINKAGE = 0.1  # of either covariance, towards a multiple of the identity


@dataclass(frozen=True, kw_only=True)
class Domain:
    """What tells how far a text is. K is F, the width of the features, or 384 if that is less."""

    projection: Tensor
    """float32 `[F, K]`; `[0, K]` where nothing is projected."""
    within: Tensor
    """float32 `[K, K]`, whitens by the covariance that the classes share."""
    overall: Tensor
    """float32 `[K, K]`, whitens by the covariance of all rows."""
    means: Tensor
    """float32 `[c, K]`, whitened means of the classes that occur."""
    centre: Tensor
    """float32 `[K]`, mean of all rows, whitened by that of all."""
    distances: Tensor
    """float32 `[n]`, of the rows, held out, in ascending order."""

    @classmethod
    @full_float32()
    def of(cls, data: FitData, seed: int) -> Self:
        """Take the statistics of the training rows."""
        generator = np.random.default_rng(seed)
        rows = data.shares.train
        rows = np.sort(generator.permutation(rows)[:MAX_ROWS])
        y = data.y[torch.from_numpy(rows)]
        n_folds, groups = usual_folds(len(rows)), None
        if data.groups is not None and (n_groups := len(np.unique(data.groups[rows]))) > 1:
            n_folds, groups = min(n_folds, n_groups), data.groups[rows]
        drawn = draw_folds(y.numpy(), np.arange(len(rows)), n_folds, generator, groups)
        folds, weights = [torch.from_numpy(one) for one in drawn], torch.ones(len(data.labels))
        found = torch.empty(len(rows))
        if data.x.shape[1] <= WIDTH:
            projection = data.x.new_empty(0, data.x.shape[1])
            problem = Problem(data.x[torch.from_numpy(rows)], y, folds, weights)
            for k, fold in enumerate(folds):
                moments = problem.moments.without(k)
                found[fold] = _distances(problem.x[fold], *_statistics(moments))
        else:
            sketch = _Sketch.of(data.x, rows, generator)
            for fold in folds:
                # Of few rows a projection keeps all, of a new text not: each fold has one without.
                others = torch.ones(len(rows), dtype=torch.bool)
                others[fold] = False
                z = sketch.projected(others)
                moments = Problem(z, y, [others.nonzero()[:, 0]], weights).moments.total()
                found[fold] = _distances(z[fold], *_statistics(moments))
            projection = sketch.projection()
            problem = Problem(sketch.projected(), y, folds, weights)
        within, overall, means, centre = _statistics(problem.moments.total())
        return cls(
            projection=projection,
            within=within,
            overall=overall,
            means=means,
            centre=centre,
            distances=found.sort().values,
        )

    @full_float32()
    @torch.inference_mode()
    def shares_as_far(self, standardised: Tensor) -> Floats:
        """Give the share of rows, held out and this one, at least as far as each of `[N, F]`.

        Returns:
            float64 `[N]`, above 0: for a text as those of the training, any share is as likely.
        """
        z = _project(standardised, self.projection)
        d = _distances(z, self.within, self.overall, self.means, self.centre)
        nearer = torch.searchsorted(self.distances, d.contiguous())
        n = len(self.distances)
        found: Floats = ((n - nearer + 1).double() / (n + 1)).numpy()
        return found


@dataclass(frozen=True, kw_only=True)
class _Sketch:
    """Rows whose directions of most difference are found by their inner products alone."""

    rows: Tensor
    """float32 `[s, F]`."""
    position: Tensor
    """int64 `[s]`, which of the n rows they are."""
    products: Tensor
    """float32 `[n, s]`, of all n rows with these."""
    start: Tensor
    """float32 `[s, K]`, drawn."""

    @classmethod
    def of(cls, x: Tensor, rows: Rows, generator: np.random.Generator) -> Self:
        """Draw them from rows of `[N, F]`."""
        position = np.sort(generator.permutation(len(rows))[:_SKETCH_ROWS])
        sketch, chunks = x[rows[position]], torch.split(torch.from_numpy(rows), _CHUNK_ROWS)
        start = generator.standard_normal((len(position), WIDTH), dtype=np.float32)
        return cls(
            rows=sketch,
            position=torch.from_numpy(position),
            products=torch.cat([x[chunk] @ sketch.T for chunk in chunks]),
            start=torch.from_numpy(start),
        )

    def projection(self) -> Tensor:
        """Give the directions, `[F, K]`; beyond the rank of the rows they are zeros."""
        return (self.rows.T @ self._coefficients(torch.arange(len(self.rows)))).contiguous()

    def projected(self, among: Tensor | None = None) -> Tensor:
        """Project all n rows, `[n, K]`, by the directions of those among some, bool `[n]`."""
        if among is None:
            return self.products @ self._coefficients(torch.arange(len(self.rows)))
        kept = among[self.position].nonzero()[:, 0]
        return self.products[:, kept] @ self._coefficients(kept)

    def _coefficients(self, kept: Tensor) -> Tensor:
        """Give what makes the directions of rows that are kept, `[k, K]`."""
        gram = self.products[self.position[kept]][:, kept]
        basis = torch.linalg.qr(gram @ self.start[kept]).Q
        squares, turn = torch.linalg.eigh((basis.T @ gram @ basis).double())
        known = squares > _NO_DIRECTION * squares[-1]
        scales = torch.where(known, squares, torch.inf).rsqrt()
        found: Tensor = basis @ (turn * scales).float()
        return torch.nn.functional.pad(found, (0, WIDTH - found.shape[1]))


def _project(x: Tensor, projection: Tensor) -> Tensor:
    return x @ projection if len(projection) else x


def _statistics(moments: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the whitening of classes and of all, `[K, K]` each, and the whitened means."""
    n, gram = moments.n.double(), moments.gram.double()
    present = moments.counts > 0
    means = moments.class_sums[present] / moments.counts[present, None]
    between = means.T @ moments.class_sums[present]
    within = _whitening((gram - between) / n, gram / n, n)
    overall = _whitening(gram / n - torch.outer(moments.mean, moments.mean), gram / n, n)
    parts = (within, overall, means @ within, moments.mean @ overall)
    return tuple(part.float() for part in parts)  # type: ignore[return-value]


def _whitening(covariance: Tensor, square: Tensor, n: Tensor) -> Tensor:
    """Shrink and whiten `[K, K]`; `square` is the mean of `x x^T` over the n rows it came from."""
    shift = _SHRINKAGE * unit_of(covariance, square.diagonal().mean(), n)
    factor = factorise((1 - _SHRINKAGE) * covariance, shift, square.trace())
    unit = torch.eye(len(covariance), dtype=factor.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(factor, unit, upper=False)
    return inverse.T


def _distances(z: Tensor, within: Tensor, overall: Tensor, means: Tensor, centre: Tensor) -> Tensor:
    nearest = torch.cdist(z @ within, means).amin(dim=1).square()
    relative: Tensor = nearest - (z @ overall - centre).square().sum(dim=1)
    return relative
