"""Copy, merge, remove and convert whole caches."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from toy_cache import DATASET, SOURCE, assert_toy, tree, write_toy

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.cache_format.cli import main
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import convert, copy, merge, remove, verify
from llmembed.common.errors import (
    CacheFormatError,
    CacheIncompleteError,
    CacheLockedError,
    CacheMismatchError,
    CacheNotFoundError,
    ConfigError,
)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_copy_is_the_same(toy_path: Path, tmp_path: Path) -> None:
    """Copying keeps every byte, and a copy that was cut off goes on."""
    copy(toy_path, tmp_path / "copy.zarr")
    assert tree(tmp_path / "copy.zarr") == tree(toy_path)
    (tmp_path / "copy.zarr/zarr.json").unlink()
    (tmp_path / "copy.zarr/train/tiny/mean/layer_008/c.1.0").unlink()
    copy(toy_path, tmp_path / "copy.zarr")
    assert tree(tmp_path / "copy.zarr") == tree(toy_path)


def test_a_copy_replaces_nothing(toy_path: Path, tmp_path: Path) -> None:
    """What lies at the target stays, and a cache that is being written is not copied."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    for target in (toy_path, tmp_path / "other"):
        with pytest.raises(CacheFormatError, match=r"exists. It is left as it is"):
            copy(toy_path, target)
    with (
        CacheWriter(toy_path, dataset=DATASET),
        pytest.raises(CacheLockedError, match="is being written by process"),
    ):
        copy(toy_path, tmp_path / "copy.zarr")


@pytest.mark.parametrize("key", ["../outside", "train/../../outside", "../../../../outside"])
def test_a_copy_writes_nothing_outside_its_target(toy_path: Path, tmp_path: Path, key: str) -> None:
    """An object store may hold any key; one that leads out of the folder ends the copy."""
    files: Any = fsspec.filesystem("memory")
    url = f"memory://{uuid.uuid4().hex}/deep/er/toy.zarr"
    copy(toy_path, url)
    root = url.removeprefix("memory:/")
    files.store[f"{root}/{key}"] = files.store[f"{root}/zarr.json"]
    with pytest.raises(CacheFormatError, match=r"outside' leads out of the cache"):
        copy(url, tmp_path / "copies/of/strangers/copy.zarr")
    assert not [*tmp_path.rglob("outside*")]


def test_merging_joins_layers_splits_sources_and_blocks(tmp_path: Path) -> None:
    """Caches made on several machines become one that equals a cache made at once."""
    other = dataclasses.replace(SOURCE, name="other")
    write_toy(tmp_path / "a.zarr", layers=[4], n_blocks=2)
    write_toy(tmp_path / "b.zarr", layers=[4, 8])
    write_toy(tmp_path / "b.zarr", 70, split="test")
    write_toy(tmp_path / "c.zarr", source=other)
    n_blocks = merge(tmp_path / "all.zarr", [tmp_path / f"{name}.zarr" for name in "abc"])
    # per pooling: two blocks of a; four blocks of b's train and two of its test; four of c
    assert list(n_blocks.values()) == [2 * 2, 2 * (4 + 2), 2 * 4]
    cache = open_cache(tmp_path / "all.zarr")
    assert_toy(cache)
    assert_toy(cache, 70, split="test")
    assert verify(open_store(tmp_path / "all.zarr")).damage == ()


def test_merging_other_texts_is_refused(toy_path: Path, tmp_path: Path) -> None:
    """Caches of different settings under one source name don't mix."""
    other = dataclasses.replace(SOURCE, fingerprint={"weights": "def", "max_length": 512})
    write_toy(tmp_path / "b.zarr", source=other)
    with pytest.raises(CacheMismatchError, match="weights: cache 'abc', given 'def'"):
        merge(toy_path, [tmp_path / "b.zarr"])


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        ({"layers": [4]}, [("tiny", "last", 8), ("tiny", "mean", 8)]),
        ({"pooling": "last"}, [("tiny", "mean", 4), ("tiny", "mean", 8)]),
        (
            {"pooling": "last", "layers": [8], "split": "train", "source": "tiny"},
            [("tiny", "last", 4), ("tiny", "mean", 4), ("tiny", "mean", 8)],
        ),
        ({"source": "tiny"}, []),
    ],
)
def test_removing_leaves_the_rest(
    toy_path: Path, chosen: dict[str, Any], left: list[tuple[str, str, int]]
) -> None:
    """What was removed is gone from disk and records, the rest verifies, and it can be redone."""
    whole = tree(toy_path)
    remove(toy_path, **chosen)
    assert list(open_cache(toy_path)["train"].arrays) == left
    assert verify(open_store(toy_path)).damage == ()
    assert len(tree(toy_path)) < len(whole)
    write_toy(toy_path)
    assert_toy(open_cache(toy_path))


