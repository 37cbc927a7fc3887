"""Caches that cannot be trusted: the reader refuses them with the cause, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pyarrow as pa
import pytest
import zarr
from click.testing import CliRunner
from clustered import clustered, write_cache
from little_memory import MIB, only
from toy_cache import assert_toy, write_toy

from llmembed.cache_format import open_cache
from llmembed.cache_format.cli import main
from llmembed.cache_format.layout.arrays import decode, digest, encode
from llmembed.cache_format.layout.commits import sources_of
from llmembed.cache_format.layout.documents import dump, read_array_info
from llmembed.cache_format.layout.schema import content_digest, require_header
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import convert, verify
from llmembed.common.errors import (
    CacheCorruptError,
    CacheError,
    CacheFormatError,
    CacheIncompleteError,
    ConfigError,
    DataError,
)
from llmembed.extract.texts.files import read_table
from llmembed.train import FitConfig, fit, load_run

N_ROWS = 70
ARRAY = "train/tiny/mean/layer_008"
MARK = "ran.txt"


@pytest.fixture
def toy_path(tmp_path: Path) -> Path:
    write_toy(tmp_path / "toy.zarr", N_ROWS)
    return tmp_path / "toy.zarr"


@pytest.fixture
def archive(toy_path: Path, tmp_path: Path) -> Path:
    convert(toy_path, tmp_path / "archive.zarr", archive=True)
    return tmp_path / "archive.zarr"


def features(cache: Path) -> Any:
    return open_cache(cache)["train"].features(8, pooling="mean")


def read_all(cache: Path) -> object:
    split = open_cache(cache)["train"]
    return (features(cache), split.labels, split.text_hash, split.n_tokens())


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def said(*arguments: str) -> str:
    """What the command says of a cache that it refuses: one line, exit code 1."""
    result = CliRunner().invoke(main, [*arguments])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    return result.stderr.splitlines()[-1]


@pytest.mark.fault("48")
@pytest.mark.parametrize("what", ["fit", "convert"])
def test_an_incomplete_cache_is_refused(what: str, tmp_path: Path) -> None:
    """A fit and a conversion say how many rows are missing, and of what."""
    write_cache(tmp_path / "part.zarr", finish=False)
    place = str(tmp_path / "part.zarr")
    verbs: dict[str, Callable[[], object]] = {
        "fit": lambda: fit(FitConfig(cache=place, output=str(tmp_path / "run"))),
        "convert": lambda: convert(place, tmp_path / "part.h5"),
    }
    with pytest.raises(CacheIncompleteError, match=r"26 of 90 rows.*not committed|has 64 of 90"):
        verbs[what]()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "part.h5").exists()


@pytest.mark.fault("49")
@pytest.mark.parametrize("key", ["zarr.json", "train/tiny/zarr.json", f"{ARRAY}/zarr.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "nul", '{"a": 1}x', "[" * 10**6, '{"a":' * 10**5, '{"a": 1e999}']
)
def test_what_is_no_json_is_refused(toy_path: Path, key: str, text: str) -> None:
    """Malformed, nested without end, or beyond numbers: the document is named in one sentence."""
    (toy_path / key).write_text(text, encoding="utf-8")
    with pytest.raises(CacheFormatError, match=rf"{key} is not a JSON document"):
        features(toy_path)


@pytest.mark.fault("50")
@pytest.mark.parametrize("value", [2**62, 2**63, -1, 10**400, 0.5, True, None, "70", [70]])
@pytest.mark.parametrize("where", ["shape", "chunk_shape"])
def test_impossible_sizes_take_no_memory(toy_path: Path, where: str, value: object) -> None:
    """They are refused from the document alone: no more than 64 MiB may be taken."""

    def change(document: dict[str, Any]) -> None:
        grid = document["chunk_grid"]["configuration"]
        (document if where == "shape" else grid)[where][0] = value

    features(toy_path)  # what is imported takes memory
    edit(toy_path / ARRAY / "zarr.json", change)
    with only(64 * MIB), pytest.raises(CacheFormatError, match=rf"{where}\[0\]"):
        features(toy_path)


@pytest.mark.fault("50")
def test_chunks_of_no_rows_and_claims_without_files_are_refused(toy_path: Path) -> None:
    """A chunk has a row, and a cache has no more rows than its files hold."""
    edit(
        toy_path / ARRAY / "zarr.json",
        lambda d: d["chunk_grid"]["configuration"].update(chunk_shape=[0, 16]),
    )
    with pytest.raises(CacheFormatError, match=r"chunks \(0, 16\) do not fit"):
        features(toy_path)


CODECS = {
    "zstd": (zarr.codecs.ZstdCodec(), numcodecs.Zstd(level=19)),
    "gzip": (zarr.codecs.GzipCodec(), numcodecs.GZip(level=9)),
    "blosc": (zarr.codecs.BloscCodec(cname="zstd"), numcodecs.Blosc(cname="zstd", clevel=9)),
}
"""Name of a codec -> how zarr-python compresses by it, and what makes a chunk from bytes."""


def compressed(cache: Path, codec: str, *, sharded: bool, rows: Any) -> list[Path]:
    """Write an array of a cache anew, compressed; give its files."""
    array = cache / ARRAY
    shutil.rmtree(array)
    made = zarr.create_array(
        str(array),
        shape=(N_ROWS, 16),
        dtype="float16",
        chunks=(64, 16),
        shards=(128, 16) if sharded else None,
        compressors=[CODECS[codec][0]],
        fill_value=float("nan"),
        zarr_format=3,
    )
    made[:] = rows
    return sorted(path for path in (array / "c").rglob("*") if path.is_file())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sharded", [True, False])
def test_every_codec_that_a_cache_may_use_is_read(
    toy_path: Path, codec: str, sharded: bool
) -> None:
    """What another tool has compressed is the same rows; zstd need not say how many bytes."""
    rows = np.array(features(toy_path))
    (chunk, *_) = compressed(toy_path, codec, sharded=sharded, rows=rows)
    np.testing.assert_array_equal(features(toy_path), rows)
    if codec == "zstd" and not sharded:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(rows[:64].tobytes())
        chunk.write_bytes(sink.getvalue())
        np.testing.assert_array_equal(features(toy_path), rows)


@pytest.mark.fault("51")
@pytest.mark.parametrize("codec", ["zstd", "blosc", pytest.param("gzip", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_chunk_that_swells_is_refused_within_memory(
    toy_path: Path, codec: str, sharded: bool
) -> None:
    """Half a gigabyte of zeros behind a few kilobytes is not unpacked where 2 KiB belong."""
    zeros = np.zeros((N_ROWS, 16), np.float16)
    (chunk, *_) = compressed(toy_path, codec, sharded=sharded, rows=zeros)
    packed = CODECS[codec][1].encode(np.zeros(512 * MIB, np.uint8))
    assert len(packed) < MIB
    if sharded:
        index = np.array([[0, len(packed)], [2**64 - 1, 2**64 - 1]], "<u8").tobytes()
        packed = bytes(packed) + index + int(google_crc32c.value(index)).to_bytes(4, "little")
    chunk.write_bytes(packed)
    said = rf"cannot be decoded.* {codec} unpacks to more than the 67584 bytes"
    with only(128 * MIB), pytest.raises(CacheCorruptError, match=said):
        features(toy_path)


@pytest.mark.fault("51")
@pytest.mark.parametrize(
    "suffix",
    [
        ".csv.zst",
        *(pytest.param(s, marks=pytest.mark.slow) for s in (".csv.gz", ".jsonl.gz", ".jsonl.bz2")),
    ],
)
def test_a_text_file_that_swells_is_refused_within_memory(tmp_path: Path, suffix: str) -> None:
    """Half a gigabyte of one text behind half a megabyte stops where it grew by 250."""
    head = b"text,label\n" if suffix.startswith(".csv") else b'{"label": "a", "text": "'
    path = tmp_path / f"bomb{suffix}"
    codec = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[path.suffix]
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), codec) as file:
        file.write(head)
        for _ in range(256):
            file.write(b"a" * (2 * MIB))
    assert path.stat().st_size < 2 * MIB
    with only(1024 * MIB), pytest.raises(DataError, match="unpacks to more than 250 times"):
        read_table(path)


class _Marks:
    """Unpickling it writes a file: what an attacker's code would do."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._place),))


