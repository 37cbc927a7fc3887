"""What cannot go well is refused before anything is written."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from faulty_disk import Fault, count_operations, with_fault
from fsspec.implementations.memory import MemoryFileSystem
from refusing_proxy import RefusingProxy, refusing_proxy
from toy_cache import (
    DATASET,
    SOURCE,
    Toy,
    assert_toy,
    count_right_rows,
    set_format,
    tree,
    write_toy,
)

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.cache_format.layout.schema import FORMAT_VERSION, MINOR_VERSION
from llmembed.cache_format.tools import convert, copy, finalize, merge, remove
from llmembed.common.errors import (
    CacheFormatError,
    CacheMismatchError,
    CacheSpaceError,
    CacheStorageError,
    ConfigError,
    LLMEmbedError,
)

Tries = Callable[[int], None]


CHANGING: dict[str, Callable[[Path], object]] = {
    "extract": lambda path: write_toy(path, layers=[4, 8, 12]),
    "remove": lambda path: remove(path, layers=[4]),
    "finalize": finalize,
    "merge into": lambda path: merge(path, [path.with_name("other.zarr")]),
}


@pytest.mark.fault("31")
@pytest.mark.parametrize("change", CHANGING)
@pytest.mark.parametrize("newer", [{"format": FORMAT_VERSION + 1}, {"minor": MINOR_VERSION + 1}])
def test_a_format_of_a_later_version(toy_path: Path, change: str, newer: dict[str, int]) -> None:
    """Whoever would change such a cache is told both versions, and not a byte is changed."""
    write_toy(toy_path.with_name("other.zarr"), layers=[1])
    set_format(toy_path, **newer)
    before = tree(toy_path)
    message = f"format {FORMAT_VERSION}.{MINOR_VERSION + 1}" if "minor" in newer else "format 2"
    with pytest.raises(CacheFormatError, match=rf"of cache {message}; this version .*[Uu]pgrade"):
        CHANGING[change](toy_path)
    assert tree(toy_path) == before


@pytest.mark.fault("32")
@pytest.mark.parametrize("column", ["labels", "text_hash"])
def test_texts_that_changed_since(toy_path: Path, tries: Tries, column: str) -> None:
    """Whichever row is another one now, it is named with both values; nothing is written."""
    before, toy = tree(toy_path), Toy()
    rows = [0, 1, 63, 64, 127, 199]
    for row in rows:
        columns = {"labels": toy.labels, "text_hash": toy.text_hash}
        columns[column][row] += 1 if columns[column][row] < 2 or column == "text_hash" else -1
        with CacheWriter(toy_path, dataset=DATASET) as writer:
            writer.add_source(SOURCE)
            with pytest.raises(CacheMismatchError, match=rf"\brow {row}\b"):
                writer.add_split("train", **columns)
        assert tree(toy_path) == before
    tries(len(rows))


@pytest.mark.fault("33")
@pytest.mark.parametrize(("start", "stop"), [(0, 63), (1, 64), (32, 96), (64, 192), (128, 256)])
def test_units_that_are_no_whole_chunks(tmp_path: Path, start: int, stop: int) -> None:
    """A block that would fill a part of a chunk, or two, is refused; no chunk of it is written."""
    path, toy = tmp_path / "toy.zarr", Toy(256)
    with CacheWriter(path, dataset=DATASET) as writer:
        writer.add_source(SOURCE)
        writer.add_split("train", labels=toy.labels, text_hash=toy.text_hash)
        plan = writer.plan("train", SOURCE.name, arrays=[("mean", 4)])
        block = dataclasses.replace(plan.blocks[0], start=start, stop=stop, compute_from=start)
        rows = slice(start, stop)
        features = {("mean", 4): toy.features("mean", 4)[rows]}
        if (start, stop) == (128, 256):
            plan = dataclasses.replace(plan, n_rows=130)
        with pytest.raises(CacheMismatchError, match=f"rows {start}-{stop} .* are no block of"):
            writer.write(plan, block, n_tokens=toy.n_tokens[rows], features=features)
    assert not [key for key in tree(path) if "layer_004/c." in key or "commits" in key]


@pytest.mark.fault("34")
@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        ("EROFS", CacheStorageError, "Read-only file system"),
        ("EACCES", CacheStorageError, "Permission denied"),
        ("EPERM", CacheStorageError, "Operation not permitted"),
        ("EDQUOT", CacheSpaceError, "no space was left"),
    ],
)
def test_a_disk_that_does_not_let_write(
    tmp_path: Path, tries: Tries, number: str, kind: type[LLMEmbedError], message: str
) -> None:
    """From the first byte or later on: one sentence; once it lets, the same call completes."""
    folder, path = tmp_path / "disk", tmp_path / "disk/toy.zarr"

    def write() -> None:
        write_toy(path, 70, layers=[4], poolings=["mean"])

    folder.mkdir()
    n_operations = count_operations(write, folder)
    whole = tree(path)
    begins = [1, *range(2, n_operations - 20, max(1, n_operations // 6))]
    for at in begins:
        shutil.rmtree(path)
        end = with_fault(write, folder, Fault(number, at))
        assert end.how == "told", end.said
        assert end.said.startswith(kind.__name__), end.said
        assert message in end.said
        assert "\n" not in end.said
        count_right_rows(path)
        write()
        assert tree(path) == whole
    tries(len(begins))


@pytest.fixture(scope="module")
def s3(s3_endpoint: str) -> Iterator[RefusingProxy]:
    """A store that speaks S3, and refuses when it is told to."""
    with refusing_proxy(s3_endpoint) as proxy:
        yield proxy


@pytest.mark.fault("35")
def test_a_store_that_answers_403(
    s3: RefusingProxy, toy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, writing and copying there are each refused in one sentence with the place."""
    options = {"endpoint_url": s3.address, "key": "testing", "secret": "testing"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    s3.refusal = (403, "AccessDenied")
    url = "s3://somebody-elses/toy.zarr"
    acts: list[Callable[[], object]] = [
        lambda: open_cache(url),
        lambda: write_toy(url),
        lambda: copy(toy_path, url),
    ]
    for act in acts:
        with pytest.raises(CacheStorageError, match=rf"{url}.* could not be read or written") as it:
            act()
        assert "\n" not in str(it.value)


class WithoutConditions(MemoryFileSystem):  # type: ignore[misc]
    """A store whose put overwrites whatever is there."""

    protocol = ("unconditional",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create":
            raise NotImplementedError("mode")
        super().pipe_file(path, value, mode=mode, **options)


@pytest.mark.fault("36")
def test_a_store_without_conditional_writes(caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, with what it means, and one writer's cache there is whole."""
    fsspec.register_implementation("unconditional", WithoutConditions, clobber=True)
    url = f"unconditional://{uuid.uuid4().hex}/toy.zarr"
    with caplog.at_level(logging.WARNING, logger="llmembed"):
        write_toy(url)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "has no conditional put" in said[0]
    assert "Start one writer only" in said[0]
    assert_toy(open_cache(url))


def plan_with(path: Path, kind: str, name: str) -> None:
    """Plan an extraction whose source, split or pooling has that name."""
    toy = Toy(70)
    with CacheWriter(path, dataset=DATASET) as writer:
        writer.add_source(dataclasses.replace(SOURCE, name=name) if kind == "source" else SOURCE)
        split = name if kind == "split" else "train"
        writer.add_split(split, labels=toy.labels, text_hash=toy.text_hash)
        writer.plan(split, SOURCE.name, arrays=[(name, 4)])


NAMES = ["..", ".hidden", "a/b", "/a", "label", "", "a" * 101, "a\n", "a\0b", "C", "con/"]
NAMES += ["caf\u00e9", "cafe\u0301", "\u0441ache", "a b", "a\u202eb", "\ud800", "zarr.json", "a\\b"]


@pytest.mark.fault("39")
@pytest.mark.parametrize("kind", ["source", "split", "pooling"])
def test_names_that_cannot_be_folders(tmp_path: Path, tries: Tries, kind: str) -> None:
    """Names with paths, dots in front, other alphabets or reserved words never become folders."""
    for name in NAMES:
        path = tmp_path / "toy.zarr"
        with pytest.raises(ConfigError, match=f"cannot name a {kind}"):
            plan_with(path, kind, name)
        assert [one.name for one in tmp_path.iterdir()] in ([], ["toy.zarr"])
        if path.exists():
            assert {one.name for one in path.iterdir()} <= {"zarr.json", ".llmembed", "train"}
    tries(len(NAMES))


@pytest.mark.fault("39")
@pytest.mark.parametrize("name", ["Train", "TRAIN", "tRain"])
def test_names_that_differ_in_case_only(toy_path: Path, name: str) -> None:
    """Some file systems cannot tell such names apart, so they are refused."""
    before = tree(toy_path)
    with pytest.raises(ConfigError, match=rf"'{name}' differs from 'train' .* only in case"):
        write_toy(toy_path, split=name)
    source = dataclasses.replace(SOURCE, name="Tiny")
    with pytest.raises(ConfigError, match=r"'Tiny' differs from 'tiny' .* only in case"):
        write_toy(toy_path, source=source)
    assert tree(toy_path) == before


@pytest.mark.fault("39")
@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file/toy.zarr", "loop/toy.zarr"])
def test_places_that_cannot_be(tmp_path: Path, name: str) -> None:
    """A path with NUL, one that is too long, below a file or in a circle is one sentence."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for act in (open_cache, write_toy):
        with pytest.raises(LLMEmbedError) as caught:
            act(f"{tmp_path}/{name}")
        assert "\n" not in str(caught.value)


@pytest.mark.fault("40")
@pytest.mark.parametrize("left", [".zgroup", ".zattrs", "train.h5", "zarr.json", "train/c/0/0"])
def test_what_another_layout_left(tmp_path: Path, left: str) -> None:
    """Zarr of version 2, HDF5, a group that is no cache, or shards are not written into."""
    file = tmp_path / "toy.zarr" / left
    file.parent.mkdir(parents=True)
    file.write_text('{"zarr_format": 3, "node_type": "group"}')
    before = tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(CacheFormatError, match="exists and is not a cache"):
            write_toy(tmp_path / "toy.zarr", overwrite=overwrite)
        assert tree(tmp_path) == before


@pytest.mark.fault("40")
def test_an_archive_is_not_extended(toy_path: Path, tmp_path: Path) -> None:
    """Rows, layers and splits are refused where the chunks are shards; nothing is written."""
    archive = tmp_path / "archive.zarr"
    convert(toy_path, archive, archive=True)
    before = tree(archive)
    with pytest.raises(CacheMismatchError, match="is sharded or compressed"):
        write_toy(archive, 300)
    assert tree(archive) == before


FOREIGN = {
    "of another split": {"split": "test"},
    "of another source": {"source": "other"},
    "that begins within a block": {"start": 65},
    "that ends beyond the rows": {"stop": 300},
    "that begins beyond the rows": {"start": 256, "stop": 300},
    "of a number of digits": {"start": 10**15, "stop": 10**15 + 1},
    "of no rows": {"start": 64, "stop": 64},
    "of other texts": {"texts": "0" * 32},
    "of another array": {"arrays": {"mean/layer_004": "0" * 32}},
    "of a later format": {"format": 2},
}


@pytest.mark.fault("41", "42")
@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_record_is_refused(toy_path: Path, foreign: str) -> None:
    """A record of another plan, or outside of it, stops the writer, which names it."""
    record = min(toy_path.rglob("00000001-*.json"))
    for index in toy_path.rglob("index/**/*.json"):
        index.unlink()
    record.write_text(json.dumps(json.loads(record.read_bytes()) | FOREIGN[foreign]))
    before = tree(toy_path)
    with pytest.raises((CacheFormatError, CacheMismatchError), match="00000001-") as caught:
        write_toy(toy_path, layers=[1])
    assert "\n" not in str(caught.value)
    assert tree(toy_path) == before
