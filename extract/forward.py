"""Pooled hidden states of chosen layers from one forward pass, never all hidden states at once.

A hook pools each chosen layer where it passes and lets it go. Layer k < n is what enters block
k + 1, since some models work between two blocks (DeBERTa-v2 has a convolution after the first);
above the topmost block kept it is what leaves that block. Layer n, the last, is the model's output,
which has passed the final norm. So each equals Hugging Face's `hidden_states[k]`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmembed.extract.backbone import Backbone, has_token_types
from llmembed.extract.pooling import pool
from llmembed.extract.quiet import quiet

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
        for name, feature in pool(hidden, n_tokens, over_tokens).items():
            pooled[name, layer] = feature

    mask = None
    if not backbone.causal or "mean_padded" in poolings:
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        mask = (positions < n_tokens[:, None]).long()  # [B, T]
    # quiet: some models warn of pads without a mask, which are harmless where they are left out.
    with torch.inference_mode(), quiet(), _hooks(backbone, layers, keep):
        output = backbone.model(attention_mask=mask, **model_inputs(backbone, token_ids))
        if backbone.n_layers in layers:
            keep(backbone.n_layers, output.last_hidden_state)
            if "pooler" in poolings:
                pooled["pooler", backbone.n_layers] = output.pooler_output.float()
    return pooled


@contextlib.contextmanager
def _hooks(
    backbone: Backbone, layers: Sequence[int], keep: Callable[[int, Tensor], None]
) -> Iterator[None]:
    def entering(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            keep(layer, args[0] if args else kwargs["hidden_states"])

        return hook

    def leaving(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        keep(n_kept, output[0] if isinstance(output, tuple) else output)

    blocks, n_kept = backbone.blocks, len(backbone.blocks)
    handles = [
        blocks[layer].register_forward_pre_hook(entering(layer), with_kwargs=True)
        for layer in layers
        if layer < n_kept
    ]
    if n_kept in layers and n_kept < backbone.n_layers:
        handles.append(blocks[-1].register_forward_hook(leaving))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def model_inputs(backbone: Backbone, token_ids: Tensor) -> dict[str, Any]:
    """Name what the model takes: token ids, token types where it has several, and no cache.

    A decoder need not store keys and values for tokens that are never generated.
    """
    inputs: dict[str, Any] = {"input_ids": token_ids}
    if has_token_types(backbone.model.config):
        inputs = {"input_ids": token_ids % SECOND, "token_type_ids": token_ids // SECOND}
    return inputs | ({"use_cache": False} if hasattr(backbone.model.config, "use_cache") else {})
