"""What readers see while a removal is under way, or after one that was killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from faulty_disk import Fault, count_operations, with_fault
from toy_cache import write_toy

from llmembed.cache_format.tools import remove


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "toy.zarr"
    write_toy(path, 100, layers=[4, 8], poolings=["mean", "last"])
    write_toy(path, 40, layers=[4, 8], poolings=["mean"], split="test")
    return path


def as_plain_readers_see(path: Path) -> dict[str, np.ndarray]:
    """Read every array that the consolidated metadata name; none where nothing is complete."""
    group = zarr.open_group(path, mode="r")
    if group.metadata.consolidated_metadata is None:
        return {}
    members = group.members(max_depth=None)
    return {name: one[:] for name, one in members if isinstance(one, zarr.Array)}


@pytest.mark.fault("F4")
@pytest.mark.parametrize(
    "choice",
    [
        {"layers": [4]},
        {"pooling": "last"},
        {"split": "test"},
        {"source": "tiny"},
        {"split": "test", "source": "tiny"},
    ],
)
@pytest.mark.parametrize(
    "every", [pytest.param(7, id="few"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)
def test_no_reader_is_led_to_what_a_killed_removal_deleted(
    start: Path, disk: Path, tries: Callable[[int], None], choice: dict[str, Any], every: int
) -> None:
    """After a kill at any operation, what the metadata name is there, row by row."""
    path, before = disk / "toy.zarr", as_plain_readers_see(start)

    def removing() -> None:
        remove(path, **choice)

    shutil.copytree(start, path)
    n_operations = count_operations(removing, disk)
    kept = as_plain_readers_see(path)
    assert kept.keys() < before.keys()
    kills = range(1, n_operations + 1, every)
    for at in kills:
        shutil.rmtree(path)
        shutil.copytree(start, path)
        assert with_fault(removing, disk, Fault("kill", at)).how == "killed"
        seen = as_plain_readers_see(path)
        assert kept.keys() <= seen.keys(), at
        for name, values in seen.items():
            np.testing.assert_array_equal(values, before[name], err_msg=f"{name}, {at}")
    tries(len(kills))
