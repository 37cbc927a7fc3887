"""Stacking: a weighted mean of linear classifiers, which is one linear classifier on them all.

Members are picked one after the other, each time the one that lowers the held-out loss of the mean
most (Caruana et al., "Ensemble selection from libraries of models", ICML 2004): so a weak layer
that knows what the others don't comes in before a second-best copy of the best. Because all members
are linear in the features, what is stored and predicts is a single matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmembed.train.inputs import mean_loss
from llmembed.train.linear.closed import LinearMap
from llmembed.train.measures import fit_temperature

_MAX_PICKS = 12


@dataclass(frozen=True, kw_only=True)
class Member:
    """A linear classifier in a stack."""

    fusion: str  # single, mean or concat
    features: tuple[int, ...]  # positions of its features
    head: str  # ridge, lda or linear
    strength: float
    weight: float  # share of the mean


def pick(
    scores: Sequence[Tensor],
    y: Tensor,
    class_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> dict[int, float]:
    """Pick the members of a stack: the share of each, in the order of their first picks.

    Args:
        scores: float32 `[n, C]` each, held-out logits of a candidate, at its own temperature.
        y: int64 `[n]`, classes.
        class_weights: float32 `[C]`, weight of each row of a class.
        sample_weights: float32 `[n]`, a factor of the weight of each row; None is 1.

    >>> good, bad = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 2)
    >>> pick([bad, good], torch.tensor([0, 1]))
    {1: 1.0}
    """
    labels = y.cpu().numpy()
    weights = None if sample_weights is None else sample_weights.cpu().numpy()

    def loss_of(logits: Tensor) -> float:
        return mean_loss(logits, y, class_weights, sample_weights).item()

    total, temperature = torch.zeros_like(scores[0]), 1.0
    picked: list[int] = []
    reached: list[float] = []
    for n in range(1, _MAX_PICKS + 1):
        losses = [loss_of((total + one) / (n * temperature)) for one in scores]
        picked.append(min(range(len(scores)), key=losses.__getitem__))
        total = total + scores[picked[-1]]
        temperature = fit_temperature((total / n).cpu().numpy(), labels, weights)
        reached.append(loss_of(total / (n * temperature)))
    picked = picked[: min(range(_MAX_PICKS), key=reached.__getitem__) + 1]
    return {index: picked.count(index) / len(picked) for index in dict.fromkeys(picked)}


def spread(linear: LinearMap, fusion: str, columns: Sequence[Tensor], width: int) -> LinearMap:
    """Write a classifier on fused features as one on all F columns, `[C, K]` -> `[C, F]`.

    Args:
        linear: weight `[C, K]` on the fused vector.
        fusion: single, mean or concat.
        columns: int64 `[H]` each, columns of its features.
        width: F.

    >>> linear = LinearMap(weight=torch.tensor([[2.0]]), bias=torch.tensor([1.0]))
    >>> spread(linear, "mean", [torch.tensor([0]), torch.tensor([2])], 3).weight.tolist()
    [[1.0, 0.0, 1.0]]
    """
    weight = linear.weight.new_zeros(len(linear.weight), width)
    if fusion == "mean":
        for own in columns:
            weight[:, own] = linear.weight / len(columns)
    else:
        weight[:, torch.cat(list(columns))] = linear.weight
    return LinearMap(weight=weight, bias=linear.bias)


def average(maps: Sequence[LinearMap], factors: Sequence[float]) -> LinearMap:
    """Give `sum_i factors_i maps_i`."""
    pairs = list(zip(maps, factors, strict=True))
    weight = torch.stack([factor * one.weight for one, factor in pairs]).sum(dim=0)
    bias = torch.stack([factor * one.bias for one, factor in pairs]).sum(dim=0)
    return LinearMap(weight=weight, bias=bias)
