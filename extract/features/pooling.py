"""From the hidden states of all tokens of a text to one feature, in float32.

Every function takes hidden states `[B, T, H]` padded on the right and the number of real tokens
`[B]`, and returns float32 `[B, H]`. Pads are never read, except by `mean_padded`, which keeps what
the paper did (Liu et al. 2024, arXiv 2406.03725: the mean over `max_length` positions). The sums
run in float32 in a fixed order, so a feature is the same each time it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


def pool(hidden: Tensor, n_tokens: Tensor, poolings: Iterable[str]) -> dict[str, Tensor]:
    """Compute the wanted poolings of one layer, sharing what they share.

    Args:
        hidden: hidden states, any floating dtype, `[B, T, H]`, padded on the right.
        n_tokens: real tokens of each text, int64 `[B]`, at least 1.
        poolings: names among those of `POOL`.

    Returns:
        float32 `[B, H]` for each name.

    >>> states = torch.tensor([[[1.0], [3.0], [100.0]]])
    >>> pooled = pool(states, torch.tensor([2]), ["mean", "last", "max", "weighted"])
    >>> {name: round(value.item(), 3) for name, value in pooled.items()}
    {'mean': 2.0, 'last': 3.0, 'max': 3.0, 'weighted': 2.333}
    """
    real = torch.arange(hidden.shape[1], device=hidden.device) < n_tokens[:, None]  # [B, T]
    return {name: POOL[name](hidden, n_tokens, real) for name in poolings}


def _mean(hidden: Tensor, n_tokens: Tensor, real: Tensor) -> Tensor:
    del n_tokens
    return _weighted_mean(hidden, real.float(), real)


def _position_weighted(hidden: Tensor, n_tokens: Tensor, real: Tensor) -> Tensor:
    """Weigh token t by t (counted from 1), as SGPT does (Muennighoff 2022, eq. 2)."""
    del n_tokens
    positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    return _weighted_mean(hidden, positions * real.float(), real)


def _weighted_mean(hidden: Tensor, weights: Tensor, real: Tensor) -> Tensor:
    # A pad may hold anything, and 0 * inf is not 0: it is cleared, not only weighed with 0.
    states = hidden.float().masked_fill(~real[..., None], 0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.bmm(weights[:, None], states)[:, 0]  # [B, 1, T] @ [B, T, H] -> [B, H]


def _max(hidden: Tensor, n_tokens: Tensor, real: Tensor) -> Tensor:
    del n_tokens
    return hidden.float().masked_fill(~real[..., None], -torch.inf).amax(dim=1)


def _first(hidden: Tensor, n_tokens: Tensor, real: Tensor) -> Tensor:
    del n_tokens, real
    return hidden[:, 0].float()


def _last(hidden: Tensor, n_tokens: Tensor, real: Tensor) -> Tensor:
    del real
    return hidden[torch.arange(len(hidden), device=hidden.device), n_tokens - 1].float()


def _mean_padded(hidden: Tensor, n_tokens: Tensor, real: Tensor) -> Tensor:
    del n_tokens, real
    return hidden.float().mean(dim=1)


POOL: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "last": _last,
    "first": _first,
    "max": _max,
    "weighted": _position_weighted,
    "mean_padded": _mean_padded,
}
