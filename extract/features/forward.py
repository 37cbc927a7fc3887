"""Pooled hidden states of chosen layers from one forward pass, never all hidden states at once.

Each chosen layer is pooled where it passes (see `taps`) and let go. Layer n, the last, is the
model's output, which has passed the final norm, and the others have not: so each equals Hugging
Face's `hidden_states[k]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmembed.extract.backbones.hooks import showing
from llmembed.extract.backbones.load import Backbone, has_token_types
from llmembed.extract.fast.attention import packed_texts
from llmembed.extract.features.pooling import pool

SECOND = 1 << 32
"""Added to the ids of a pair's second text where the model tells the two apart (BERT)."""

Pooled = dict[tuple[str, int], Tensor]
"""(pooling, layer) -> float32 `[B, H]`."""


def pooled_hidden_states(
    backbone: Backbone,
    token_ids: Tensor,
    n_tokens: Tensor,
    layers: Sequence[int],
    poolings: Sequence[str],
) -> Pooled:
    """Run one batch and pool the wanted layers.

    Pads on the right of a causal model cannot influence the tokens before them, so it needs no
    attention mask and keeps its fastest kernel; every other model gets one. `mean_padded` reads the
    pads themselves, and so needs the mask that the paper's code passed.

    Args:
        backbone: the model, cut at the highest of `layers` or above.
        token_ids: int64 `[B, T]`, padded on the right, on the backbone's device; those of the
            second text of a pair plus `SECOND`.
        n_tokens: real tokens of each text, int64 `[B]`, at least 1.
        layers: wanted layers, at most those kept.
        poolings: wanted poolings; `pooler` exists at the last layer only.

    Returns:
        (pooling, layer) -> float32 `[B, H]` on the backbone's device.
    """
    pooled: Pooled = {}
    over_tokens = [name for name in poolings if name != "pooler"]

    def keep(layer: int, hidden: Tensor) -> None:
        # A model that is spread has its blocks on several devices.
        for name, feature in pool(hidden, n_tokens.to(hidden.device), over_tokens).items():
            pooled[name, layer] = feature.to(token_ids.device)

    mask = None
    if not backbone.causal or "mean_padded" in poolings:
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        mask = (positions < n_tokens[:, None]).long()  # [B, T]
    with torch.inference_mode(), showing(set(layers) - {backbone.n_layers}, keep):
        output = backbone.model(attention_mask=mask, **model_inputs(backbone, token_ids))
        if backbone.n_layers in layers:
            keep(backbone.n_layers, output.last_hidden_state)
            if "pooler" in poolings:
                pooled["pooler", backbone.n_layers] = output.pooler_output.float()
    return pooled


def packed_hidden_states(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    poolings: Sequence[str],
    *,
    n_positions: int | None = None,
) -> Pooled:
    """Run texts packed behind each other, without a pad between them, and pool the wanted layers.

    Args:
        backbone: a model that `packs`, cut at the highest of `layers` or above.
        rows: token ids of B texts, those of the second text of a pair plus `SECOND`.
        layers: wanted layers, at most those kept.
        poolings: wanted poolings, not `mean_padded`; `pooler` exists nowhere here.
        n_positions: positions to compute, the rest filled with texts that nobody reads, so that a
            compiled block always has the same shape; None is as many as there are tokens.

    Returns:
        (pooling, layer) -> float32 `[B, H]` on the backbone's device.
    """
    pooled: Pooled = {}
    lengths = [len(row) for row in rows]
    longest, n_tokens = max(lengths), sum(lengths)
    fillers = _fillers((n_positions or n_tokens) - n_tokens, longest)
    bounds = np.cumsum([0, *lengths, *fillers])
    token_ids = np.zeros(bounds[-1], dtype=np.int64)
    token_ids[:n_tokens] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))
    index = np.minimum(bounds[: len(rows), None] + np.arange(longest), n_tokens - 1)  # [B, T]
    at = to_device(backbone.device, index)
    n_real = to_device(backbone.device, np.asarray(lengths))

    def keep(layer: int, hidden: Tensor) -> None:
        for name, feature in pool(hidden[0][at], n_real, poolings).items():  # [B, T, H]
            pooled[name, layer] = feature

    device = backbone.device
    texts = packed_texts(to_device(device, bounds.astype(np.int32)), longest)
    inputs = model_inputs(backbone, to_device(device, token_ids[None]))
    inputs["position_ids"] = to_device(device, positions[None] + backbone.first_position)
    with torch.inference_mode(), texts, showing(set(layers) - {backbone.n_layers}, keep):
        output = backbone.model(attention_mask=None, **inputs)
        if backbone.n_layers in layers:
            keep(backbone.n_layers, output.last_hidden_state)
    return pooled


def _fillers(n_positions: int, longest: int) -> list[int]:
    """Cut positions that nobody reads into texts no longer than the longest.

    >>> _fillers(7, 3)
    [3, 3, 1]
    """
    whole, rest = divmod(n_positions, longest)
    return [longest] * whole + [rest] * (rest > 0)


def to_device(device: torch.device, array: npt.NDArray[Any]) -> Tensor:
    """Copy an array without waiting: from pinned memory where the device is a GPU."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def model_inputs(backbone: Backbone, token_ids: Tensor) -> dict[str, Any]:
    """Name what the model takes: token ids, token types where it has several, and no cache.

    A decoder need not store keys and values for tokens that are never generated.
    """
    inputs: dict[str, Any] = {"input_ids": token_ids}
    if has_token_types(backbone.model.config):
        inputs = {"input_ids": token_ids % SECOND, "token_type_ids": token_ids // SECOND}
    return inputs | ({"use_cache": False} if hasattr(backbone.model.config, "use_cache") else {})
