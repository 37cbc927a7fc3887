from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clustered import MakeCache, write_cache


@pytest.fixture
def make_cache(tmp_path: Path) -> MakeCache:
    def make(
        splits: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
        *,
        name: str = "tiny.zarr",
        **options: Any,
    ) -> Path:
        return write_cache(tmp_path / name, splits, **options)

    return make
