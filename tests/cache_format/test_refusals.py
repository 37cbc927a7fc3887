"""What contradicts a cache is refused before anything is written, with both values named."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_cache import DATASET, SOURCE, Toy, assert_toy, tree, write_toy

from llmembed.cache_format import Cache, CacheWriter, SourceInfo, open_cache
from llmembed.cache_format.stores import LocalStore
from llmembed.cache_format.stores.local import storage_error
from llmembed.common.errors import (
    CacheError,
    CacheFormatError,
    CacheLockedError,
    CacheMismatchError,
    CacheNotFoundError,
    CacheSpaceError,
    CacheStorageError,
    ConfigError,
    DataError,
)


def add(path: Path, toy: Toy | None = None, **changes: Any) -> None:
    """Open a writer and register the toy data set, with changes."""
    toy = toy or Toy()
    columns = {"labels": toy.labels, "text_hash": toy.text_hash} | changes
    with CacheWriter(path, dataset=DATASET) as writer:
        writer.add_source(SOURCE)
        writer.add_split("train", **columns)


def test_another_model_is_refused(toy_path: Path) -> None:
    """Every differing key of the fingerprint is named with both values."""
    fingerprint = {"weights": "def", "max_length": 512, "quantize": "nf4"}
    other = dataclasses.replace(SOURCE, fingerprint=fingerprint)
    before = tree(toy_path)
    with pytest.raises(CacheMismatchError) as caught:
        write_toy(toy_path, source=other)
    assert "quantize: cache None, given 'nf4'; weights: cache 'abc', given 'def'" in str(
        caught.value
    )
    assert tree(toy_path) == before


def test_a_recipe_is_no_identity(toy_path: Path) -> None:
    """The same model found at another place is the same source."""
    other = dataclasses.replace(SOURCE, recipe={"model": "/elsewhere"})
    assert write_toy(toy_path, source=other).blocks == ()


@pytest.mark.parametrize("column", ["labels", "text_hash"])
def test_other_rows_are_refused(toy_path: Path, column: str) -> None:
    """The first differing row is named with both values."""
    values = getattr(Toy(), column).copy()
    values[17] = 1
    with pytest.raises(CacheMismatchError, match=r"row 17 of split 'train': .* 1 was given \(1 of"):
        add(toy_path, **{column: values})


def test_fewer_rows_are_refused(toy_path: Path) -> None:
    """A data set that shrank is another data set."""
    with pytest.raises(CacheMismatchError, match="has 200 rows, but 100 were given"):
        add(toy_path, Toy(100))


def test_another_data_set_is_refused(toy_path: Path) -> None:
    """Name and class names must be those of the cache."""
    other = dataclasses.replace(DATASET, labels=("no", "yes"))
    with (
        pytest.raises(CacheMismatchError, match=r"labels \('no', 'yes', 'maybe'\), but"),
        CacheWriter(toy_path, dataset=other),
    ):
        pass


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.full(200, 3), "label 3 in row 0; with 3 classes, 0 to 2"), (np.zeros(3), "shape")],
)
def test_labels_must_be_classes(tmp_path: Path, labels: Any, message: str) -> None:
    """A label out of range, or a label too few, is refused."""
    with pytest.raises(DataError, match=message):
        add(tmp_path / "toy.zarr", labels=labels.astype(np.int32))


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "label", "", "a" * 101, "a\n", "C"])
def test_names_that_cannot_be_folders(tmp_path: Path, name: str) -> None:
    """Names with paths, dots in front, control characters or reserved words are refused."""
    with (
        CacheWriter(tmp_path / "toy.zarr", dataset=DATASET) as writer,
        pytest.raises(ConfigError, match="cannot name a source"),
    ):
        writer.add_source(dataclasses.replace(SOURCE, name=name))


def test_a_refused_start_leaves_nothing(tmp_path: Path) -> None:
    """A cache that was refused before it began leaves no folder behind."""
    with (
        pytest.raises(ConfigError, match="cannot name a source"),
        CacheWriter(tmp_path / "toy.zarr", dataset=DATASET) as writer,
    ):
        writer.add_source(dataclasses.replace(SOURCE, name=".."))
    assert not (tmp_path / "toy.zarr").exists()


def test_names_that_differ_in_case_only(toy_path: Path) -> None:
    """Some file systems cannot tell such names apart, so they are refused."""
    with pytest.raises(ConfigError, match=r"'Tiny' differs from 'tiny' .* only in case"):
        write_toy(toy_path, source=dataclasses.replace(SOURCE, name="Tiny"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"arrays": [("mean", 13)]},
            r"layer 13 does not exist in tiny, which has 12 layers \(1-12;",
        ),
        ({"arrays": [("../up", 4)]}, "cannot name a pooling"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16' does not exist"),
        ({"split": "trian"}, "split 'trian' does not exist; did you mean 'train'"),
    ],
)
def test_plans_that_cannot_be(toy_path: Path, options: dict[str, Any], message: str) -> None:
    """A layer, pooling, dtype or split that cannot be is named."""
    asked = {"split": "train", "source": "tiny", "arrays": [("mean", 4)]} | options
    with (
        CacheWriter(toy_path, dataset=DATASET) as writer,
        pytest.raises(ConfigError, match=message),
    ):
        writer.plan(**asked)


def test_another_dtype_is_refused(toy_path: Path) -> None:
    """Layers of one source are stored alike."""
    with (
        CacheWriter(toy_path, dataset=DATASET) as writer,
        pytest.raises(CacheMismatchError, match="stored as float16, but float32"),
    ):
        writer.plan("train", "tiny", arrays=[("mean", 1)], dtype="float32")


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    """A block takes exactly the arrays and rows that it lacks."""
    with CacheWriter(tmp_path / "toy.zarr", dataset=DATASET) as writer:
        writer.add_source(SOURCE)
        writer.add_split("train", labels=Toy().labels, text_hash=Toy().text_hash)
        plan = writer.plan("train", "tiny", arrays=[("mean", 4)])
        n_tokens = Toy().n_tokens[:64]
        with pytest.raises(CacheMismatchError, match=r"lack \[\('mean', 4\)\]"):
            writer.write(plan, plan.blocks[0], n_tokens=n_tokens, features={})
        short = {("mean", 4): Toy().features("mean", 4)[:63]}
        with pytest.raises(CacheMismatchError, match=r"\(64, 16\) was expected, \(63, 16\)"):
            writer.write(plan, plan.blocks[0], n_tokens=n_tokens, features=short)


def test_a_closed_writer_writes_nothing(tmp_path: Path) -> None:
    """Writing needs the lock, so a dry run and a closed writer refuse."""
    plan = write_toy(tmp_path / "toy.zarr", n_blocks=1)
    writer = CacheWriter(tmp_path / "toy.zarr", dataset=DATASET)
    with pytest.raises(CacheError, match="writes nothing"):
        writer.write(plan, plan.blocks[1], n_tokens=np.zeros(0), features={})


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_cache_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    """A folder or file of the user is refused, with --overwrite too."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    for name in ("folder", "file"):
        with pytest.raises(CacheFormatError, match="exists and is not a cache"):
            write_toy(tmp_path / name, overwrite=overwrite)
    with pytest.raises(CacheFormatError, match="exists and is not a cache"):
        open_cache(tmp_path / "folder")
    assert (tmp_path / "folder/thesis.txt").read_text() == "years of work"


