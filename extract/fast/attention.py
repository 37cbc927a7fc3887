"""Attention in place of transformers' `sdpa`, where a faster way gives the same.

On a CPU, of causal models in bfloat16: two products and a softmax. torch's own kernel for CPUs
(flash attention) needs 2.3 times as long at the lengths of classification: its small blocks leave
the matrix units idle. Scores are rounded to bfloat16, as transformers' own eager attention rounds
them.

On CUDA, of texts packed behind each other: torch's kernel for texts of various lengths, so that no
pad is ever computed. All else goes to `sdpa`.

Of texts with branches behind them (see `branched_texts`), which all read the keys of their text.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmembed.common.errors import ModelError

PRODUCTS, PACKED = "llmembed-products", "llmembed-packed"
BRANCHED = "llmembed-branched"
_QUERY_BLOCK = 128
"""Queries that are computed together. Scores of later keys in a block are computed for nothing."""

_packed: ContextVar[tuple[Tensor, int] | None] = ContextVar("packed", default=None)
_branched: ContextVar[tuple[int, Tensor] | None] = ContextVar("branched", default=None)
_compared: ContextVar[list[Tensor] | None] = ContextVar("compared", default=None)


@contextlib.contextmanager
def packed_texts(bounds: Tensor, longest: int) -> Iterator[None]:
    """Let models that `use_packing` attend within each of these texts meanwhile.

    `bounds` tells where each text begins, and the number of all positions, int32 `[n + 1]`;
    `longest` is the tokens of the longest text, or more. Neither goes through the model: not every
    model hands on what it does not know, and a compiled block would be compiled for each length.
    """
    before = _packed.set((bounds, longest))
    try:
        yield
    finally:
        _packed.reset(before)


@contextlib.contextmanager
def branched_texts(width: int, sees: Tensor) -> Iterator[None]:
    """Let models that `use_branches` attend so meanwhile: texts in columns, branches behind them.

    The first `width` columns are causal; `sees` tells what each later one meets of all columns,
    bool `[B, 1, P, width + P]`.
    """
    before = _branched.set((width, sees))
    try:
        yield
    finally:
        _branched.reset(before)


@contextlib.contextmanager
def compared() -> Iterator[list[Tensor]]:
    """Compare what packed texts attend to meanwhile with `exact`: largest difference a call.

    A difference is that of a token, ||a - e|| / ||e|| over all heads, float32 `[]`.
    """
    differences: list[Tensor] = []
    before = _compared.set(differences)
    try:
        yield differences
    finally:
        _compared.reset(before)


def attention_for(config: Any) -> str | None:
    """Choose the attention that is right for a model, before it is loaded.

    None is torch's kernels where its class in transformers serves them. They cannot cap scores
    (Gemma 2), and transformers 5.17 leaves the cap out without a word; the model's own code can.

    >>> attention_for(transformers.Gemma2Config()), attention_for(transformers.LlamaConfig())
    ('eager', None)
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped else None


def use_products(model: Any) -> None:
    """Let a model that attends by `sdpa` attend by `attend`, with the same masks."""
    if attends_by(model) == "sdpa":
        transformers.AttentionInterface.register(PRODUCTS, attend)
        transformers.AttentionMaskInterface.register(PRODUCTS, sdpa_mask)
        model.set_attn_implementation(PRODUCTS)


def use_packing(model: Any) -> None:
    """Let a model that attends by `sdpa` attend by `attend`, without any mask."""
    # Lengths differ from batch to batch: left out, a compiled block stays the same. There is no
    # mask for this name, so transformers makes none.
    left_out: Any = torch.compiler.disable
    transformers.AttentionInterface.register(PACKED, left_out(attend))
    model.set_attn_implementation(PACKED)


def use_branches(model: Any) -> None:
    """Let a model that attends by `sdpa` or products attend by `attend`, without any mask."""
    transformers.AttentionInterface.register(BRANCHED, attend)
    model.set_attn_implementation(BRANCHED)


