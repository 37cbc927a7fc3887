"""Damage: every flipped bit, missing and truncated file is found, and reading refuses it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_cache import assert_toy, tree, write_toy

from llmembed.cache_format import open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import Verification, convert, verify
from llmembed.common.errors import (
    CacheCorruptError,
    CacheFormatError,
    LLMEmbedError,
)

CHUNK = "train/tiny/mean/layer_008/c.1.0"
N_FLIPS = int(os.environ.get("LLMEMBED_FLIPS", "60"))


def damage_of(path: Path) -> Verification | LLMEmbedError:
    try:
        return verify(open_store(path))
    except LLMEmbedError as error:
        return error


def names_file(result: Verification | LLMEmbedError, key: str) -> bool:
    if isinstance(result, LLMEmbedError):
        return key in str(result)
    return any(key in damage.key or key in damage.problem for damage in result.damage)


def test_a_sound_cache_has_no_damage(toy_path: Path) -> None:
    """Verifying a finished cache reads all its chunks and finds nothing."""
    result = verify(open_store(toy_path))
    assert result.damage == ()
    assert result.incomplete == ()
    assert result.n_chunks == 4 * 4 + 4  # four blocks of four arrays and of n_tokens
    assert result.size_bytes == 4 * 200 * 32 + 200 * 4


def test_every_flipped_bit_is_found(toy_path: Path) -> None:
    """One bit, anywhere in any file of the cache, does not pass unnoticed."""
    rng = random.Random(0)
    files = [file for file in sorted(toy_path.rglob("*")) if file.is_file()]
    for _ in range(N_FLIPS):
        file = rng.choice(files)
        sound = file.read_bytes()
        position = rng.randrange(8 * len(sound))
        flipped = bytearray(sound)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        key = str(file.relative_to(toy_path))
        result = damage_of(toy_path)
        file.write_bytes(sound)
        found = result if isinstance(result, LLMEmbedError) else result.damage
        assert found, f"bit {position} of {key}"
    assert verify(open_store(toy_path)).damage == ()


def test_every_missing_or_truncated_chunk_is_named(toy_path: Path) -> None:
    """Each chunk, gone, empty or cut short, is named by verify and refused by reading."""
    for chunk in sorted(toy_path.rglob("c.*")):
        sound, key = chunk.read_bytes(), str(chunk.relative_to(toy_path))
        for damaged in (None, b"", sound[:-1], sound[: len(sound) // 2], sound + b"x"):
            chunk.unlink()
            if damaged is not None:
                chunk.write_bytes(damaged)
            assert names_file(damage_of(toy_path), key)
            with pytest.raises(CacheCorruptError, match=r"is missing|bytes instead of"):
                assert_toy(open_cache(toy_path))
            chunk.write_bytes(sound)


def test_reading_with_verify_refuses_a_flipped_bit(toy_path: Path) -> None:
    """`verify=True` compares what is read with what was committed, whole or row by row."""
    chunk = bytearray((toy_path / CHUNK).read_bytes())
    chunk[5] ^= 1
    (toy_path / CHUNK).write_bytes(chunk)
    split = open_cache(toy_path)["train"]
    split.features(8, pooling="mean")
    for rows in (None, [70], slice(64, 70)):
        with pytest.raises(CacheCorruptError, match=r"layer_008, rows 64-128: .* verify"):
            split.features(8, pooling="mean", rows=rows, verify=True)
    split.features(8, pooling="mean", rows=[3], verify=True)


def test_swapped_chunks_are_found(toy_path: Path) -> None:
    """A chunk with a good checksum in the wrong place is not what was committed."""
    other = toy_path / "train/tiny/mean/layer_008/c.2.0"
    (toy_path / CHUNK).write_bytes(other.read_bytes())
    assert names_file(damage_of(toy_path), CHUNK)


def test_a_missing_index_is_rebuilt(toy_path: Path) -> None:
    """Without its index a cache reads the same, and finish makes the same index again."""
    before = tree(toy_path)
    for index in list(toy_path.rglob("index/**/*.json")):
        index.write_bytes(index.read_bytes()[:20])
    assert_toy(open_cache(toy_path))
    for index in list(toy_path.rglob("index/**/*.json")):
        index.unlink()
    write_toy(toy_path)
    assert tree(toy_path) == before


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shape", [2**62, 16], r"'shape\[0\]' is 4611686018427387904, allowed is 0 to"),
        ("shape", [10**399, 16], r"about 10\^399"),
        ("shape", [-1, 16], r"is -1"),
        ("shape", [True, 16], r"of type bool"),
        ("shape", [], r"0 dimensions"),
        ("shape", [100, 16], r"is float16 \(100, 16\), but the cache states float16 \(200, 16\)"),
        ("chunk_grid", {"configuration": {"chunk_shape": [0, 16]}}, r"do not fit"),
        ("chunk_grid", {"configuration": {"chunk_shape": [32, 16]}}, r"chunks of 32 rows"),
        ("chunk_grid", None, r"JSON object belongs"),
        ("data_type", "bytes", r"data type 'bytes' is not one"),
        ("data_type", "float32", r"is float32"),
        ("codecs", [{"name": "pickle"}], r"codec 'pickle' is not one"),
        ("codecs", ["crc32c"], r"JSON object belongs"),
        ("zarr_format", 2, r"'zarr_format' is 2"),
        ("chunk_key_encoding", {"name": "v2", "configuration": {"separator": "."}}, r"default"),
    ],
)
def test_hostile_array_documents_are_refused(
    toy_path: Path, key: str, value: object, message: str
) -> None:
    """Impossible sizes and unknown codecs or types are refused before anything is allocated."""
    edit(toy_path / "train/tiny/mean/layer_008/zarr.json", lambda d: d.update({key: value}))
    with pytest.raises((CacheFormatError, CacheCorruptError), match=message):
        open_cache(toy_path)["train"].features(8, pooling="mean")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_shape": [0, 16]}, r"parts of shape \(0, 16\) do not fit into shards of 4096 rows"),
        ({"chunk_shape": [63, 16]}, r"parts of shape \(63, 16\) do not fit"),
        ({"chunk_shape": [64, 8]}, r"parts of shape \(64, 8\) do not fit"),
        ({"chunk_shape": [1e400]}, "not a JSON document"),
        ({"chunk_shape": "x"}, "'chunk_shape' must be of type list"),
        ({"codecs": [{"name": "pickle"}]}, "codec 'pickle' is not one"),
    ],
)
def test_hostile_shards_are_refused(
    toy_path: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Parts of a shard that do not fit into it are refused before zarr-python sees them."""
    archive = tmp_path / "archive.zarr"
    convert(toy_path, archive, archive=True)
    edit(
        archive / "train/tiny/mean/layer_008/zarr.json",
        lambda d: d["codecs"][0]["configuration"].update(change),
    )
    with pytest.raises(CacheFormatError, match=message):
        open_cache(archive)["train"].features(8, pooling="mean")


