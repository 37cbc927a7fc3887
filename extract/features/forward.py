"""Pooled hidden states of chosen layers from one forward pass, never all hidden states at once.

Each chosen layer is pooled where it passes (see `showing`) and let go. Layer n, the last, is the
model's output, which has passed the final norm, and the others have not: so each equals Hugging
Face's `hidden_states[k]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmembed.extract.backbones.load import Backbone, Show, has_token_types, showing
from llmembed.extract.features.pooling import pool
from llmembed.extract.features.poolings import POOLINGS

Pooled = dict[tuple[str, int], Tensor]
"""(pooling, layer) -> float32 `[B, H]` on the backbone's device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenized:
    """Token ids of some texts."""

    ids: Sequence[Sequence[int]]
    """Token ids of each text, at least one."""
    types: Sequence[Sequence[int]] | None = None
    """Which text of a pair each token belongs to, 0 or 1, where the model tells them apart."""
    is_cut: Sequence[bool] = ()
    """Whether each text was longer than `max_length`."""
    n_empty: int = 0
    """Texts without any token, which got the one token described in `Recipe.empty_token`."""

    @property
    def n_truncated(self) -> int:
        """Texts that were longer than `max_length`."""
        return sum(self.is_cut)

    @property
    def n_tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of each text, int32 `[N]`."""
        return np.array([len(ids) for ids in self.ids], dtype=np.int32)

    def take(self, indices: npt.NDArray[np.int64]) -> Tokenized:
        """Take some of the texts, without what is told of them."""
        types = None if self.types is None else [self.types[index] for index in indices]
        return Tokenized(ids=[self.ids[index] for index in indices], types=types)


def pooled_hidden_states(
    backbone: Backbone,
    texts: Tokenized,
    layers: Sequence[int],
    poolings: Sequence[str],
    *,
    width: int | None = None,
    pad: int = 0,
) -> Pooled:
    """Run one batch and pool the wanted layers.

    Texts are padded on the right to `width` tokens, or to the longest. Such pads cannot influence
    the tokens before them in a causal model, so it needs no attention mask and keeps its fastest
    kernel; every other model gets one, and so does a pooling that reads the pads themselves.
    """
    lengths = texts.n_tokens.astype(np.int64)
    width = int(lengths.max()) if width is None else width
    n_tokens = to_device(backbone.device, lengths)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        table = np.full((len(rows), width), fill, dtype=np.int64)  # [B, T]
        for index, row in enumerate(rows):
            table[index, : len(row)] = row
        return to_device(backbone.device, table)

    mask = None
    if not backbone.causal or any(POOLINGS[name].reads_pads for name in poolings):
        positions = torch.arange(width, device=backbone.device)
        mask = (positions < n_tokens[:, None]).long()  # [B, T]
    types = None if texts.types is None else padded(texts.types, 0)
    inputs = model_inputs(backbone, padded(texts.ids, pad), types) | {"attention_mask": mask}

    def as_it_is(hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield hidden, n_tokens.to(hidden.device)  # blocks may lie on several devices

    return run_and_pool(backbone, inputs, layers, poolings, as_it_is)


def run_and_pool(
    backbone: Backbone,
    inputs: dict[str, Any],
    layers: Sequence[int],
    poolings: Sequence[str],
    by_text: Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]],
) -> Pooled:
    """Run the model, and pool each wanted layer where it passes.

    `by_text` makes one or more `[B, T, H]` of a hidden state, in the order of the texts, and tells
    the real tokens of each text, `[B]`. Only one of them is in memory at a time.
    """
    pooled: Pooled = {}

    def keep(layer: int, hidden: Tensor) -> None:
        pooled.update(pool_layer(backbone, layer, by_text(hidden), poolings))

    output = run_showing(backbone, inputs, layers, keep)
    for name in poolings:
        if POOLINGS[name].home is None and backbone.n_layers in layers:
            pooled[name, backbone.n_layers] = output.pooler_output.float()
    return pooled


@torch.inference_mode()
def pool_layer(
    backbone: Backbone,
    layer: int,
    groups: Iterable[tuple[Tensor, Tensor]],
    poolings: Sequence[str],
) -> Pooled:
    """Pool one layer, given as `by_text` of `run_and_pool` gives it."""
    last = layer == backbone.n_layers
    here = [name for name in poolings if last or not POOLINGS[name].last_layer_only]
    parts = [pool(*group, here) for group in groups]
    return {
        (name, layer): torch.cat([part[name] for part in parts]).to(backbone.device)
        for name in parts[0]
    }


@torch.inference_mode()
def run_showing(
    backbone: Backbone, inputs: Mapping[str, Any], layers: Sequence[int], show: Show
) -> Any:
    """Run the model, show each wanted layer where it passes, and give the model's output."""
    with showing(set(layers) - {backbone.n_layers}, show):
        output = backbone.model(**inputs)
        if backbone.n_layers in layers:
            show(backbone.n_layers, output.last_hidden_state)
    return output


def model_inputs(backbone: Backbone, token_ids: Tensor, types: Tensor | None) -> dict[str, Any]:
    """Name what the model takes: token ids, token types where it has several, and no cache.

    A decoder need not store keys and values for tokens that are never generated.
    """
    inputs: dict[str, Any] = {"input_ids": token_ids}
    if has_token_types(backbone.model.config):
        inputs["token_type_ids"] = torch.zeros_like(token_ids) if types is None else types
    if hasattr(backbone.model.config, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def to_device(device: torch.device, array: npt.NDArray[Any]) -> Tensor:
    """Copy an array without waiting: from pinned memory where the device is a GPU."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