@contextlib.contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Let a model attend by `sdpa` meanwhile, with all masks, if ours makes none."""
    before = attends_by(model)
    maskless = before in (PACKED, BRANCHED)
    if maskless:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if maskless:
            model.set_attn_implementation(before)


def attends_by(model: Any) -> str | None:
    """Tell which attention the model asks transformers' interface for, if it asks."""
    return getattr(model.config, "_attn_implementation", None)


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

    Queries are `[B, n_heads, T, D]`, keys and values `[B, n_groups, T, D]`; of packed texts B is 1,
    and T all their tokens. The answer is `[B, T, n_heads, D]`, and None in place of the weights.

    Raises:
        ModelError: the model caps its scores or has sinks, which no kernel of torch knows.
    """
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} hands {name!r} to its attention, which torch's kernels "
                "do not know; its features would be wrong. Report this architecture."
            )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    usual = others.get("position_bias") is None
    if usual and (packed := _packed.get()) is not None:
        what: list[Any] = [states[0].transpose(0, 1) for states in (query, key, value)]
        what += packed
        how: Any = {"causal": causal, "scaling": scaling, "window": others.get("sliding_window")}
        found = varlen(*what, **how)
        if (differences := _compared.get()) is not None:
            expected = exact(*what, **how)
            apart = (found - expected).float().norm(dim=(1, 2))
            differences.append((apart / expected.float().norm(dim=(1, 2)).clamp(min=1e-12)).max())
        return found[None], None
    if usual and (branched := _branched.get()) is not None:
        how = {"scaling": scaling, **others}
        return _attend_with_branches(module, query, key, value, *branched, **how), None
    plain = query.shape[2] == key.shape[2] and query.device.type == "cpu" and usual
    if attention_mask is None and causal and plain and query.dtype == torch.bfloat16:
        return causal_attention(query, key, value, scaling), None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **others
    )
    return attended


def _attend_with_branches(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    sees: Tensor,
    **how: Any,
) -> Tensor:
    """Attend within texts, and from their branches to them and themselves: `[B, T, n_heads, D]`."""
    outside = _branched.set(None)
    try:
        q, k, v = (states[:, :, :width] for states in (query, key, value))
        texts, _ = attend(module, q, k, v, None, is_causal=True, **how)
    finally:
        _branched.reset(outside)
    branches, _ = sdpa_attention_forward(
        module, query[:, :, width:], key, value, sees, is_causal=False, **how
    )
    return torch.cat([texts, branches], dim=1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attend from each token to those before it and itself (Vaswani et al. 2017, eq. 1).

    A block of queries meets all keys before it at once, and the queries that share a key
    (grouped-query attention, Ainslie et al. 2023) are rows of one product. Queries are
    `[B, n_heads, T, D]`, keys and values `[B, n_groups, T, D]`, the answer `[B, T, n_heads, D]`.

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
    attended = query.new_empty(n_texts, n_tokens, n_groups, a_group, value.shape[-1])
    by_head = attended.permute(0, 2, 3, 1, 4)
    for start in range(0, n_tokens, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, n_tokens)
        queries = query[:, :, start:stop].reshape(len(keys), -1, width)
        hidden = _hidden(start, stop, a_group, query.dtype)
        scores = torch.baddbmm(hidden, queries, keys[:, :, :stop], alpha=scaling)
        found = torch.bmm(torch.softmax(scores, dim=-1), values[:, :stop])
        by_head[:, :, :, start:stop] = found.view(n_texts, n_groups, a_group, stop - start, -1)
    return attended.view(n_texts, n_tokens, n_heads, -1)


@functools.lru_cache(maxsize=16)  # the layers of a batch ask for the same again
def _hidden(start: int, stop: int, a_group: int, dtype: torch.dtype) -> Tensor:
    """Give `[a_group * (stop - start), stop]`: -inf where a key comes after the query, else 0."""
    hidden = torch.full((stop - start, stop), -torch.inf, dtype=dtype).triu(start + 1)
    return hidden.repeat(a_group, 1)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    *,
    causal: bool,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Attend within each of the packed texts (see `packed_texts`), by torch's kernel for CUDA.

    Queries are `[T, n_heads, D]`, keys and values `[T, n_groups, D]`, float16 or bfloat16. A token
    meets those fewer than `window` tokens away.
    """
    from torch.nn.attention.varlen import varlen_attn

    reach = -1 if window is None else window - 1
    options: dict[str, Any] = {"scale": scaling, "window_size": (reach, 0 if causal else reach)}
    if "enable_gqa" in _accepted_by(varlen_attn):
        options["enable_gqa"] = key.shape[1] != query.shape[1]
    else:  # torch 2.11
        key, value = (_for_each_head(states, query) for states in (key, value))
    found = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
    assert isinstance(found, Tensor)
    return found


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    *,
    causal: bool,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Compute what `varlen` promises, text by text, by torch's general attention."""
    found = []
    for start, stop in itertools.pairwise(bounds.tolist()):
        if start == stop:
            continue
        at = torch.arange(stop - start, device=query.device)
        distance = at[:, None] - at  # from each query to each key
        meets = distance.abs() < (longest if window is None else window)
        meets &= distance >= (0 if causal else -longest)
        q, k, v = (
            _for_each_head(states[start:stop], query).transpose(0, 1)[None]
            for states in (query, key, value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=meets, scale=scaling)
        found.append(attended[0].transpose(0, 1))
    return torch.cat(found)


def _for_each_head(states: Tensor, query: Tensor) -> Tensor:
    """Repeat keys or values `[T, n_groups, D]` for every head of their group."""
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


@functools.cache
def _accepted_by(kernel: Any) -> frozenset[str]:
    """Name the arguments of a kernel, which differ between versions of torch."""
    return frozenset(inspect.signature(kernel).parameters)