def test_a_missing_cache_is_named(tmp_path: Path) -> None:
    """Opening what does not exist says so."""
    with pytest.raises(CacheNotFoundError, match=r"there is no cache at .*none\.zarr"):
        open_cache(tmp_path / "none.zarr")


def test_unknown_names_get_a_close_match(toy_cache: Cache) -> None:
    """Splits, sources, poolings and layers that do not exist are answered with those that do."""
    with pytest.raises(ConfigError, match="split 'trian' does not exist; did you mean 'train'"):
        toy_cache["trian"]
    split = toy_cache["train"]
    with pytest.raises(ConfigError, match=r"source 'tyny' .* did you mean 'tiny'"):
        split.features(8, source="tyny")
    with pytest.raises(ConfigError, match=r"pooling 'meen' .* did you mean 'mean'"):
        split.features(8, pooling="meen")
    with pytest.raises(ConfigError, match=r"2 poolings \(last, mean\); say which with pooling="):
        split.features(8)
    with pytest.raises(ConfigError, match=r"layer 5 of pooling 'mean' .* has layers 4, 8"):
        split.features(5, pooling="mean")
    with pytest.raises(ConfigError, match=r"It has rows 0 to 199"):
        split.features(8, pooling="mean", rows=[200])


def test_overwrite_replaces_a_cache(toy_path: Path, tmp_path: Path) -> None:
    """With overwrite nothing of the old cache is left."""
    other = dataclasses.replace(SOURCE, fingerprint={"weights": "def"})
    write_toy(toy_path, 70, source=other, overwrite=True)
    write_toy(tmp_path / "new.zarr", 70, source=other)
    assert tree(toy_path) == tree(tmp_path / "new.zarr")


