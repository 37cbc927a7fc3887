"""Fixtures of an extraction of a few hundred texts by a toy model, and of the cache it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy_cache import tree


@pytest.fixture
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of models stay out of the user's cache folder, and caches are of one date."""
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of three layers."""
    from toy_model import save_toy_model

    return save_toy_model(tmp_path_factory.mktemp("models") / "toy-llama", "llama")


@pytest.fixture
def settings(llama: Path, own_home: None, tmp_path: Path) -> dict[str, Any]:
    """An extraction of 300 texts: five blocks of 64 rows.

    A mean over tokens hides from float16 in which batch a text was computed.
    """
    from toy_model import write_texts

    return {
        "model": str(llama),
        "layers": "1,3",
        "pooling": ("mean",),
        "dataset": str(write_texts(tmp_path / "toy.csv", 300)),
        "max_length": 16,
        "compute_dtype": "float32",
        "token_budget": 64,
    }


@pytest.fixture
def whole(settings: dict[str, Any], tmp_path: Path) -> dict[str, bytes]:
    """Every file of the cache that one process makes of it."""
    from llmembed.extract import ExtractConfig, extract

    return tree(Path(extract(ExtractConfig(**settings, cache=str(tmp_path / "whole.zarr"))).path))
