"""Too little memory, for real: the address space of this process is limited for the time."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from little_memory import MIB, only

from llmembed.common.errors import ExtractionError, LLMEmbedWarning
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.features.extractor import Extractor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")


def extractor(folder: Path) -> Extractor:
    recipe = Recipe(model=str(folder), max_length=60, compute_dtype="float32", dtype="float32")
    return Extractor(recipe, layers=[1, 2], poolings=["mean"], token_budget=1 << 20, device="cpu")


def test_too_large_a_budget_is_halved_until_it_fits(llama: Path) -> None:
    """Memory runs out, one warning says so, and all features are those of the undisturbed run."""
    ours = extractor(llama)
    token_ids = np.random.default_rng(0).integers(5, 90, size=(2000, 60)).tolist()
    with only(12 * MIB), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        features = ours.compute(token_ids)
    messages = [str(w.message) for w in caught if w.category is LLMEmbedWarning]
    assert len(messages) == 1
    assert "tokens a batch do not fit in the memory of cpu: going on with" in messages[0]
    assert ours.token_budget < 1 << 16
    expected = extractor(llama).compute(token_ids)
    for name, feature in features.items():
        error = np.linalg.norm(feature - expected[name], axis=1)
        assert (error <= 1e-5 * np.linalg.norm(expected[name], axis=1)).all()


def test_a_text_that_does_not_fit_alone_is_named(llama: Path) -> None:
    """A single text without room ends the run with its row and its length."""
    ours = extractor(llama)
    ours.features(["w1"])
    with only(MIB // 4), pytest.raises(ExtractionError, match="text 0: its 2,000,000 tokens alone"):
        ours.compute([[7] * 2_000_000])
