"""The first batch of every run, computed again the plain way, before anything is stored.

A model that treats pads, positions or layers in an unexpected way would fill a cache with wrong
vectors and no error. So two texts of the first batch, the longest and the most padded, are run
again one at a time, without any pad, through the model's own `output_hidden_states`; the run stops
if a feature differs by more than rounding can explain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmembed.common.errors import ExtractionError
from llmembed.extract.backbones.load import Backbone, quiet
from llmembed.extract.fast.attention import unpacked
from llmembed.extract.features.forward import (
    Pooled,
    Tokenized,
    model_inputs,
    pooled_hidden_states,
)
from llmembed.extract.features.pooling import pool
from llmembed.extract.features.poolings import POOLINGS, spec_of

TOLERANCE: Mapping[str, float] = {
    "float32": 1e-4,
    "float16": 1e-2,
    "bfloat16": 5e-2,
    "int8": 5e-2,
    "fp8": 5e-2,
}
"""Largest relative difference ||f - e|| / ||e|| that rounding explains, by arithmetic.

int8 rounds the activations too, except in columns that hold an outlier in any text of the batch
(LLM.int8(), Dettmers et al. 2022), so there a feature depends on the batch.
fp8 rounds each token by itself; what another batch rounds otherwise in its last bit may cross to
the next float8: of SmolLM2-135M 0.003 by `mean` at layer 30, 0.05 by `last`.
"""
_UNAVERAGED = 6.0
"""How much farther rounding carries a feature that is no mean over tokens: of SmolLM2-135M in
bfloat16, 0.25 from float32 at layer 16 by `last`, 0.06 by `mean`. In float32 both stay below."""
_GIVEN_WITHOUT_EMBEDDINGS = {"mamba", "mamba2", "falcon_mamba"}
"""Model types whose `hidden_states[0]` is what leaves the first block."""


def allowed(compute_dtype: str | torch.dtype, quantize: str | None, pooling: str) -> float:
    """Say which relative difference rounding explains.

    >>> allowed("float32", None, "last"), round(allowed(torch.bfloat16, None, "last"), 3)
    (0.0001, 0.3)
    """
    arithmetic = _arithmetic(compute_dtype, quantize)
    rough = arithmetic != "float32" and not spec_of(pooling).smooth
    return TOLERANCE[arithmetic] * (_UNAVERAGED if rough else 1.0)


def _arithmetic(compute_dtype: str | torch.dtype, quantize: str | None) -> str:
    return quantize if quantize in ("int8", "fp8") else str(compute_dtype).removeprefix("torch.")


def agree(feature: Tensor, expected: Tensor, pooling: str, backbone: Backbone) -> bool:
    """Tell whether rounding explains how a feature `[H]` differs from the expected one."""
    tolerance = allowed(backbone.compute_dtype, backbone.quantize, pooling)
    return _difference(feature, expected) <= tolerance


def _difference(feature: Tensor, expected: Tensor) -> float:
    return float((feature - expected).norm() / expected.norm().clamp(min=1e-12))


def check_first_batch(
    backbone: Backbone,
    name: str,
    texts: Tokenized,
    pooled: Pooled,
    wanted: Iterable[tuple[str, int]],
    prompted: Mapping[str, Tokenized] | None = None,
) -> None:
    """Refuse a backbone that lacks wanted features, or gives others for texts alone.

    Texts are the longest first; `prompted` are they with a prompt behind, by the pooling that this
    makes.

    Raises:
        ExtractionError: naming pooling, layer, the difference and the tolerance.
    """
    for _, layer in sorted(set(wanted) - pooled.keys(), key=lambda key: key[1]):
        raise ExtractionError(
            f"{name}: layer {layer} never ran, so it has no feature. Leave it out of --layers, or "
            "report this architecture."
        )
    for (_, layer), feature in pooled.items():
        if feature.shape[1] != backbone.hidden_size:
            raise ExtractionError(
                f"{name}: layer {layer} is {feature.shape[1]} wide, the others "
                f"{backbone.hidden_size}. Leave it out of --layers."
            )
    for index in sorted({0, len(texts.ids) - 1}):
        alone = _all_alone(backbone, texts, np.array([index]), pooled, prompted or {})
        for (pooling, layer), expected in alone.items():
            feature = pooled[pooling, layer][index]
            if not (feature.isfinite().all() or expected.isfinite().all()):
                continue  # the extractor refuses it by its row
            if not agree(feature, expected, pooling, backbone):
                tolerance = allowed(backbone.compute_dtype, backbone.quantize, pooling)
                raise ExtractionError(
                    f"{name}: layer {layer}, pooling {pooling} of the first batch differs by "
                    f"{_difference(feature, expected):.2g} (relative) from the same text computed "
                    f"alone; {tolerance:g} is allowed in "
                    f"{_arithmetic(backbone.compute_dtype, backbone.quantize)}. Nothing was "
                    "stored. Pass --token-budget 1 to compute every text alone, or report this "
                    "architecture."
                )


def _all_alone(
    backbone: Backbone,
    texts: Tokenized,
    index: npt.NDArray[np.int64],
    keys: Iterable[tuple[str, int]],
    prompted: Mapping[str, Tokenized],
) -> dict[tuple[str, int], Tensor]:
    """Compute features of one text, and of it with each prompt behind it, each alone."""
    keys = list(keys)
    plain = [key for key in keys if key[0] not in prompted]
    features = _alone(backbone, texts.take(index), plain) if plain else {}
    for pooling, behind in prompted.items():
        layers = [layer for name, layer in keys if name == pooling]
        found = _alone(backbone, behind.take(index), [("last", layer) for layer in layers])
        features |= {(pooling, layer): feature for (_, layer), feature in found.items()}
    return features


def _alone(
    backbone: Backbone, text: Tokenized, keys: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], Tensor]:
    """Compute features of one text without pads: (pooling, layer) -> float32 `[H]`."""
    device = backbone.device
    token_ids = torch.tensor(text.ids, device=device)
    types = None if text.types is None else torch.tensor(text.types, device=device)
    n_tokens = torch.tensor([token_ids.shape[1]], device=device)
    with torch.inference_mode(), quiet(), unpacked(backbone.model):
        output = backbone.model(
            attention_mask=torch.ones_like(token_ids),
            output_hidden_states=True,
            **model_inputs(backbone, token_ids, types),
        )
    given = _given(backbone, output)
    features = {}
    for pooling, layer in keys:
        if POOLINGS[pooling].reads_pads:
            continue  # without pads it is another feature, on purpose
        if POOLINGS[pooling].home is None:
            features[pooling, layer] = output.pooler_output[0].float()
        elif layer in given:
            states = given[layer]
            pooled = pool(states, n_tokens.to(states.device), [pooling])
            features[pooling, layer] = pooled[pooling][0]
        else:
            with unpacked(backbone.model):
                alone = pooled_hidden_states(backbone, text, [layer], [pooling])
            features[pooling, layer] = alone[pooling, layer][0]
    return {key: feature.to(device) for key, feature in features.items()}


def _given(backbone: Backbone, output: Any) -> dict[int, Tensor]:
    """Read the hidden states `[1, T, H]` that the model itself gives, by layer.

    The last one of a cut model counts only where it has not passed the final norm, which older
    classes of transformers apply whatever `tie_last_hidden_states` says.
    """
    n_kept, states = len(backbone.blocks), list(output.hidden_states)
    config: Any = backbone.model.config
    if config.model_type in _GIVEN_WITHOUT_EMBEDDINGS:
        given = dict(enumerate(states[:-1], start=1))
    else:
        given = dict(enumerate(states))
    if n_kept == backbone.n_layers:
        given[n_kept] = output.last_hidden_state
    elif torch.equal(given[n_kept], output.last_hidden_state):
        del given[n_kept]
    return given
