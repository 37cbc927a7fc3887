"""Weights of four bits, and int8 weights and activations, by bitsandbytes on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from toy_model import save_toy_model, toy_texts

from llmembed.common.errors import MissingPackageError
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.config import ExtractConfig
from llmembed.extract.features.extractor import Extractor
from llmembed.extract.features.selfcheck import TOLERANCE

TEXTS = toy_texts(20, longest=13)


def extractor(folder: Path, quantize: str | None, token_budget: int = 64) -> Extractor:
    recipe = Recipe(
        model=str(folder),
        max_length=16,
        compute_dtype="float32",
        dtype="float32",
        quantize=quantize,
    )
    return Extractor(recipe, layers=[2], poolings=["mean"], token_budget=token_budget, device="cpu")


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    distance = np.linalg.norm(found - expected, axis=1)
    return float((distance / np.linalg.norm(expected, axis=1)).max())


def test_the_extra_is_asked_for(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes `--quantize` says how to install it, and nothing is loaded."""
    monkeypatch.setattr("llmembed.extract.backbones.recipe.find_spec", lambda name: None)
    message = re.escape(
        "--quantize nf4 needs bitsandbytes, which is not installed. Run pip install"
    )
    with pytest.raises(MissingPackageError, match=message + r" 'llmembed-cache\[quantize\]'"):
        ExtractConfig(model=str(llama), layers="1", quantize="nf4")
    with pytest.raises(MissingPackageError, match=message):
        Recipe.from_record(extractor(llama, "nf4").recipe.record)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_int8_is_near_the_plain_model(
    kind: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Activations of 8 bits change these toys of wide weights by up to 13 %, in silence."""
    folder = request.getfixturevalue(kind)
    exact = extractor(folder, None).features(TEXTS)["mean", 2]
    found = extractor(folder, "int8").features(TEXTS)["mean", 2]
    assert 1e-4 < largest_difference(found, exact) < 0.2
    assert not [record for record in caplog.records if "MatMul8bitLt" in record.message]


def test_quantised_features_are_others(llama: Path) -> None:
    """The fingerprint tells them apart, so a cache of one refuses the other."""
    identities = [extractor(llama, kind).recipe.fingerprint for kind in (None, "nf4", "int8")]
    assert len({repr(identity) for identity in identities}) == 3


def test_nf4_features_are_those_of_the_weights_it_stands_for(tmp_path: Path) -> None:
    """Transformers with each weight dequantised, one text at a time, gives the same to 1e-4.

    So with products in float32; on a CPU with AVX512-BF16 bitsandbytes packs the weights and
    multiplies in bfloat16 whatever was asked, which may differ by what rounding to bfloat16 may.
    The check of the first batch has passed both times, or there were no features.
    """
    import bitsandbytes

    folder = save_toy_model(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    ours = extractor(folder, "nf4")
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    n_dequantised = 0
    for name, module in ours.backbone.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight: Any = module.weight
            plain = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            model.get_submodule(name).weight.data = plain.float()
            module.support_avx512bf16_for_cpu = False
            n_dequantised += 1
    assert n_dequantised == 2 * 7  # projections of the two blocks that are kept
    found = ours.features(TEXTS)["mean", 2]
    packed = extractor(folder, "nf4").features(TEXTS)["mean", 2]
    expected = []
    with torch.inference_mode():
        for ids in ours.tokenize(TEXTS).ids:
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            expected.append(states[2][0].mean(dim=0).numpy())
    assert largest_difference(found, np.stack(expected)) < 1e-4
    assert largest_difference(packed, np.stack(expected)) < TOLERANCE["bfloat16"]
    exact = extractor(folder, None).features(TEXTS)["mean", 2]
    assert largest_difference(found, exact) > 1e-2
