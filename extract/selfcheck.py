"""The first batch of every run, computed again the plain way, before anything is stored.

A model that treats pads, positions or layers in an unexpected way would fill a cache with wrong
vectors and no error. So two texts of the first batch, the longest and the most padded, are run
again one at a time, without any pad, through the model's own `output_hidden_states`; the run stops
if a feature differs by more than rounding can explain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmembed.cache_format.errors import ExtractionError
from llmembed.extract.backbone import Backbone
from llmembed.extract.forward import Pooled, pooled_hidden_states, without_cache
from llmembed.extract.pooling import pool

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest relative difference ||f - e|| / ||e|| that rounding explains, by arithmetic."""


def check_first_batch(
    backbone: Backbone,
    name: str,
    rows: Sequence[Sequence[int]],
    pooled: Mapping[tuple[str, int], Any],
    wanted: Iterable[tuple[str, int]],
) -> None:
    """Refuse a backbone whose batched features are not those of its texts alone.

    Args:
        backbone: the model.
        name: its name, for the message.
        rows: token ids of the texts of the batch, longest first.
        pooled: (pooling, layer) -> float32 `[B, H]`, what the batch gave.
        wanted: what it should have given.

    Raises:
        ExtractionError: naming pooling, layer, the difference and the tolerance.
    """
    for key in set(wanted) - pooled.keys():
        message = (
            f"{name}: layer {key[1]} never ran, so it has no feature. Leave it out of --layers, or "
            "report this architecture."
        )
        raise ExtractionError(message)
    keys = [key for key in pooled if key[0] != "mean_padded"]  # which reads the pads on purpose
    for index in sorted({0, len(rows) - 1}):
        token_ids = torch.tensor([rows[index]], device=backbone.device)
        for key, expected in _alone(backbone, token_ids, keys).items():
            feature = torch.as_tensor(pooled[key][index], device=backbone.device)
            difference = float((feature - expected).norm() / expected.norm().clamp(min=1e-12))
            if not difference <= TOLERANCE[backbone.compute_dtype]:
                raise ExtractionError(_message(backbone, name, key, difference))


def _alone(
    backbone: Backbone, token_ids: Tensor, keys: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], Tensor]:
    """Compute features of one text without pads: (pooling, layer) -> float32 `[H]`."""
    n_tokens = torch.tensor([token_ids.shape[1]], device=backbone.device)
    n_kept = len(backbone.blocks)
    with torch.inference_mode():
        output = backbone.model(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            output_hidden_states=True,
            **without_cache(backbone),
        )
    features = {}
    for pooling, layer in keys:
        if pooling == "pooler":
            features[pooling, layer] = output.pooler_output[0].float()
        elif layer < n_kept or layer == backbone.n_layers:
            hidden = output.hidden_states[layer]
            features[pooling, layer] = pool(hidden, n_tokens, [pooling])[pooling][0]
        else:  # the end of a cut model has passed the final norm there, which is not this layer
            alone: Pooled = pooled_hidden_states(backbone, token_ids, n_tokens, [layer], [pooling])
            features[pooling, layer] = alone[pooling, layer][0]
    return features


def _message(backbone: Backbone, name: str, key: tuple[str, int], difference: float) -> str:
    pooling, layer = key
    return (
        f"{name}: layer {layer}, pooling {pooling} of the first batch differs by {difference:.2g} "
        f"(relative) from the same text computed alone; {TOLERANCE[backbone.compute_dtype]:g} is "
        f"allowed in {str(backbone.compute_dtype).removeprefix('torch.')}. Nothing was stored. "
        "Pass --token-budget 1 to compute every text alone, or report this architecture."
    )
