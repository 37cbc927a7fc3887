"""Caches written by every version of the format are read forever."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from make_golden import make_golden, make_golden_1_1
from toy_cache import Toy, assert_toy, tree, write_toy
from toy_rows import rows_of

from llmembed.cache_format import open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import convert, verify
from llmembed.common.errors import CacheIncompleteError

GOLDEN = Path(__file__).parent.parent / "golden/format_1"
GOLDEN_1_1 = GOLDEN.with_name("format_1_1")
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


@pytest.mark.parametrize("name", ["complete", "grown", "archive"])
def test_golden_caches_of_minor_version_1_are_read(name: str) -> None:
    """Label sets, weights and groups of an old cache are those that were written."""
    split = open_cache(GOLDEN_1_1 / name)["train"]
    for column, expected in rows_of(100).items():
        np.testing.assert_array_equal(getattr(split, column), expected)
    np.testing.assert_array_equal(split.features(8), Toy(100).features("mean", 8))
    assert verify(open_store(GOLDEN_1_1 / name)).damage == ()


def test_golden_hdf5_of_minor_version_1_is_read(tmp_path: Path) -> None:
    """An old HDF5 file with further columns becomes the cache it was made from."""
    convert(GOLDEN_1_1 / "complete.h5", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(GOLDEN_1_1 / "complete")


def test_minor_version_1_has_not_changed(tmp_path: Path) -> None:
    """This version writes the bytes of minor version 1; if not, it needs another number."""
    make_golden_1_1(tmp_path)
    for name in ("complete", "grown"):
        written, golden = tree(tmp_path / name), tree(GOLDEN_1_1 / name)
        del written[HAS_VERSIONS], golden[HAS_VERSIONS]
        assert written == golden
