"""Weights packed for a CPU that multiplies bfloat16: the same bits; elsewhere the model as it was.

The suite runs on a large CPU, and there once more held to a small one (`make test-small-cpu`), so
that both are seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_model import toy_texts

from llmembed.extract import Extractor, Recipe
from llmembed.extract.fast import cpu

TEXTS = toy_texts(60)


def extractor(folder: Path) -> Extractor:
    recipe = Recipe(model=str(folder), max_length=30, compute_dtype="bfloat16", dtype="float32")
    return Extractor(recipe, layers=[1, 3], poolings=["mean", "last"], device="cpu")


def is_packed(ours: Extractor) -> set[bool]:
    linear = [m for m in ours.backbone.blocks.modules() if isinstance(m, torch.nn.Linear)]
    return {not module.weight.numel() for module in linear}


@pytest.fixture(autouse=True)
def _fast_at_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmembed.extract.backbones.load.is_fast_at_bfloat16", lambda: True)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_features_stay_the_same(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, without biases (Llama) and with them (BERT), packed where oneDNN can."""
    folder = request.getfixturevalue(kind)
    ours = extractor(folder)
    assert is_packed(ours) == {cpu.onednn_multiplies_bfloat16()}
    found = ours.features(TEXTS)
    monkeypatch.setattr("llmembed.extract.backbones.load.reorder_weights", lambda blocks: None)
    for name, feature in extractor(folder).features(TEXTS).items():
        np.testing.assert_array_equal(found[name], feature)


def test_without_the_operators_the_model_stays_as_it_is(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch promises nothing about them; features are the same without."""
    expected = extractor(llama).features(TEXTS)
    monkeypatch.setattr(cpu, "_reordered", lambda weight: None)
    ours = extractor(llama)
    assert is_packed(ours) == {False}
    for name, feature in ours.features(TEXTS).items():
        np.testing.assert_array_equal(feature, expected[name])
