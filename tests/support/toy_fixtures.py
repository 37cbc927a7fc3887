"""A finished toy cache, and one date for all caches, so that they can be equal byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_cache import write_toy

from llmembed.cache_format import Cache, open_cache


@pytest.fixture(autouse=True)
def same_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two caches made with the same SOURCE_DATE_EPOCH can be equal byte for byte."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture
def toy_path(tmp_path: Path) -> Path:
    """A finished cache of 200 rows, 2 layers, 2 poolings."""
    write_toy(tmp_path / "toy.zarr")
    return tmp_path / "toy.zarr"


@pytest.fixture
def toy_cache(toy_path: Path) -> Cache:
    return open_cache(toy_path)
