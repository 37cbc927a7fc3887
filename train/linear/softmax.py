"""Softmax regression to its optimum: several fits over the same rows at once, by L-BFGS.

All fits (one a fold) share two matrix products a step, so five folds read the features once. Each
minimises the weighted mean cross-entropy plus `penalty / 2 |W|^2`, with no penalty on the bias.

The first guess of the inverse Hessian is the inverse of `1/C X^T X / n + penalty I`: the Hessian
where all C classes are as likely, which of two is Boehning's bound ("Multinomial logistic
regression algorithm", 1992). With it L-BFGS (Liu and Nocedal, 1989) needs some ten steps where the
plain method needs hundreds on hidden states. The bound, 1/2 whatever C is, takes twice as many with
150 classes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from llmembed.train.linear.closed import (
    LinearMap,
    Path,
    factorise,
    space_of,
    unit_of,
    without_absent,
)
from llmembed.train.linear.moments import Problem

_HISTORY = 10
_MAX_STEPS = 300
_MAX_HALVINGS = 12
_SUFFICIENT = 1e-4  # share of the predicted decrease that a step must reach (Armijo)
_TOLERANCE = 5e-7  # predicted further decrease of the loss, in nats; 1e-7 is lost in float32

Evaluate: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
Pairs: TypeAlias = "deque[tuple[Tensor, Tensor, Tensor]]"


class SoftmaxSolver:
    """Softmax regression; the penalty is strength times the mean variance of the features.

    Weights of P fits, `theta`, are float32 `[P, K + 1, C]`, the bias of centred features in the
    last row. What differs is the weight of each row in each fit, float32 `[N, P]`.
    """

    STRENGTHS: ClassVar = tuple(10 ** (k / 2 - 4) for k in range(10))  # 0.0001 to 3.16

    def __init__(
        self,
        problem: Problem,
        strengths: tuple[float, ...] | None = None,
        *,
        tolerance: float = _TOLERANCE,
    ) -> None:
        self._space, self.tolerance = space_of(problem), tolerance
        self.problem = problem = self._space.problem
        self.strengths = sorted(strengths or self.STRENGTHS, reverse=True)
        total = problem.moments.total()
        self._exact_mean, self._counts = total.mean, total.counts
        covariance = total.gram / total.n - torch.outer(total.mean, total.mean)
        self._mean, self._covariance = total.mean.float(), covariance.float()
        self._curvature = self._guess_curvature()
        unit = unit_of(covariance, total.gram.diagonal().mean() / total.n, total.n)
        self._unit = self._space.filled * float(unit)

    def held_out(self) -> Path:
        """Score each row by the fits that have not seen its fold."""
        parts = [*self.held_out_parts()]
        strengths = tuple(strength for part in parts for strength in part.strengths)
        return Path(strengths, torch.cat([part.scores for part in parts]))

    def held_out_parts(self) -> Iterator[Path]:
        """Give `held_out` a strength at a time.

        From the strongest penalty to the weakest, each from the optimum before, until the held-out
        loss has risen twice: the weak end takes most of the steps.
        """
        problem, theta, losses = self.problem, None, list[float]()
        masks = self._masks(len(problem.folds) + bool(len(problem.alone)))
        for fold, rows in enumerate(problem.folds):
            masks[rows, fold] = 0  # a fit more, of all rows, is for those alone in their class
        for strength in self.strengths:
            theta = self._minimise(masks, strength, theta)
            scores = self._of_own_fold(self._scores(theta))
            losses.append(problem.loss(scores))
            yield Path((strength,), scores[None])
            if losses[-3:] == sorted(losses[-3:]) and len(losses) > 2:
                break

    def solve(self, strength: float) -> LinearMap:
        """Fit all rows with one strength."""
        theta = self._minimise(self._masks(1), strength)[0].double()
        weight = theta[:-1].T
        bias = theta[-1] - weight @ self._exact_mean
        return self._space.in_columns(without_absent(weight, bias, self._counts))

    def _masks(self, n_fits: int) -> Tensor:
        """Weigh the rows in folds, float32 `[N, P]`."""
        rows = self.problem.taking_part
        masks = self.problem.class_weights.new_zeros(len(self.problem.x), n_fits)
        masks[rows] = self.problem.weights_of(rows)[:, None]
        return masks

    def _of_own_fold(self, of_fits: Tensor) -> Tensor:
        """Pick each row's scores by the fit without its fold, `[N, P, C]` -> `[N, C]`."""
        scores = torch.full_like(of_fits[:, 0], math.nan)
        for fold, rows in enumerate(self.problem.folds):
            scores[rows] = of_fits[rows, fold]
        scores[self.problem.alone] = of_fits[self.problem.alone, -1]
        return scores

    def _scores(self, theta: Tensor) -> Tensor:
        """Classify all rows by all fits: float32 `[N, P, C]`."""
        return torch.cat([self._scores_of(x, theta) for _, x in self.problem.blocks()])

    def _scores_of(self, x: Tensor, theta: Tensor) -> Tensor:
        weights, bias = theta[:, :-1], theta[:, -1]
        flat = weights.transpose(0, 1).flatten(1)  # [P, K, C] -> [K, P C]
        product = (x @ flat).reshape(len(x), *bias.shape)
        return product + (bias - torch.einsum("k,pkc->pc", self._mean, weights))

    def _minimise(self, masks: Tensor, strength: float, theta: Tensor | None = None) -> Tensor:
        """Find the optimum of each fit, from `theta` on."""
        row_weights = masks / masks.sum(dim=0)
        penalty = strength * self._unit
        if theta is None:
            theta = masks.new_zeros(self._shape(row_weights.shape[1]))
        guess = self._curvature * self._covariance
        trace = guess.trace() + self._curvature * self._mean.square().sum()
        factor = factorise(guess, guess.new_tensor(penalty), trace).to(theta)

        def precondition(gradient: Tensor) -> Tensor:
            flat = gradient[:, :-1].transpose(0, 1).flatten(1)  # [P, K, C] -> [K, P C]
            solved = torch.cholesky_solve(flat, factor).reshape(len(factor), len(gradient), -1)
            return torch.cat([solved.transpose(0, 1), gradient[:, -1:] / self._curvature], dim=1)

        def evaluate(theta: Tensor) -> tuple[Tensor, Tensor]:
            return self._loss(theta, row_weights, penalty)

        return _lbfgs(theta, evaluate, precondition, self.tolerance)

    def _loss(self, theta: Tensor, row_weights: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """Give the loss, float64 `[P]`, and its gradient, `[P, K + 1, C]`."""
        weights, of_bias = theta[:, :-1], torch.zeros_like(theta[:, -1])  # [P, C]
        loss = penalty / 2 * weights.double().square().sum(dim=(1, 2))
        flat = theta.new_zeros(weights.shape[1], of_bias.numel())  # [K, P C]
        for rows, x in self.problem.blocks():
            own = row_weights[rows]
            losses, residual = self._losses(self._scores_of(x, theta), self.problem.y[rows])
            loss += (losses * own).sum(dim=0, dtype=torch.float64)
            residual *= own[:, :, None]
            of_bias += residual.sum(dim=0)
            flat += x.T @ residual.flatten(1)
        product = flat.reshape(-1, *of_bias.shape).transpose(0, 1)
        of_weights = product - self._mean[:, None] * of_bias[:, None, :] + penalty * weights
        return loss, torch.cat([of_weights, of_bias[:, None]], dim=1)

    def _guess_curvature(self) -> float:
        """Guess the curvature of the loss in the logits of a class."""
        return 1 / len(self._counts)

    def _shape(self, n_fits: int) -> tuple[int, int, int]:
        """Give the shape of the weights of P fits."""
        return n_fits, len(self._mean) + 1, len(self._counts)

    def _losses(self, scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Give the loss of n rows in each fit, `[n, P]`, and its gradient in the scores."""
        log_proba = scores.log_softmax(dim=2)
        true = y.clamp(min=0)[:, None, None].expand(-1, scores.shape[1], 1)
        losses = -log_proba.gather(2, true)[:, :, 0]
        residual = log_proba.exp_()
        residual.scatter_add_(2, true, -torch.ones_like(true, dtype=residual.dtype))
        return losses, residual


def _lbfgs(
    theta: Tensor,
    evaluate: Evaluate,
    precondition: Callable[[Tensor], Tensor],
    tolerance: float,
) -> Tensor:
    loss, gradient = evaluate(theta)
    pairs: Pairs = deque(maxlen=_HISTORY)
    scale = torch.ones_like(loss)
    for _ in range(_MAX_STEPS):
        direction = -_times_inverse_hessian(gradient, pairs, precondition, scale)
        slope = _dot(gradient, direction)
        converged = slope > -2 * tolerance
        if converged.all():
            break
        direction = torch.where(converged[:, None, None], 0.0, direction)
        step, loss, new_gradient = _search(theta, direction, loss, slope, evaluate)
        theta, change = theta + step, new_gradient - gradient
        gradient = new_gradient
        curvature = _dot(step, change)
        scale = torch.where(
            curvature > 0, curvature / _dot(change, precondition(change)).clamp(min=1e-30), scale
        )
        inverse = torch.where(curvature > 0, 1 / curvature.clamp(min=1e-30), 0.0)
        pairs.append((step, change, inverse))
    return theta


def _search(
    theta: Tensor, direction: Tensor, loss: Tensor, slope: Tensor, evaluate: Evaluate
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve the step of each fit until its loss falls as it should; give step, loss, gradient."""
    length = torch.ones_like(loss)
    rounding = 1e-7 * loss.abs()
    for _ in range(_MAX_HALVINGS):
        step = length.to(theta)[:, None, None] * direction
        new_loss, gradient = evaluate(theta + step)
        failed = new_loss > loss + _SUFFICIENT * length * slope + rounding
        if not failed.any():
            break
        length = torch.where(failed, length / 2, length)
    return step, new_loss, gradient


def _times_inverse_hessian(
    gradient: Tensor, pairs: Pairs, precondition: Callable[[Tensor], Tensor], scale: Tensor
) -> Tensor:
    """Multiply by the approximate inverse Hessian: the two loops of L-BFGS."""
    q, factors = gradient, []
    for step, change, inverse in reversed(pairs):
        factors.append(inverse * _dot(step, q))
        q = q - _column(factors[-1], q) * change
    q = _column(scale, q) * precondition(q)
    for (step, change, inverse), factor in zip(pairs, reversed(factors), strict=True):
        q = q + _column(factor - inverse * _dot(change, q), q) * step
    return q


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2)).double()


def _column(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like)[:, None, None]
