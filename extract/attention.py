"""Attention of causal models in bfloat16 on a CPU, as two products and a softmax.

torch's own kernel for CPUs (flash attention) needs 2.3 times as long at the lengths of
classification: its small blocks leave the matrix units idle. Here a block of queries meets all keys
before it at once, and the queries that share a key (grouped-query attention, Ainslie et al. 2023)
are rows of one product. Scores are rounded to bfloat16, as transformers' own eager attention
rounds them. Whatever is not a plain causal attention in bfloat16 goes to transformers' `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "llmembed"
_QUERY_BLOCK = 128
"""Queries that are computed together: what they see beyond the diagonal is computed in vain."""


def use_products(model: Any) -> None:
    """Let a model that attends by `sdpa` attend by `attend`.

    Other models are left as they are.
    """
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        transformers.AttentionInterface.register(NAME, attend)
        transformers.AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention interface asks.

    Args:
        module: the attention module, which says whether it is causal.
        query: `[B, n_heads, T, D]`.
        key: `[B, n_groups, T, D]`.
        value: `[B, n_groups, T, D]`.
        attention_mask: None where causality is all that hides a token.
        scaling: factor of the scores; None is D**-0.5.
        is_causal: overrides what the module says.
        others: what this architecture passes besides.

    Returns:
        `[B, T, n_heads, D]`, and None in place of the weights.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
    plain = query.shape[2] == key.shape[2] and not any(
        others.get(name) is not None for name in ("position_bias", "softcap")
    )
    if attention_mask is None and causal and plain and query.dtype == torch.bfloat16:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, scaling).transpose(1, 2), None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **others
    )
    return attended


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attend from each token to those before it and itself (Vaswani et al. 2017, eq. 1).

    Args:
        query: `[B, n_heads, T, D]`; heads that share a key follow each other.
        key: `[B, n_groups, T, D]`.
        value: `[B, n_groups, T, D]`.
        scaling: factor of the scores.

    Returns:
        `[B, n_heads, T, D]`.

    >>> ones = torch.ones(1, 1, 2, 1)
    >>> causal_attention(ones, ones, torch.tensor([[[[2.0], [4.0]]]]), 1.0).flatten().tolist()
    [2.0, 3.0]
    """
    n_texts, n_heads, n_tokens, width = query.shape
    n_groups = key.shape[1]
    a_group = n_heads // n_groups
    keys = key.reshape(-1, n_tokens, width).transpose(1, 2)  # [B * n_groups, D, T]
    values = value.reshape(-1, n_tokens, value.shape[-1])
    query = query.reshape(-1, a_group, n_tokens, width)  # [B * n_groups, a_group, T, D]
    attended = query.new_empty(*query.shape[:3], value.shape[-1])
    for start in range(0, n_tokens, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, n_tokens)
        queries = query[:, :, start:stop].reshape(len(keys), -1, width)
        hidden = _hidden(start, stop, query).repeat(a_group, 1)  # [a_group * block, stop]
        scores = torch.baddbmm(hidden, queries, keys[:, :, :stop], alpha=scaling)
        found = torch.bmm(torch.softmax(scores, dim=-1), values[:, :stop])
        attended[:, :, start:stop] = found.view(len(keys), a_group, stop - start, -1)
    return attended.view(n_texts, n_heads, n_tokens, -1)


def _hidden(start: int, stop: int, like: Tensor) -> Tensor:
    """Give `[stop - start, stop]`: -inf where a key comes after the query, else 0."""
    return torch.full((stop - start, stop), -torch.inf, dtype=like.dtype).triu(start + 1)
