from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_model import toy_texts

from llmembed.common.errors import ExtractionError
from llmembed.extract.backbones.load import tap
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.features.extractor import Extractor

pytestmark = pytest.mark.filterwarnings("ignore:.*(cut at 16 tokens|of the lone token)")


def extractor(folder: Path, layers: list[int]) -> Extractor:
    recipe = Recipe(model=str(folder), max_length=16, compute_dtype="float32", dtype="float32")
    return Extractor(recipe, layers=layers, poolings=["mean", "last"])


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_model_whose_texts_leak_into_each_other_is_refused(llama: Path, layer: int) -> None:
    """If a block mixes the texts of a batch, the run stops before anything is stored."""
    leaky = extractor(llama, [layer])

    def mix(module: torch.nn.Module, inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.01 * hidden.mean(dim=0, keepdim=True)

    leaky.backbone.blocks[0].register_forward_hook(mix)
    with pytest.raises(
        ExtractionError, match=rf"toy-llama: layer {layer}, pooling mean .* differs"
    ):
        leaky.features(toy_texts(20))


def test_a_layer_that_never_ran_is_found(llama: Path) -> None:
    """A block that the model leaves out gives an error, never the memory that was there before."""
    short = extractor(llama, [0, 1, 2])
    short.backbone.model.layers = short.backbone.blocks[:1]
    with pytest.raises(ExtractionError, match="toy-llama: layer 1 never ran"):
        short.features(toy_texts(5))


@pytest.mark.parametrize("layer", [1, 2])
def test_a_wrong_layer_is_found(llama: Path, layer: int) -> None:
    """The output of another block is no rounding error, also at the cut, before the final norm."""
    wrong = extractor(llama, [layer, 2])
    blocks = wrong.backbone.blocks
    for block in blocks:
        block._forward_pre_hooks.clear()
        block._forward_hooks.clear()
    tap(blocks[::-1], wrong.backbone.n_layers)
    message = f"layer {layer}, pooling mean of the first batch differs"
    with pytest.raises(ExtractionError, match=message):
        wrong.features(toy_texts(5))


def test_a_single_text_is_checked_too(bert: Path) -> None:
    """One text, no pads, all layers: nothing to refuse."""
    assert extractor(bert, [0, 1, 2, 3]).features(["w1"])["mean", 3].shape == (1, 16)
