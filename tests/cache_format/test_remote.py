"""Object stores: the same cache in memory and behind a real S3 interface on loopback."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from toy_cache import DATASET, Toy, assert_toy, tree, write_toy

from llmembed.cache_format import CacheWriter, SplitPlan, open_cache
from llmembed.cache_format.stores import FsspecStore, open_store
from llmembed.cache_format.tools import convert, copy, remove, verify
from llmembed.common.errors import (
    CacheCorruptError,
    CacheFormatError,
    CacheLockedError,
    CacheNotFoundError,
    CacheStorageError,
    ConfigError,
)


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket."""
    options = {"endpoint_url": s3_endpoint, "key": "testing", "secret": "testing"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    bucket = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    """Where a cache may be made."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/toy.zarr"
    return f"{request.getfixturevalue('s3_bucket')}/toy.zarr"


def small(path: Path | str, n_rows: int = 100, **options: Any) -> SplitPlan:
    """Write a cache of two blocks and two layers: each request to the server takes a while."""
    return write_toy(path, n_rows, poolings=["mean"], **options)


@pytest.fixture
def small_path(tmp_path: Path) -> Path:
    """The same cache in a folder."""
    small(tmp_path / "toy.zarr")
    return tmp_path / "toy.zarr"


def remote_tree(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {key: store.get(key) or b"" for key in store.walk()}


def test_a_remote_cache_holds_the_same_bytes(url: str, small_path: Path) -> None:
    """Written in two sittings to an object store, a cache equals the local one, key by key."""
    small(url, n_blocks=1)
    small(url)
    assert remote_tree(url) == tree(small_path)
    assert small(url).blocks == ()
    assert verify(open_store(url)).damage == ()


def test_a_remote_cache_reads_the_same(url: str) -> None:
    """Whole arrays, rows and stacks come back; the path is the URL."""
    small(url)
    cache = open_cache(url)
    assert cache.path == url
    assert_toy(cache, 100)
    some = cache["train"].features(8, rows=[90, 3], verify=True)
    np.testing.assert_array_equal(some, Toy().features("mean", 8)[[90, 3]])


def test_caches_travel_between_stores(url: str, small_path: Path, tmp_path: Path) -> None:
    """Local to remote and back keeps every byte."""
    copy(small_path, url)
    copy(url, tmp_path / "back.zarr")
    assert tree(tmp_path / "back.zarr") == tree(small_path)
    with pytest.raises(CacheFormatError, match="exists"):
        copy(small_path, url)


def test_remote_arrays_can_be_removed_and_grown(url: str) -> None:
    """Maintenance works on object stores too."""
    small(url)
    remove(url, layers=[4])
    small(url, 130, layers=[4, 8])
    assert_toy(open_cache(url), 130)


def test_remote_damage_is_named(url: str) -> None:
    """A missing or truncated object is named by verify and refused by reading."""
    small(url)
    store, key = open_store(url), "train/tiny/mean/layer_008/c.1.0"
    store.put(key, [b"short"])
    assert key in verify(store).damage[0].key
    with pytest.raises(CacheCorruptError, match="has 5 bytes instead of"):
        open_cache(url)["train"].features(8)
    store.delete(key)
    with pytest.raises(CacheCorruptError, match="is missing"):
        open_cache(url)["train"].features(8)


def test_a_record_is_created_only_once(url: str) -> None:
    """The store itself refuses a second record of the same block."""
    store = open_store(url)
    assert store.create(".llmembed/commits/x.json", b"first")
    assert not store.create(".llmembed/commits/x.json", b"second")
    assert store.get(".llmembed/commits/x.json") == b"first"


def test_a_remote_lock_is_held(url: str) -> None:
    """Two writers of one remote cache refuse each other."""
    small(url, n_blocks=1)
    with (
        CacheWriter(url, dataset=DATASET),
        pytest.raises(CacheLockedError, match="is being written by process"),
    ):
        small(url)


def test_what_is_not_there_is_named(url: str) -> None:
    """A URL without a cache says so."""
    with pytest.raises(CacheNotFoundError, match="there is no cache at"):
        open_cache(url)


def test_a_remote_archive_is_read(s3_bucket: str, small_path: Path, tmp_path: Path) -> None:
    """An archive made locally is read from the object store by zarr-python."""
    convert(small_path, tmp_path / "archive.zarr", archive=True)
    copy(tmp_path / "archive.zarr", f"{s3_bucket}/archive.zarr")
    assert_toy(open_cache(f"{s3_bucket}/archive.zarr"), 100)


def test_a_store_that_fails(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is down, a missing bucket, a missing client: each is told in one sentence."""
    with pytest.raises(ConfigError, match=r"cannot be opened: .* Install the client"):
        FsspecStore("nonsense://bucket/toy.zarr")
    with pytest.raises(CacheStorageError, match="could not be read or written"):
        small("s3://no-such-bucket/toy.zarr")
    down: dict[str, Any] = {
        "endpoint_url": "http://127.0.0.1:9",
        "key": "testing",
        "secret": "testing",
    }
    down["config_kwargs"] = {"retries": {"max_attempts": 0}}
    monkeypatch.setitem(fsspec.config.conf, "s3", down)
    with pytest.raises(CacheStorageError, match="could not be read or written"):
        open_cache(f"{s3_bucket}/toy.zarr")
