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

from llmembed.common.errors import ExtractionError
from llmembed.extract.backbones.load import Backbone
from llmembed.extract.backbones.quiet import quiet
from llmembed.extract.features.forward import Pooled, model_inputs, pooled_hidden_states
from llmembed.extract.features.pooling import pool

TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 5e-2}
"""Largest relative difference ||f - e|| / ||e|| that rounding explains, by arithmetic.

int8 rounds the activations too, except in columns that hold an outlier in any text of the batch
(LLM.int8(), Dettmers et al. 2022), so there a feature depends on the batch.
"""

_OF_ONE_TOKEN = {"first", "last", "max"}
_UNAVERAGED = 6.0
"""How much farther rounding carries a feature that is no average over tokens: of SmolLM2-135M in
bfloat16, 0.25 from float32 at layer 16 by `last`, 0.06 by `mean`. In float32 both stay below."""

_TOLD_WITHOUT_EMBEDDINGS = {"mamba", "mamba2", "falcon_mamba"}
"""Model types whose `hidden_states[0]` is what leaves the first block."""


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
    for key in sorted(set(wanted) - pooled.keys(), key=lambda key: key[1]):
        message = (
            f"{name}: layer {key[1]} never ran, so it has no feature. Leave it out of --layers, or "
            "report this architecture."
        )
        raise ExtractionError(message)
    for (_, layer), feature in pooled.items():
        if feature.shape[1] != backbone.hidden_size:
            message = (
                f"{name}: layer {layer} is {feature.shape[1]} wide, the others "
                f"{backbone.hidden_size}. Leave it out of --layers."
            )
            raise ExtractionError(message)
    keys = [key for key in pooled if key[0] != "mean_padded"]  # which reads the pads on purpose
    for index in sorted({0, len(rows) - 1}):
        token_ids = torch.tensor([rows[index]], device=backbone.device)
        for key, expected in _alone(backbone, token_ids, keys).items():
            feature = torch.as_tensor(pooled[key][index], device=backbone.device)
            if not (feature.isfinite().all() or expected.isfinite().all()):
                continue  # the extractor refuses it by its row
            difference = float((feature - expected).norm() / expected.norm().clamp(min=1e-12))
            kind = arithmetic(backbone.compute_dtype, backbone.quantize)
            if not difference <= allowed(kind, key[0]):
                raise ExtractionError(_message(backbone, name, key, difference))


def _alone(
    backbone: Backbone, token_ids: Tensor, keys: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], Tensor]:
    """Compute features of one text without pads: (pooling, layer) -> float32 `[H]`."""
    n_tokens = torch.tensor([token_ids.shape[1]], device=backbone.device)
    with torch.inference_mode(), quiet():
        output = backbone.model(
            attention_mask=torch.ones_like(token_ids),
            output_hidden_states=True,
            **model_inputs(backbone, token_ids),
        )
    told = _told(backbone, output)
    features = {}
    for pooling, layer in keys:
        if pooling == "pooler":
            features[pooling, layer] = output.pooler_output[0].float()
        elif layer in told:
            features[pooling, layer] = pool(told[layer], n_tokens, [pooling])[pooling][0]
        else:
            alone: Pooled = pooled_hidden_states(backbone, token_ids, n_tokens, [layer], [pooling])
            features[pooling, layer] = alone[pooling, layer][0]
    return features


def _told(backbone: Backbone, output: Any) -> dict[int, Tensor]:
    """Read the hidden states `[1, T, H]` that the model itself tells, by layer.

    The last one of a cut model counts only where it has not passed the final norm, which older
    classes of transformers apply whatever `tie_last_hidden_states` says.
    """
    n_kept, states = len(backbone.blocks), list(output.hidden_states)
    config: Any = backbone.model.config
    if config.model_type in _TOLD_WITHOUT_EMBEDDINGS:
        told = dict(enumerate(states[:-1], start=1))
    else:
        told = dict(enumerate(states))
    if n_kept == backbone.n_layers:
        told[n_kept] = output.last_hidden_state
    elif torch.equal(told[n_kept], output.last_hidden_state):
        del told[n_kept]
    return told


def allowed(arithmetic: str, pooling: str) -> float:
    """Say which relative difference rounding explains.

    >>> allowed("float32", "last"), round(allowed("bfloat16", "last"), 3)
    (0.0001, 0.3)
    """
    rough = pooling in _OF_ONE_TOKEN and arithmetic != "float32"
    return TOLERANCE[arithmetic] * (_UNAVERAGED if rough else 1.0)


def arithmetic(compute_dtype: str | torch.dtype, quantize: str | None) -> str:
    """Name the arithmetic whose rounding `TOLERANCE` allows.

    >>> arithmetic(torch.bfloat16, None), arithmetic("float32", "int8")
    ('bfloat16', 'int8')
    """
    return "int8" if quantize == "int8" else str(compute_dtype).removeprefix("torch.")


def _message(backbone: Backbone, name: str, key: tuple[str, int], difference: float) -> str:
    pooling, layer = key
    kind = arithmetic(backbone.compute_dtype, backbone.quantize)
    return (
        f"{name}: layer {layer}, pooling {pooling} of the first batch differs by {difference:.2g} "
        f"(relative) from the same text computed alone; {allowed(kind, pooling):g} is allowed in "
        f"{kind}. Nothing was stored. "
        "Pass --token-budget 1 to compute every text alone, or report this architecture."
    )
