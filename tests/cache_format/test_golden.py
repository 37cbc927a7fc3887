"""Caches written by every version of the format are read forever."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from make_golden import make_golden
from toy_cache import Toy, assert_toy, tree, write_toy

from llmembed.cache_format import open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import convert, verify
from llmembed.common.errors import CacheIncompleteError

GOLDEN = Path(__file__).parent.parent / "golden/format_1"
HAS_VERSIONS = "zarr.json"  # the root names the versions of the software that wrote it


@pytest.mark.parametrize("name", ["complete", "grown", "archive"])
def test_golden_caches_are_read(name: str) -> None:
    """Features, labels and hashes of an old cache are those that were written."""
    assert_toy(open_cache(GOLDEN / name), 100)
    assert verify(open_store(GOLDEN / name)).damage == ()


def test_a_golden_partial_cache_resumes(tmp_path: Path) -> None:
    """A cache that an old version left half-done is completed by this one."""
    path = shutil.copytree(GOLDEN / "partial", tmp_path / "partial")
    split = open_cache(path)["train"]
    with pytest.raises(CacheIncompleteError, match="36 of 100 rows"):
        split.features(8)
    partial = split.features(8, allow_partial=True)[:64]
    np.testing.assert_array_equal(partial, Toy().features("mean", 8)[:64])
    write_toy(path, 100, poolings=["mean"])
    assert tree(path) == tree(GOLDEN / "complete")


def test_golden_hdf5_is_read(tmp_path: Path) -> None:
    """An old HDF5 file becomes the cache it was made from."""
    convert(GOLDEN / "complete.h5", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(GOLDEN / "complete")


def test_the_format_has_not_changed(tmp_path: Path) -> None:
    """This version writes the bytes of format 1; if not, it needs another format number."""
    make_golden(tmp_path)
    for name in ("complete", "grown", "partial"):
        written, golden = tree(tmp_path / name), tree(GOLDEN / name)
        del written[HAS_VERSIONS], golden[HAS_VERSIONS]
        assert written == golden