def test_a_second_writer_is_refused(toy_path: Path) -> None:
    """The holder of the lock is named with process and host."""
    with CacheWriter(toy_path, dataset=DATASET):
        with pytest.raises(CacheLockedError) as caught:
            write_toy(toy_path)
        assert f"process {os.getpid()} on host {platform.node()!r}" in str(caught.value)
    assert_toy(open_cache(toy_path))
    write_toy(toy_path)


def test_a_lock_of_another_host_is_not_taken(toy_path: Path) -> None:
    """Nothing is known of a process elsewhere: the message says how to remove its lock."""
    holder = {"pid": 1, "host": "elsewhere", "started": "5", "token": "x"}
    lock = toy_path / ".llmembed/lock"
    lock.write_text(json.dumps(holder))
    with pytest.raises(CacheLockedError, match=r"process 1 on host 'elsewhere'.*delete .*lock"):
        write_toy(toy_path)
    lock.unlink()
    write_toy(toy_path)


@pytest.mark.parametrize("left", [b"", b"{}", b'{"pid": 1, "host": 2, "started": 3}x'])
def test_a_damaged_lock_is_stale(toy_path: Path, left: bytes) -> None:
    """A lock that says nothing holds nobody off."""
    (toy_path / ".llmembed/lock").write_bytes(left)
    write_toy(toy_path)
    assert not (toy_path / ".llmembed/lock").exists()


def test_a_writer_that_lost_its_lock_stops(tmp_path: Path) -> None:
    """A process that was stopped while another took over writes nothing more."""
    toy = Toy()
    with CacheWriter(tmp_path / "toy.zarr", dataset=DATASET) as writer:
        writer.add_source(SOURCE)
        writer.add_split("train", labels=toy.labels, text_hash=toy.text_hash)
        plan = writer.plan("train", "tiny", arrays=[("mean", 4)])
        (tmp_path / "toy.zarr/.llmembed/lock").write_text("{}")
        features = {("mean", 4): toy.features("mean", 4)[:64]}
        with pytest.raises(CacheLockedError, match="took the lock over"):
            writer.write(plan, plan.blocks[0], n_tokens=toy.n_tokens[:64], features=features)


def test_a_full_disk_keeps_what_was_committed() -> None:
    """No space left is told as such, other failures as failures of the storage."""
    full = storage_error("x.zarr/c.0", OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(full, CacheSpaceError)
    assert "run the same command again to resume" in str(full)
    broken = storage_error("x.zarr/c.0", OSError(errno.EIO, "Input/output error"))
    assert isinstance(broken, CacheStorageError)
    assert "Input/output error" in str(broken)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A path below a file is answered by an error of the tree."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheStorageError, match="could not be read or written"):
        LocalStore(tmp_path / "file/toy.zarr").put("key", [b""])


def test_source_infos_compare_lists_as_json_does(toy_path: Path) -> None:
    """A tuple in a fingerprint equals the list that JSON gives back."""
    source = SourceInfo(
        name="tuple", fingerprint={"t": (1, 2)}, recipe={}, hidden_size=16, n_layers=2
    )
    write_toy(toy_path, source=source, layers=[1])
    assert write_toy(toy_path, source=source, layers=[1]).blocks == ()
