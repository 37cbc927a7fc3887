"""Blocks that are to be compiled on a machine that cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_model import toy_texts

from llmembed.extract import Extractor, Recipe
from llmembed.extract.features.packing import are_compiled, compile_blocks


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, on import
def test_no_compiler_is_found_out_once_and_said_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block finds it out for all others, and features are those of blocks as they are."""
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    recipe = Recipe(model=str(llama), max_length=20, compute_dtype="float32", dtype="float32")
    ours = Extractor(recipe, layers=[3], poolings=["mean"], device="cpu", token_budget=64)
    ours.n_lanes = 1  # as on a GPU
    texts = toy_texts(30, longest=14)
    expected = ours.features(texts)["mean", 3]
    torch._dynamo.reset()
    compile_blocks(ours.backbone)
    assert are_compiled(ours.backbone)
    with (
        config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}),  # a monkeypatch leaves none
        pytest.warns(match="could not be compiled .* Install a C") as warned,
    ):
        found = ours.features(texts)["mean", 3]
    assert len(warned) == 1
    assert not are_compiled(ours.backbone)
    np.testing.assert_array_equal(found, expected)
