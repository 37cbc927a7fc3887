"""Which arithmetic a device computes in, and that float32 is float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from toy_model import save_toy_model, toy_texts

from llmembed.common.errors import ModelError, RowError
from llmembed.extract.backbones.load import load_backbone, read_shape, resolve_compute_dtype
from llmembed.extract.backbones.models import find_model
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


@pytest.mark.parametrize(
    ("card", "dtype"),
    [
        ((7, 0), torch.float16),  # V100
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),  # A100
        ((9, 0), torch.bfloat16),  # H100
    ],
)
def test_auto_is_what_the_named_gpu_multiplies_fast(
    card: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU that --device names is asked, not the current one, which is another here."""
    cards = {torch.device("cuda:0"): (8, 9) if card < (8, 0) else (7, 5)}
    cards[torch.device("cuda:1")] = card
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", cards.__getitem__)
    assert resolve_compute_dtype("auto", torch.device("cuda:1")) == dtype
    assert resolve_compute_dtype("float32", torch.device("cuda:1")) == torch.float32


def test_nf4_multiplies_in_the_arithmetic_of_the_device(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a T4 nf4 weights are widened to float16, never to bfloat16 or float32."""
    told: list[Any] = []

    def stop(*_: Any, **options: Any) -> Any:
        told.append(options)
        raise OSError

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", stop)
    files, device = find_model(str(llama)), torch.device("cuda:0")
    dtype = resolve_compute_dtype("auto", device)
    options: dict[str, Any] = {"n_kept": 2, "device": device, "quantize": "nf4"}
    with pytest.raises(ModelError):
        load_backbone(files, read_shape(files), compute_dtype=dtype, **options)
    assert told[0]["quantization_config"].bnb_4bit_compute_dtype == torch.float16
    assert told[0]["dtype"] == torch.float16


def test_what_overflows_float16_is_refused_by_its_row(tmp_path: Path) -> None:
    """Arithmetic that `auto` takes on a T4 stores no infinity, and the row is named."""
    folder = save_toy_model(tmp_path / "loud")
    model: Any = transformers.AutoModel.from_pretrained(folder)
    model.layers[0].mlp.down_proj.weight.data *= 1e4
    model.save_pretrained(folder)
    recipe = Recipe(model=str(folder), max_length=16, compute_dtype="float16", dtype="float32")
    ours = Extractor(recipe, layers=[1], poolings=["mean"], device="cpu")
    message = r"text 0, layer 1, pooling mean: the feature is not finite\. Pass --compute-dtype f"
    with pytest.raises(RowError, match=message):
        ours.features(toy_texts(3, longest=13))