def test_removing_a_split(toy_path: Path) -> None:
    """A removed split is gone, and adding it again computes it anew."""
    write_toy(toy_path, 70, split="test")
    assert remove(toy_path, split="train") == ["train"]
    assert open_cache(toy_path).splits == ("test",)
    assert not (toy_path / "train").exists()
    assert len(write_toy(toy_path).blocks) == 4


def test_removing_nothing_is_an_error(toy_path: Path) -> None:
    """No choice, or one that fits nothing, is answered."""
    with pytest.raises(ConfigError, match="nothing was chosen"):
        remove(toy_path)
    with pytest.raises(ConfigError, match=r"nothing in .* fits"):
        remove(toy_path, layers=[5])
    with pytest.raises(ConfigError, match="split 'trian' does not exist"):
        remove(toy_path, split="trian")


def test_hdf5_there_and_back_keeps_every_byte(toy_path: Path, tmp_path: Path) -> None:
    """A cache that became one HDF5 file comes back the same, and plain h5py reads the file."""
    convert(toy_path, tmp_path / "toy.h5")
    with h5py.File(tmp_path / "toy.h5") as file:
        features = file["train/tiny/mean/layer_008"][:]
    np.testing.assert_array_equal(
        features, open_cache(toy_path)["train"].features(8, pooling="mean")
    )
    convert(tmp_path / "toy.h5", tmp_path / "back.zarr")
    assert tree(tmp_path / "back.zarr") == tree(toy_path)


def test_an_archive_reads_the_same(toy_path: Path, tmp_path: Path) -> None:
    """A sharded, compressed export gives the same features, is verified, and is not extended."""
    convert(toy_path, tmp_path / "archive.zarr", archive=True)
    cache = open_cache(tmp_path / "archive.zarr")
    assert_toy(cache)
    some = cache["train"].features(8, pooling="mean", rows=[199, 3], verify=True)
    np.testing.assert_array_equal(some, cache["train"].features(8, pooling="mean")[[199, 3]])
    assert verify(open_store(tmp_path / "archive.zarr")).damage == ()
    assert cache.fingerprint == open_cache(toy_path).fingerprint
    assert len(tree(tmp_path / "archive.zarr")) < len(tree(toy_path))
    with pytest.raises(CacheMismatchError, match="an export is only read"):
        write_toy(tmp_path / "archive.zarr", layers=[8])
    shard = tmp_path / "archive.zarr/train/tiny/mean/layer_008/c/0/0"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1  # in the index of the shard
    shard.write_bytes(data)
    assert verify(open_store(tmp_path / "archive.zarr")).damage


def _external_link(file: h5py.File) -> None:
    del file["train/label"]
    file["train/label"] = h5py.ExternalLink("/etc/passwd", "/label")


def _soft_link(file: h5py.File) -> None:
    del file["train/label"]
    file["train/label"] = h5py.SoftLink("/train/text_hash")


def _linked_group(file: h5py.File) -> None:
    file.move("train", "elsewhere")
    file["train"] = h5py.SoftLink("/elsewhere")


def _virtual(file: h5py.File) -> None:
    del file["train/label"]
    layout = h5py.VirtualLayout((200,), "<i4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "label", (200,))
    file.create_virtual_dataset("train/label", layout)


def _external_storage(file: h5py.File) -> None:
    del file["train/label"]
    file.create_dataset("train/label", (200,), "<i4", external=[("/etc/passwd", 0, 800)])


def _other_shape(file: h5py.File) -> None:
    del file["train/label"]
    file["train/label"] = np.zeros(3, "<i4")


def _path_outside(file: h5py.File) -> None:
    del file["llmembed_documents"]
    text = json.dumps({"../../outside.json": "{}"}).encode()
    file["llmembed_documents"] = np.frombuffer(text, np.uint8)


def _no_documents(file: h5py.File) -> None:
    del file["llmembed_documents"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_external_link, "soft or external link"),
        (_soft_link, "soft or external link"),
        (_linked_group, "soft or external link"),
        (_virtual, "virtual or external dataset"),
        (_external_storage, "virtual or external dataset"),
        (_other_shape, r"the dataset is int32 \(3,\)"),
        (_path_outside, r"'../../outside.json' is no document of a cache"),
        (_no_documents, "was not made by llmembed-cache convert"),
    ],
)
def test_foreign_hdf5_is_refused(
    toy_path: Path, tmp_path: Path, damage: Callable[[h5py.File], None], message: str
) -> None:
    """An HDF5 file that points outside itself is refused before anything is read through it."""
    convert(toy_path, tmp_path / "toy.h5")
    with h5py.File(tmp_path / "toy.h5", "a") as file:
        damage(file)
    with pytest.raises(CacheFormatError, match=message):
        convert(tmp_path / "toy.h5", tmp_path / "back.zarr")
    assert not (tmp_path / "back.zarr/zarr.json").exists()


