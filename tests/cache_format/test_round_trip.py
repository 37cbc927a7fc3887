"""Write, read, resume, extend."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_cache import DATASET, HIDDEN_SIZE, SOURCE, Toy, assert_toy, tree, write_toy

from llmembed.cache_format import Cache, CacheWriter, open_cache
from llmembed.common.errors import (
    CacheIncompleteError,
    CacheSpaceError,
    ConfigError,
    ExtractionError,
)


@pytest.mark.parametrize("n_rows", [0, 1, 63, 64, 65, 200, 1000])
def test_features_come_back_as_written(tmp_path: Path, n_rows: int) -> None:
    """Writing then reading is the identity, for no rows, one, and every edge of a block."""
    write_toy(tmp_path / "toy.zarr", n_rows)
    assert_toy(open_cache(tmp_path / "toy.zarr"), n_rows)


def test_a_cache_tells_what_it_holds(toy_cache: Cache, toy_path: Path) -> None:
    """Splits, sources, labels and layers are read off the cache."""
    assert toy_cache.path == toy_path
    assert toy_cache.splits == ("train",)
    assert toy_cache.sources == {"tiny": SOURCE}
    assert toy_cache.labels == ("no", "yes", "maybe")
    assert toy_cache.dataset == DATASET
    assert toy_cache["train"].n_rows == 200
    assert toy_cache["train"].layers(pooling="mean") == (4, 8)
    assert len(toy_cache.fingerprint) == 64


def test_a_cache_is_a_mapping_of_its_splits(toy_path: Path) -> None:
    """It has a length, an order and members, and a split as many rows; others are refused."""
    write_toy(toy_path, 70, split="test")
    cache = open_cache(toy_path)
    assert (len(cache), list(cache), [*cache.keys()]) == (2, ["test", "train"], ["test", "train"])
    assert {name: len(split) for name, split in cache.items()} == {"test": 70, "train": 200}
    assert "train" in cache
    assert np.str_("train") in cache
    assert "tran" not in cache
    assert cache.get("tran") is None
    assert cache == cache  # as other objects: its content would have to be read
    assert {cache: 1}[cache] == 1
    for absent in ("tran", 0, ["train"]):
        with pytest.raises(
            ConfigError, match=r"does not exist.* Known: test, train\. .* holds the"
        ):
            cache[absent]  # type: ignore[index]


def test_nothing_is_falsy_for_want_of_rows(tmp_path: Path) -> None:
    """A cache or split that is empty is there: `cache or other` asks for no more."""
    write_toy(tmp_path / "toy.zarr", 0)
    cache = open_cache(tmp_path / "toy.zarr")
    assert len(cache["train"]) == 0
    assert cache["train"]


def test_a_cache_prints_what_it_holds(toy_path: Path) -> None:
    """A line a split, with its rows and the layers and poolings of its sources."""
    other = dataclasses.replace(SOURCE, name="other", fingerprint={"weights": "def"})
    write_toy(toy_path, 70, split="test", source=other, layers=(3, 12), poolings=("mean",))
    write_toy(toy_path, source=other, layers=(3, 12), poolings=("mean",))
    write_toy(toy_path, source=other, layers=(12,), poolings=("pooler",))
    cache = open_cache(toy_path)
    lines = [
        f"Cache {toy_path}: toy, 3 classes",
        "  test: 70 rows; other: mean of layers 3, 12",
        (
            "  train: 200 rows; other: mean of layers 3, 12 and pooler of layer 12; "
            "tiny: last, mean of layers 4, 8"
        ),
    ]
    assert repr(cache) == str(cache) == "\n".join(lines)
    assert repr(cache["test"]) == f"Split {lines[1].strip()} ({toy_path})"


def test_a_cache_of_many_splits_prints_the_first(tmp_path: Path) -> None:
    """So that printing one that grew by every call reads and shows no more than ten."""
    with CacheWriter(tmp_path / "toy.zarr", dataset=DATASET) as writer:
        for number in range(12):
            toy = Toy(1)
            writer.add_split(f"s{number:02}", labels=toy.labels, text_hash=toy.text_hash)
    lines = repr(open_cache(tmp_path / "toy.zarr")).splitlines()
    assert lines[1] == "  s00: 1 row; no features"
    assert (len(lines), lines[-1]) == (12, "  and 2 more")


def test_what_cannot_be_read_is_told_by_a_print(toy_path: Path) -> None:
    """Printing a damaged cache does not fail, and says what is damaged."""
    (toy_path / "train" / "tiny" / "zarr.json").write_text("{")
    assert re.search(r"\n  train: 200 rows; .*zarr\.json", repr(open_cache(toy_path)))


def test_opening_does_not_import_zarr(toy_path: Path) -> None:
    """Reading a plain cache needs neither zarr-python nor torch."""
    code = (
        "import sys; from llmembed.cache_format import open_cache\n"
        f"open_cache({str(toy_path)!r})['train'].features(8, pooling='mean')\n"
        "assert not {'zarr', 'torch', 'h5py', 'fsspec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(-200, 199), max_size=50))
def test_any_rows_in_any_order(tmp_path_factory: pytest.TempPathFactory, rows: list[int]) -> None:
    """Row numbers mean what they mean to numpy, negative, repeated and unsorted ones too."""
    path = tmp_path_factory.getbasetemp() / "rows.zarr"
    if not path.exists():
        write_toy(path)
    chosen = np.array(rows, dtype=np.int64)
    found = open_cache(path)["train"].features(8, pooling="mean", rows=chosen, verify=True)
    np.testing.assert_array_equal(found, Toy().features("mean", 8)[chosen])


@pytest.mark.parametrize(
    "rows", [slice(3, 9), slice(60, 70), slice(None, None, 3), slice(9, 3), slice(-5, None)]
)
def test_slices_and_masks(toy_cache: Cache, rows: slice) -> None:
    """Slices and boolean masks select what they select in numpy."""
    expected = Toy().features("mean", 8)
    split = toy_cache["train"]
    np.testing.assert_array_equal(split.features(8, pooling="mean", rows=rows), expected[rows])
    mask = np.zeros(200, bool)
    mask[rows] = True
    np.testing.assert_array_equal(split.features(8, pooling="mean", rows=mask), expected[mask])


def test_one_block_is_a_view(tmp_path: Path) -> None:
    """A split of one block is mapped, not copied."""
    write_toy(tmp_path / "toy.zarr", 50)
    features = open_cache(tmp_path / "toy.zarr")["train"].features(8, pooling="mean")
    assert not features.flags.writeable
    assert not features.flags.owndata


def test_resuming_gives_the_same_bytes(tmp_path: Path) -> None:
    """A cache written in three sittings equals one written at once, file by file."""
    write_toy(tmp_path / "whole.zarr")
    write_toy(tmp_path / "parts.zarr", n_blocks=1)
    write_toy(tmp_path / "parts.zarr", n_blocks=2)
    write_toy(tmp_path / "parts.zarr")
    assert tree(tmp_path / "parts.zarr") == tree(tmp_path / "whole.zarr")


def test_a_complete_cache_is_not_touched(toy_path: Path) -> None:
    """Asking for what is there plans nothing and rewrites no file."""
    before = {file: file.stat().st_mtime_ns for file in toy_path.rglob("*.*") if file.is_file()}
    plan = write_toy(toy_path, layers=[8], poolings=["mean"])
    assert plan.blocks == ()
    assert plan.n_rows_missing == plan.size_bytes == 0
    after = {file: file.stat().st_mtime_ns for file in toy_path.rglob("*.*") if file.is_file()}
    assert after == before


def test_only_missing_layers_and_poolings_are_planned(toy_path: Path) -> None:
    """A superset computes what is missing and leaves the chunks that are there alone."""
    chunk = toy_path / "train/tiny/mean/layer_008/c.0.0"
    before = chunk.stat().st_mtime_ns
    plan = write_toy(toy_path, layers=[8, 12], poolings=["mean", "max"])
    assert {key for block in plan.blocks for key in block.missing} == {
        ("max", 8),
        ("max", 12),
        ("mean", 12),
    }
    assert chunk.stat().st_mtime_ns == before
    assert_toy(open_cache(toy_path))


def test_a_second_source_and_split(toy_path: Path) -> None:
    """Splits and sources are added one by one; None stops meaning the only one."""
    other = dataclasses.replace(SOURCE, name="other", fingerprint={"weights": "def"})
    write_toy(toy_path, source=other)
    write_toy(toy_path, 70, split="test")
    cache = open_cache(toy_path)
    assert cache.splits == ("test", "train")
    assert_toy(cache)
    assert_toy(cache, 70, split="test")
    with pytest.raises(ConfigError, match=r"has 2 sources \(other, tiny\); say which with source="):
        cache["train"].features(8, pooling="mean")


@pytest.mark.parametrize("n_rows", [201, 256, 300])
def test_appended_rows_alone_are_computed(toy_path: Path, n_rows: int) -> None:
    """A data set that grew at its end extracts the new rows only, and keeps the old bytes."""
    plan = write_toy(toy_path, n_rows)
    assert plan.n_rows_missing == n_rows - 200
    assert plan.blocks[0].compute_from == 200
    assert plan.blocks[0].start == 192
    assert_toy(open_cache(toy_path), n_rows)
    assert write_toy(toy_path, n_rows).blocks == ()


def test_growth_that_was_interrupted_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """Growing in two sittings equals growing in one."""
    for name in ("one", "two"):
        write_toy(tmp_path / name, 200)
    write_toy(tmp_path / "one", 400)
    write_toy(tmp_path / "two", 400, n_blocks=1)
    write_toy(tmp_path / "two", 400)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_partial_split_is_refused(tmp_path: Path) -> None:
    """Rows that were never committed are an error, or NaN if asked for."""
    write_toy(tmp_path / "toy.zarr", n_blocks=2)
    split = open_cache(tmp_path / "toy.zarr")["train"]
    with pytest.raises(CacheIncompleteError, match=r"72 of 200 rows of train/tiny/mean/layer_008"):
        split.features(8, pooling="mean")
    assert split.layers(pooling="mean") == ()
    assert split.arrays["tiny", "mean", 8] == 128
    partial = split.features(8, pooling="mean", allow_partial=True)
    np.testing.assert_array_equal(partial[:128], Toy().features("mean", 8)[:128])
    assert np.isnan(partial[128:]).all()


def test_a_dry_run_writes_nothing(tmp_path: Path, toy_path: Path) -> None:
    """Planning a new cache makes no folder; planning more of one changes no byte."""
    before = tree(toy_path)
    for path in (tmp_path / "new.zarr", toy_path):
        with CacheWriter(path, dataset=DATASET, dry_run=True) as writer:
            writer.add_source(SOURCE)
            writer.add_split("train", labels=Toy().labels, text_hash=Toy().text_hash)
            plan = writer.plan("train", "tiny", arrays=[("mean", 1), ("mean", 8)])
            missing = 1 if path == toy_path else 2
            assert plan.size_bytes == missing * 4 * (64 * 2 * HIDDEN_SIZE + 4)
            with pytest.raises(CacheSpaceError, match=r"need 1000000\.000 GB, but .* are free at"):
                writer.check_space(10**15)
    assert not (tmp_path / "new.zarr").exists()
    assert tree(toy_path) == before


def test_overflow_names_row_layer_and_remedy(tmp_path: Path) -> None:
    """A feature that float16 cannot hold is refused before its block is committed."""
    features = Toy().features("mean", 4).astype(np.float32)
    features[70, 3] = 70_000
    with CacheWriter(tmp_path / "toy.zarr", dataset=DATASET) as writer:
        writer.add_source(SOURCE)
        writer.add_split("train", labels=Toy().labels, text_hash=Toy().text_hash)
        plan = writer.plan("train", "tiny", arrays=[("mean", 4)])
        block = plan.blocks[1]
        with pytest.raises(
            ExtractionError, match=r"layer_004, row 70: feature 3 is inf in float16"
        ):
            writer.write(
                plan,
                block,
                n_tokens=Toy().n_tokens[64:128],
                features={("mean", 4): features[64:128]},
            )
    assert not list(tmp_path.rglob("*-0064-*.json"))


def test_plain_zarr_and_xarray_read_it(toy_path: Path) -> None:
    """Other tools open the cache without a warning and see the same features."""
    import xarray as xr
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(toy_path, mode="r")
        names = [name for name, _ in group.members(max_depth=None)]
        data = xr.open_zarr(toy_path, group="train/tiny/mean")
        array = group["train/tiny/mean/layer_008"][:]
    expected = Toy().features("mean", 8)
    assert "train/tiny/mean/layer_008" in names
    assert ".llmembed" not in names
    np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(data["layer_008"].values, expected)
    assert data["layer_008"].dims == ("sample", "hidden")


def test_plain_zarr_sees_complete_arrays_only(toy_path: Path) -> None:
    """Consolidated metadata leaves out an array that is still being written."""
    import zarr

    write_toy(toy_path, layers=[12], poolings=["mean"], n_blocks=1)
    names = [name for name, _ in zarr.open_group(toy_path, mode="r").members(max_depth=None)]
    assert "train/tiny/mean/layer_008" in names
    assert "train/tiny/mean/layer_012" not in names


def test_float32_is_stored_when_asked(tmp_path: Path) -> None:
    """A float32 cache keeps every bit of a float32 feature."""
    features = np.linspace(0, 1, 50 * HIDDEN_SIZE, dtype=np.float32).reshape(50, HIDDEN_SIZE)
    toy = Toy(50)
    with CacheWriter(tmp_path / "toy.zarr", dataset=DATASET, fsync=True) as writer:
        writer.add_source(SOURCE)
        writer.add_split("train", labels=toy.labels, text_hash=toy.text_hash)
        plan = writer.plan("train", "tiny", arrays=[("mean", 4)], dtype="float32")
        writer.write(plan, plan.blocks[0], n_tokens=toy.n_tokens, features={("mean", 4): features})
        writer.finish("train", "tiny")
    found = open_cache(tmp_path / "toy.zarr")["train"].features(4)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, features)