def test_parts_that_are_too_large_are_refused(toy_path: Path, tmp_path: Path) -> None:
    """What is decoded at once is bounded, and what stands for a missing shard is no feature."""
    archive = tmp_path / "archive.zarr"
    convert(toy_path, archive, archive=True)
    document = archive / "train/tiny/mean/layer_008/zarr.json"
    sound = document.read_text()
    edit(document, lambda d: d.update(fill_value=0.0))
    with pytest.raises(CacheFormatError, match="fill value of float16 must be 'NaN'"):
        open_cache(archive)["train"].features(8, pooling="mean")
    document.write_text(sound)
    edit(document, lambda d: d["chunk_grid"]["configuration"].update(chunk_shape=[2**30, 16]))
    edit(document, lambda d: d.update(codecs=[{"name": "bytes"}, {"name": "zstd"}]))
    with pytest.raises(CacheFormatError, match="1073741824 rows of 32 bytes are compressed as one"):
        open_cache(archive)["train"].features(8, pooling="mean")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not a JSON document"),
        ("{", "not a JSON document"),
        ('{"attributes": NaN}', "not a JSON document"),
        ('{"attributes": 1e400}', "not a JSON document"),
        ('{"attributes": ' + "[" * 70 + "]" * 70 + "}", "not a JSON document"),
        ("[]", "JSON object belongs"),
        ("{}", "is not a cache"),
        ('{"attributes": {"llmembed": {"format": 2}}}', "format 2; .* up to format 1"),
        ('{"attributes": {"llmembed": {"format": "1"}}}', "'format' must be of type int"),
    ],
)
def test_hostile_root_documents_are_refused(toy_path: Path, text: str, message: str) -> None:
    """A root that is no JSON, nested too deeply, foreign or newer is refused with the cause."""
    (toy_path / "zarr.json").write_text(text)
    with pytest.raises(CacheFormatError, match=message):
        open_cache(toy_path)


def test_an_edited_root_is_refused(toy_path: Path) -> None:
    """A changed class name is noticed on opening."""
    text = (toy_path / "zarr.json").read_text()
    (toy_path / "zarr.json").write_text(text.replace('"maybe"', '"never"'))
    with pytest.raises(CacheCorruptError, match="not as it was written"):
        open_cache(toy_path)


@pytest.mark.parametrize("linked", ["train", "train/tiny/mean/layer_008", CHUNK])
def test_symlinks_inside_are_not_followed(toy_path: Path, linked: str) -> None:
    """A link in a cache could hand out an outside file as data, so it is refused."""
    target = toy_path.parent / "outside"
    (toy_path / linked).rename(target)
    (toy_path / linked).symlink_to(target)
    with pytest.raises(CacheFormatError, match="is a symbolic link"):
        open_cache(toy_path)["train"].features(8, pooling="mean")


def test_split_columns_are_verified_on_reading(toy_path: Path) -> None:
    """Labels that are not those of the root document are refused."""
    labels = toy_path / "train/label/c.0"
    data = bytearray(labels.read_bytes())
    data[0] ^= 1
    labels.write_bytes(data)
    with pytest.raises(CacheCorruptError, match="train/label: the values are not those"):
        _ = open_cache(toy_path)["train"].labels


def test_nan_features_are_found_by_verify(toy_path: Path) -> None:
    """Features that are not numbers are named, though their hashes may hold."""
    result = verify(open_store(toy_path))
    assert not [d for d in result.damage if "NaN" in d.problem]
    assert np.isfinite(open_cache(toy_path)["train"].features(8, pooling="mean")).all()
