"""Weights of rows: that of the class, which the fit is told, times the row's own.

A fit counts both, and so do its choices by held-out rows. Standardisation and temperature count the
rows' own alone: weights of classes bend a classifier on purpose, and don't say how often a class
occurs. Where a text may have several labels, classes weigh the same, and the loss is the mean over
its decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmembed.common.errors import ConfigError
from llmembed.train.measures import Floats

SMALLEST = torch.finfo(torch.float32).tiny  # of a batch whose weights all vanish beside others


def weights_by_name(given: str | Mapping[str, float], labels: Sequence[str]) -> str | Floats:
    """Look up the weight of each class, float64 `[C]`; none and balanced stay as they are.

    >>> weights_by_name({"no": 2.5}, ("yes", "no")).tolist()
    [1.0, 2.5]

    Raises:
        ConfigError: a name is no class.
    """
    if isinstance(given, str):
        return given
    for name in given:
        if name not in labels:
            raise ConfigError.unknown("class", name, labels, "Name one in --class-weight.")
    return np.array([given.get(name, 1.0) for name in labels])


def weights_of(
    y: Tensor, rows: Tensor | slice, class_weights: Tensor, sample_weights: Tensor | None = None
) -> Tensor:
    """Weigh some rows, float32 `[n]`, by weights of their classes `[C]` and their own `[N]`.

    >>> y, rows = torch.tensor([0, 1, 1]), torch.tensor([0, 2])
    >>> weights_of(y, rows, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0, 3.0])).tolist()
    [1.0, 6.0]
    """
    weights = class_weights.new_ones(len(y[rows])) if y.ndim == 2 else class_weights[y[rows]]
    return weights if sample_weights is None else weights * sample_weights[rows]


def mean_loss(
    logits: Tensor,
    y: Tensor,
    class_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Average the cross-entropy of `[n, C]`, by weights of classes `[C]` and of rows `[n]`.

    Of several labels a text, y is `[n, C]`, 0 and 1, and the cross-entropy that of each label.

    >>> logits, y = torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 1])
    >>> round(mean_loss(logits, y, sample_weights=torch.tensor([1.0, 0.0])).item(), 4)
    0.6931
    """
    if y.ndim == 2:
        losses = F.binary_cross_entropy_with_logits(logits, y.to(logits), reduction="none")
        weights = losses.new_ones(len(y)) if sample_weights is None else sample_weights
        return (losses.mean(dim=1) * weights).sum() / weights.sum().clamp(min=SMALLEST)
    if sample_weights is None:
        return F.cross_entropy(logits, y, weight=class_weights)
    losses = F.cross_entropy(logits, y, weight=class_weights, reduction="none")
    weights = sample_weights if class_weights is None else class_weights[y] * sample_weights
    return (losses * sample_weights).sum() / weights.sum().clamp(min=SMALLEST)