def test_conversions_that_mean_nothing(toy_path: Path, tmp_path: Path) -> None:
    """Existing targets, unknown pairs, missing files and partial caches are answered."""
    write_toy(tmp_path / "part.zarr", n_blocks=1)
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(ConfigError, match=r"exists. It is left as it is"):
        convert(toy_path, toy_path)
    with pytest.raises(ConfigError, match="To copy a cache as it is"):
        convert(toy_path, tmp_path / "b.zarr")
    with pytest.raises(CacheIncompleteError, match="has 64 of 200 rows"):
        convert(tmp_path / "part.zarr", tmp_path / "part.h5")
    with pytest.raises(CacheNotFoundError, match=r"no file .*none\.h5"):
        convert(tmp_path / "none.h5", tmp_path / "b.zarr")
    with pytest.raises(CacheFormatError, match="not a readable HDF5 file"):
        convert(tmp_path / "text.h5", tmp_path / "b.zarr")


def test_info_prints_a_tree_or_json(toy_path: Path) -> None:
    """`info` shows rows, shapes, completeness and provenance, as text and as one document."""
    text = command("info", toy_path).output
    assert "train/  200 rows" in text
    assert "tiny/mean/layer_008" in text
    assert "float16 200 x 16  0.0 MB  complete" in text
    assert "origin: made up" in text
    document = json.loads(command("info", toy_path, "--json").output)
    assert document["splits"]["train"]["arrays"][0]["shape"] == [200, 16]
    assert command("info", toy_path, "--quiet").output == ""


def test_info_escapes_what_could_command_a_terminal(tmp_path: Path) -> None:
    """Control characters of a foreign cache never reach the terminal."""
    hostile = dataclasses.replace(SOURCE, fingerprint={"weights": "\x1b[2J"})
    write_toy(tmp_path / "toy.zarr", source=hostile)
    output = command("info", tmp_path / "toy.zarr").output
    assert "\x1b" not in output
    assert r"\x1b[2J" in output


def test_verify_exits_1_and_names_the_damage(toy_path: Path) -> None:
    """`verify` is silent about nothing: exit 0 and a count, or exit 1 and the file."""
    sound = command("verify", toy_path)
    assert sound.exit_code == 0
    assert "20 chunks, 0.0 MB, every hash holds" in sound.output
    (toy_path / "train/tiny/mean/layer_008/c.1.0").unlink()
    damaged = command("verify", toy_path)
    assert damaged.exit_code == 1
    assert "DAMAGED train/tiny/mean/layer_008/c.1.0" in damaged.output
    assert json.loads(command("verify", toy_path, "--json").output)["damage"]


def test_the_commands_do_what_the_functions_do(toy_path: Path, tmp_path: Path) -> None:
    """copy, merge, convert and remove work from the command line."""
    assert command("copy", toy_path, tmp_path / "b.zarr").exit_code == 0
    assert "0 blocks added" in command("merge", tmp_path / "b.zarr", toy_path).output
    assert "written as HDF5" in command("convert", toy_path, tmp_path / "toy.h5").output
    assert (
        "written as an archive"
        in command("convert", toy_path, tmp_path / "archive.zarr", "--archive").output
    )
    removed = command("remove", toy_path, "--layers", "4", "--pooling", "mean")
    assert removed.output == "removed train/tiny/mean/layer_004\n"


def test_known_errors_are_one_line(tmp_path: Path) -> None:
    """A known error is one sentence on stderr and exit 1; bad usage is exit 2."""
    for arguments in (["info", tmp_path / "none.zarr"], ["remove", tmp_path, "--layers", "x"]):
        result = command(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.output
    assert command("info").exit_code == 2