@pytest.mark.fault("52")
@pytest.mark.parametrize("at", ["root", "array"])
def test_zarr_v2_with_a_pickle_filter_runs_nothing(toy_path: Path, tmp_path: Path, at: str) -> None:
    """Metadata of version 2 is not looked at, and without that of version 3 there is no cache."""
    place = toy_path if at == "root" else toy_path / ARRAY
    document = {
        "zarr_format": 2,
        "shape": [N_ROWS],
        "chunks": [N_ROWS],
        "dtype": "|O",
        "compressor": None,
        "filters": [{"id": "pickle", "protocol": 5}],
        "fill_value": None,
        "order": "C",
    }
    (place / ".zarray").write_text(json.dumps(document))
    (place / "0").write_bytes(pickle.dumps(_Marks(tmp_path / MARK)))
    assert_toy(open_cache(toy_path), N_ROWS)
    (place / "zarr.json").unlink()
    with pytest.raises(CacheError, match=r"is not a cache|zarr\.json is missing"):
        features(toy_path)
    assert not (tmp_path / MARK).exists()


@pytest.mark.fault("53")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_type": "object"}, "data type 'object' is not one a cache may contain"),
        ({"data_type": "float64"}, "data type 'float64' is not one"),
        ({"codecs": [{"name": "numcodecs.pickle"}]}, "codec 'numcodecs.pickle' is not one"),
        ({"codecs": [{"name": "\x1b[2J"}]}, r"codec '\\x1b\[2J' is not one"),
    ],
)
def test_an_unknown_codec_or_type_is_refused_before_zarr(
    archive: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    """The list of what is allowed is asked first, so that no foreign codec is ever looked up."""
    monkeypatch.delattr(zarr, "open_array")
    edit(archive / ARRAY / "zarr.json", lambda document: document.update(change))
    with pytest.raises(CacheFormatError, match=message):
        features(archive)


@pytest.mark.fault("54")
@pytest.mark.parametrize("kind", ["toy", "archive"])
def test_no_link_in_a_cache_hands_out_a_file(
    kind: str, archive: Path, toy_path: Path, tmp_path: Path, tries: Callable[[int], None]
) -> None:
    """Any file or folder on the way to rows, as a link to a copy outside: refused by its name."""
    cache = archive if kind == "archive" else toy_path
    places = [
        path for path in sorted(cache.rglob("*")) if path.relative_to(cache).parts[0] == "train"
    ]
    unread = {"train/zarr.json", "train/tiny/mean/zarr.json"}  # for other readers of Zarr
    wanted = [
        path
        for path in places
        if not {"last", "layer_004"} & set(path.parts)
        and path.relative_to(cache).as_posix() not in unread
    ]
    for path in wanted:
        outside = tmp_path / "outside"
        path.rename(outside)
        path.symlink_to(outside)
        with pytest.raises(CacheFormatError, match="is a symbolic link"):
            read_all(cache)
        path.unlink()
        outside.rename(path)
    assert_toy(open_cache(cache), N_ROWS)
    tries(len(wanted))


@pytest.mark.fault("54")
@pytest.mark.parametrize(
    "name", ["zarr.json", "train/tiny/zarr.json", f"{ARRAY}/zarr.json", "chunk"]
)
@pytest.mark.parametrize("kind", ["toy", "archive"])
def test_no_fifo_in_a_cache_makes_a_reader_wait(
    kind: str, name: str, archive: Path, toy_path: Path
) -> None:
    """A FIFO where a document or chunk belongs is named, at once."""
    cache = archive if kind == "archive" else toy_path
    chunk = f"{ARRAY}/c/0/0" if kind == "archive" else f"{ARRAY}/c.0.0"
    path = cache / (chunk if name == "chunk" else name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CacheError, match=f"{path.name} is a FIFO, not a regular file"):
        features(cache)
    assert "is a FIFO" in CliRunner().invoke(main, ["verify", str(cache)]).output


@pytest.mark.fault("55")
@pytest.mark.parametrize("name", ["../x", "..", "/etc", "a/../../x", "a/b", "C:", "a\0b", ".", "~"])
@pytest.mark.parametrize("kind", ["splits", "sources"])
def test_no_name_in_a_header_is_a_path(toy_path: Path, kind: str, name: str) -> None:
    """Splits and sources become folders, so their names are checked, digest or not."""

    def rename(document: dict[str, Any]) -> None:
        content = document["attributes"]["llmembed"]
        (known,) = content[kind].values()
        content[kind] = {name: known}
        content["digest"] = content_digest(content)

    edit(toy_path / "zarr.json", rename)
    with pytest.raises(CacheFormatError, match=f"cannot name a {kind[:-1]}"):
        open_cache(toy_path)
    assert "\n" not in said("info", str(toy_path)).strip()


@pytest.mark.fault("56")
@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_newer_format_says_how_to_read_it(toy_path: Path, command: str) -> None:
    """Each command names both versions and the upgrade; nothing is guessed."""
    edit(toy_path / "zarr.json", lambda d: d["attributes"]["llmembed"].update(format=3))
    message = said(command, str(toy_path))
    assert "is of cache format 3; this version of llmembed reads up to format 1" in message
    assert "pip install --upgrade llmembed-cache" in message


@pytest.mark.fault("57")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 71])
def test_features_that_are_no_numbers_stop_a_fit(tmp_path: Path, value: float, row: int) -> None:
    """Whole in every hash, the row and the layer are named; `verify` names the block."""
    x, labels = clustered(90, 0)
    cache = write_cache(tmp_path / "tiny.zarr", {"train": (x, labels)})
    _poison(cache, row, value)
    config = FitConfig(cache=str(cache), fusion="concat", output=str(tmp_path / "run"))
    with pytest.raises(DataError, match=rf"1 rows? of layer 2 .*the first is row {row}"):
        fit(config)
    assert not (tmp_path / "run").exists()
    (damage,) = verify(open_store(cache)).damage
    assert "layer_002" in damage.key
    assert "NaN or infinite" in damage.problem


