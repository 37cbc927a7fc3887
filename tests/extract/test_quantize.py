"""int8 weights and activations, by bitsandbytes on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_model import toy_texts

from llmembed.extract.extractor import Extractor
from llmembed.extract.recipe import Recipe

TEXTS = toy_texts(20)


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
