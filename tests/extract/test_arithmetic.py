"""Which arithmetic a device computes in, and that float32 is float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from toy_model import save_toy_model, toy_texts

from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.features.extractor import Extractor


def test_float32_features_are_so_in_a_process_of_rough_products(tmp_path: Path) -> None:
    """What a program told torch for its own products changes no bit of a feature.

    Where oneDNN has products in bfloat16, "medium" takes them: a relative error of 2e-3.
    """
    folder = save_toy_model(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    recipe = Recipe(model=str(folder), max_length=16, compute_dtype="float32", dtype="float32")
    ours = Extractor(recipe, layers=[2], poolings=["mean"], device="cpu")
    exact = ours.features(toy_texts(20, longest=13))["mean", 2]
    torch.set_float32_matmul_precision("medium")
    try:
        found = ours.features(toy_texts(20, longest=13))["mean", 2]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found, exact)