def _poison(cache: Path, row: int, value: float) -> None:
    """Write a feature that no extraction writes, with hashes that say it was committed so."""
    store: Any = open_store(cache)
    (source,) = sources_of(store, require_header(store))
    name, block = "mean/layer_002", row // source.block_rows
    info = read_array_info(store, f"{source.key}/{name}")
    key = f"{source.key}/{name}/{info.chunk_key(block)}"
    rows = decode(info, store.get(key))[: int(source.expected[block])].copy()
    rows[row % source.block_rows, 3] = value
    store.put(key, encode(info, rows))
    for place, record in source.records.items():
        if record.start // source.block_rows == block:
            arrays = {**record.arrays, name: digest(rows)}
            store.put(place, [dump(record.document() | {"arrays": arrays})])
    store.delete(source.index_key(name))
    again = next(sources_of(store, require_header(store)))
    again.write_index(name)


@pytest.mark.fault("58")
@pytest.mark.parametrize(("column", "name"), [("label", "labels"), ("text_hash", "text_hash")])
def test_labels_of_other_rows_are_refused(toy_path: Path, column: str, name: str) -> None:
    """A column in another order, its checksum being right, is not that of the header."""
    store: Any = open_store(toy_path)
    info = read_array_info(store, f"train/{column}")
    key = f"train/{column}/{info.chunk_key(0)}"
    rows = decode(info, store.get(key))[:N_ROWS][::-1].copy()
    store.put(key, encode(info, rows))
    with pytest.raises(CacheCorruptError, match=rf"train/{column}: the values are not those that"):
        getattr(open_cache(toy_path)["train"], name)
    assert f"train/{column}" in CliRunner().invoke(main, ["verify", str(toy_path)]).output


@pytest.mark.fault("59")
def test_layers_that_the_run_was_not_trained_on_are_refused(tmp_path: Path) -> None:
    """Features of another width than the run's are named, and so is a layer that is not there."""
    cache = write_cache(tmp_path / "tiny.zarr")
    config = FitConfig(cache=str(cache), layers="1", fusion="single", output=str(tmp_path / "run"))
    run = load_run(fit(config).path)
    assert [one["layer"] for one in run.config["features"]] == [1]
    with pytest.raises(ConfigError, match=r"layer 9|layers 1, 2|9"):
        fit(FitConfig(cache=str(cache), layers="9", output=str(tmp_path / "other")))
    edit(tmp_path / "run/config.json", lambda d: d["features"].append(d["features"][0]))
    with pytest.raises(ValueError, match="features, labels and architecture disagree"):
        load_run(tmp_path / "run")
