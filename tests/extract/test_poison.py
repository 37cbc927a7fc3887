"""Rows without a feature that could be stored: named, while all others are done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from sabotaged import POISON
from toy_cache import tree

from llmembed.cache_format.tools import finalize
from llmembed.common.errors import ExtractionError, LLMEmbedWarning, RowError
from llmembed.extract import ExtractConfig, Extractor, extract
from llmembed.extract.engines import outcome

GOING_ON = r"row 128 is poison\. Going on with the other blocks of rows\."
NAMED = r"row 128 is poison\. All other blocks of rows are done\."


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Row 128 has no feature until this is undone."""
    monkeypatch.setattr(Extractor, "launch", Extractor.launch)
    exec(POISON, {})  # noqa: S102
    return monkeypatch


def test_a_rank_does_the_rest_of_its_share(
    settings: dict[str, Any],
    whole: dict[str, bytes],
    tmp_path: Path,
    poison: pytest.MonkeyPatch,
) -> None:
    """A rank leaves the block of a poison row to its next start, and no other."""
    config = ExtractConfig(**settings, cache=str(tmp_path / "shared.zarr"), rank=0, world=1)
    with pytest.warns(LLMEmbedWarning, match=GOING_ON), pytest.raises(RowError, match=NAMED):
        extract(config)
    poison.undo()
    assert extract(config).n_rows_computed == 64
    finalize(tmp_path / "shared.zarr")
    assert tree(tmp_path / "shared.zarr") == whole


def test_all_rows_poison_are_not_all_tried(
    settings: dict[str, Any], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no block can be stored, the run stops after some; what is not finite says so."""
    import safetensors.torch

    monkeypatch.setattr(outcome, "HOPELESS", 2)
    spoiled = tmp_path / "spoiled"
    shutil.copytree(llama, spoiled)
    tensors = safetensors.torch.load_file(llama / "model.safetensors")
    tensors["layers.0.mlp.down_proj.weight"].fill_(float("inf"))
    safetensors.torch.save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    config = ExtractConfig(**settings | {"model": str(spoiled)}, cache=str(tmp_path / "c.zarr"))
    named = r"row \d+, layer \d, pooling mean: the feature is not finite.* None of 2 blocks could"
    with (
        pytest.warns(LLMEmbedWarning, match="Going on"),
        pytest.raises(ExtractionError, match=named),
    ):
        extract(config)
