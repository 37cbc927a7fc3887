"""Chunk files mapped behind each other: the same rows as a copy, and no copy."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from toy_cache import write_toy

from llmembed.cache_format import open_cache
from llmembed.cache_format.stores.mapping import can_map, map_behind_each_other
from llmembed.common.errors import CacheCorruptError

PAGE = mmap.ALLOCATIONGRANULARITY


@contextmanager
def opened(path: Path) -> Iterator[int]:
    with path.open("rb") as file:
        yield file.fileno()


def write_files(folder: Path, n_files: int, size_bytes: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / str(index) for index in range(n_files)]
    for path in paths:
        path.write_bytes(rng.bytes(size_bytes) + b"tail")
    return paths


@pytest.mark.parametrize("n_files", [1, 2, 9])
def test_heads_of_files_are_one_buffer(tmp_path: Path, n_files: int) -> None:
    """It holds every file's head and no tail, is read-only, and outlives the files."""
    paths = write_files(tmp_path, n_files, 2 * PAGE)
    expected = b"".join(path.read_bytes()[: 2 * PAGE] for path in paths)
    mapped = map_behind_each_other([opened(path) for path in paths], 2 * PAGE)
    for path in paths:
        path.unlink()
    assert bytes(mapped) == expected
    assert mapped.readonly


def n_mappings(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(folder))


def test_a_mapping_ends_with_the_last_view_of_it(tmp_path: Path) -> None:
    """A slice keeps all of it; nothing is left when the slice is gone."""
    paths = write_files(tmp_path, 3, PAGE)
    rows = np.frombuffer(map_behind_each_other([opened(path) for path in paths], PAGE), np.uint8)
    some = rows[5:9]
    del rows
    assert n_mappings(tmp_path) == 3
    del some
    assert n_mappings(tmp_path) == 0


def test_heads_that_do_not_fill_pages_cannot_be_mapped() -> None:
    """Nor can nothing, nor more files than a process may map."""
    assert can_map(2, PAGE)
    assert not can_map(2, PAGE - 2)
    assert not can_map(2, 0)
    assert not can_map(60_000, PAGE)


@pytest.mark.parametrize("n_rows", [1100, 200])
@pytest.mark.parametrize("rows", [slice(None), slice(60, 190), slice(127, 130)])
def test_mapped_and_copied_rows_are_the_same(tmp_path: Path, n_rows: int, rows: slice) -> None:
    """Blocks of 256 rows fill whole pages, blocks of 64 do not; both give the rows one by one."""
    write_toy(tmp_path / "toy.zarr", n_rows)
    split = open_cache(tmp_path / "toy.zarr")["train"]
    numbers = np.arange(n_rows)[rows]
    expected = np.concatenate([split.features(8, pooling="mean", rows=[row]) for row in numbers])
    for verify in (False, True):
        found = split.features(8, pooling="mean", rows=rows, verify=verify)
        np.testing.assert_array_equal(found, expected)


def test_a_whole_layer_is_not_copied(tmp_path: Path) -> None:
    """Its array is a view of the chunk files, read-only."""
    write_toy(tmp_path / "toy.zarr", 1100)
    features = open_cache(tmp_path / "toy.zarr")["train"].features(8, pooling="mean")
    assert n_mappings(tmp_path) == 5
    assert not features.flags.writeable
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        features.flags.writeable = True


@pytest.mark.parametrize("verify", [False, True])
def test_damage_is_named_where_rows_are_mapped(tmp_path: Path, *, verify: bool) -> None:
    """A missing or truncated chunk always, other bytes where they are to be verified."""
    path = tmp_path / "toy.zarr"
    write_toy(path, 1100)
    chunks = path / "train/tiny/mean/layer_008"
    split = open_cache(path)["train"]
    if verify:
        with (chunks / "c.1.0").open("r+b") as file:
            file.write(b"other")
        with pytest.raises(CacheCorruptError, match="rows 256-512: the bytes are not those"):
            split.features(8, pooling="mean", verify=True)
    with (chunks / "c.3.0").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CacheCorruptError, match=r"c\.3\.0 has 5000 bytes instead of 8196"):
        split.features(8, pooling="mean", verify=verify)
    (chunks / "c.2.0").unlink()
    with pytest.raises(CacheCorruptError, match=r"c\.2\.0 is missing"):
        split.features(8, pooling="mean", verify=verify)
