"""From the hidden states of all tokens of a text to one feature, in float32.

Every function takes hidden states `[B, T, H]` padded on the right, the number of real tokens `[B]`
and which positions are real `[B, T]`, and returns float32 `[B, H]`. The sums run in float32 in a
fixed order, so a feature is the same each time it is computed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llmembed.common.registry import loaded
from llmembed.extract.features.poolings import POOLINGS


def pool(hidden: Tensor, n_tokens: Tensor, poolings: Iterable[str]) -> dict[str, Tensor]:
    """Compute the wanted poolings of one layer, but those that the model itself computes.

    >>> states = torch.tensor([[[1.0], [3.0], [100.0]]])
    >>> pooled = pool(states, torch.tensor([2]), ["mean", "last", "max", "weighted"])
    >>> {name: round(value.item(), 3) for name, value in pooled.items()}
    {'mean': 2.0, 'last': 3.0, 'max': 3.0, 'weighted': 2.333}
    """
    real = torch.arange(hidden.shape[1], device=hidden.device) < n_tokens[:, None]  # [B, T]
    homes = {name: POOLINGS[name].home for name in poolings}
    return {name: loaded(home)(hidden, n_tokens, real) for name, home in homes.items() if home}


def mean(hidden: Tensor, _: Tensor, real: Tensor) -> Tensor:
    """Average over the tokens."""
    return _weighted_mean(hidden, real.float(), real)


def position_weighted(hidden: Tensor, _: Tensor, real: Tensor) -> Tensor:
    """Weigh token t by t (counted from 1), as SGPT does (Muennighoff 2022, eq. 2)."""
    positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    return _weighted_mean(hidden, positions * real.float(), real)


def _weighted_mean(hidden: Tensor, weights: Tensor, real: Tensor) -> Tensor:
    # A pad may hold anything, and 0 * inf is not 0: it is cleared, not only weighed with 0.
    states = hidden.masked_fill(~real[..., None], 0).float()
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.bmm(weights[:, None], states)[:, 0]  # [B, 1, T] @ [B, T, H] -> [B, H]


def largest(hidden: Tensor, _: Tensor, real: Tensor) -> Tensor:
    """Take the largest value of each column."""
    return hidden.masked_fill(~real[..., None], -torch.inf).amax(dim=1).float()


def first(hidden: Tensor, _: Tensor, __: Tensor) -> Tensor:
    """Take the first token."""
    return hidden[:, 0].float()


def last(hidden: Tensor, n_tokens: Tensor, _: Tensor) -> Tensor:
    """Take the last token."""
    return hidden[torch.arange(len(hidden), device=hidden.device), n_tokens - 1].float()


def mean_padded(hidden: Tensor, _: Tensor, __: Tensor) -> Tensor:
    """Average over `max_length` positions, as the paper did (Liu et al. 2024, arXiv 2406.03725)."""
    return hidden.float().mean(dim=1)
