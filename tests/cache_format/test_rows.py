"""Several labels a text, weights and groups: how they are stored, grow, are refused and move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_rows
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from toy_cache import DATASET, SOURCE, Toy, tree, write_toy
from toy_rows import label_sets, rows_of, write_rows

from llmembed.cache_format import Cache, CacheWriter, open_cache
from llmembed.cache_format.layout.schema import content_digest
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import convert, copy, describe, merge, remove, verify
from llmembed.cache_format.tools import tree as tree_of
from llmembed.common.errors import (
    CacheCorruptError,
    CacheFormatError,
    CacheMismatchError,
    ConfigError,
    DataError,
)

COLUMNS = ("label_sets", "weights", "groups")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.zarr")
    return tmp_path / "rows.zarr"


def root(path: Path) -> Any:
    return json.loads((path / "zarr.json").read_text())["attributes"]["llmembed"]


def edit_root(path: Path, **changes: Any) -> None:
    document = json.loads((path / "zarr.json").read_text())
    content = document["attributes"]["llmembed"]
    content |= changes
    content["digest"] = content_digest(content)
    (path / "zarr.json").write_text(json.dumps(document))


def assert_rows(cache: Cache, n_rows: int = 100, *names: str) -> None:
    split = cache["train"]
    for name, expected in rows_of(n_rows, *names).items():
        found = getattr(split, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    for name in set(COLUMNS) - {*(names or COLUMNS)}:
        assert getattr(split, name) is None


def test_what_is_written_is_read(path: Path) -> None:
    """Label sets, weights and groups come back as they were given, and every hash holds."""
    cache = open_cache(path)
    assert_rows(cache)
    assert cache.multilabel
    assert verify(open_store(path)).damage == ()
    assert root(path)["minor"] == 1


def test_a_cache_without_them_says_nothing_of_them(tmp_path: Path) -> None:
    """One label a text and nothing else: no minor version, no further columns, as ever."""
    write_toy(tmp_path / "toy.zarr", 100)
    cache = open_cache(tmp_path / "toy.zarr")
    assert not cache.multilabel
    assert [getattr(cache["train"], name) for name in COLUMNS] == [None] * 3
    assert "minor" not in root(tmp_path / "toy.zarr")
    assert root(tmp_path / "toy.zarr")["splits"]["train"].keys() == {"n_rows", "texts", "labels"}


def test_an_older_reader_sees_unlabelled_rows(path: Path) -> None:
    """The column `label`, all that minor version 0 knows, says -1 in every row."""
    assert (open_cache(path)["train"].labels == -1).all()
    assert root(path)["format"] == 1


def test_zarr_reads_the_columns(path: Path) -> None:
    """Any Zarr reader finds them, as arrays over samples and classes."""
    group = zarr.open_group(path, mode="r", use_consolidated=True)["train"]
    assert isinstance(group, zarr.Group)
    found = group["labels"]
    assert isinstance(found, zarr.Array)
    np.testing.assert_array_equal(found[:], label_sets(100))
    assert found.metadata.to_dict()["dimension_names"] == ("sample", "class")
    assert {"weight", "group"} <= set(group.array_keys())


@settings(deadline=None, max_examples=25)
@given(
    sets=st.integers(1, 5).flatmap(
        lambda n: arrays.arrays(
            np.int8, st.tuples(st.integers(0, 90), st.just(n)), elements=st.integers(0, 1)
        )
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_columns_are_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, sets: np.ndarray[Any, Any], seed: int
) -> None:
    """Write, then read, is the identity for any label sets, weights and groups."""
    path = tmp_path_factory.mktemp("any") / "any.zarr"
    n_rows, n_classes = sets.shape
    rng = np.random.default_rng(seed)
    sets[rng.random(n_rows) < 0.2] = -1
    weights = rng.random(n_rows, np.float32) + np.float32(0.1)
    groups = rng.integers(0, 2**64, n_rows, np.uint64)
    dataset = type(DATASET)(name="any", labels=tuple(map(str, range(n_classes))), provenance={})
    with CacheWriter(path, dataset=dataset) as writer:
        writer.add_split(
            "train",
            labels=np.full(n_rows, -1),
            text_hash=np.arange(n_rows),
            label_sets=sets,
            weights=weights,
            groups=groups,
        )
    split = open_cache(path)["train"]
    for name, expected in {"label_sets": sets, "weights": weights, "groups": groups}.items():
        np.testing.assert_array_equal(getattr(split, name), expected)
    assert verify(open_store(path)).damage == ()


def test_chunks_of_label_sets_are_small(tmp_path: Path) -> None:
    """A chunk of the labels of many classes has at most 8 MiB."""
    names = tuple(f"c{k}" for k in range(3000))
    sets = np.zeros((5000, 3000), np.int8)
    sets[::7, ::11] = 1
    with CacheWriter(
        tmp_path / "wide.zarr", dataset=type(DATASET)(name="w", labels=names, provenance={})
    ) as writer:
        labels = np.full(5000, -1)
        writer.add_split("train", labels=labels, text_hash=np.arange(5000), label_sets=sets)
    sizes = [file.stat().st_size for file in (tmp_path / "wide.zarr/train/labels").glob("c.*")]
    assert len(sizes) > 1
    assert max(sizes) <= 8 * 2**20 + 4
    np.testing.assert_array_equal(open_cache(tmp_path / "wide.zarr")["train"].label_sets, sets)


@pytest.mark.parametrize("name", ["weights", "groups"])
def test_weights_and_groups_may_come_later(tmp_path: Path, name: str) -> None:
    """A cache that gets them later is, but for its date, the one that had them at once."""
    write_rows(tmp_path / "later", 100, "label_sets")
    write_rows(tmp_path / "later", 100, "label_sets", name)
    write_rows(tmp_path / "at_once", 100, "label_sets", name)
    assert tree(tmp_path / "later") == tree(tmp_path / "at_once")
    assert verify(open_store(tmp_path / "later")).damage == ()


def test_what_is_there_is_kept(path: Path) -> None:
    """Who gives no weights and groups leaves those of the cache as they are."""
    before = tree(path)
    write_rows(path, 100, "label_sets")
    assert tree(path) == before


def test_they_grow_with_the_rows(tmp_path: Path) -> None:
    """A cache that grew by rows is the one that had all rows from the beginning."""
    write_rows(tmp_path / "grown", 80)
    write_rows(tmp_path / "grown", 100)
    assert_rows(open_cache(tmp_path / "grown"))
    assert verify(open_store(tmp_path / "grown")).damage == ()


def test_rows_without_the_weights_of_the_others_are_refused(tmp_path: Path) -> None:
    """More rows need all columns that the split has."""
    write_rows(tmp_path / "grown", 80, "weights")
    match = "'train' of .* has weights for its 80 rows, but 100 .* without. Pass --weight-column"
    with pytest.raises(CacheMismatchError, match=match):
        write_rows(tmp_path / "grown", 100, "groups")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("weights", 3.5, r"row 7 .* has weight 0.0, but 3.5 was given \(1 of 100 rows differ\)"),
        ("groups", 5, r"row 7 .* has group 9223372036854775809, but 5 was given"),
        ("label_sets", [0, 1, 0], r"row 7 .* has labels \[0, 1, 2\], but \[1\] was given"),
        ("label_sets", [-1, -1, -1], r"has labels \[0, 1, 2\], but unlabelled was given"),
    ],
)
def test_other_values_are_refused(path: Path, name: str, change: Any, match: str) -> None:
    """Columns that contradict the cache are refused with both values; the cache stays."""
    before, given = tree(path), rows_of(100)
    given[name][7] = change
    with pytest.raises(CacheMismatchError, match=match):
        write_rows(path, **given)
    assert tree(path) == before


def test_one_and_several_labels_do_not_mix(tmp_path: Path, path: Path) -> None:
    """All splits of a cache have the same kind of labels."""
    write_toy(tmp_path / "one", 100)
    match = "split 'train' .* has one label a text, but split 'train' was given with several labels"
    with pytest.raises(CacheMismatchError, match=match):
        write_rows(tmp_path / "one", 100)
    match = "split 'train' .* has several labels a text, but split 'test' was given with one label"
    with (
        CacheWriter(path, dataset=DATASET) as writer,
        pytest.raises(CacheMismatchError, match=match),
    ):
        writer.add_split("test", labels=Toy(5).labels, text_hash=Toy(5).text_hash)


NAN, BEYOND = float("nan"), 1e300


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (
            {"weights": np.ones(4)},
            r"'train' has weights of shape \(4,\); its 3 examples and 3 classes need \(3,\)",
        ),
        ({"groups": np.ones((3, 1), "u8")}, r"has groups of shape \(3, 1\)"),
        ({"label_sets": np.zeros((3, 2), "i1")}, r"label_sets of shape \(3, 2\); .* need \(3, 3\)"),
        (
            {"weights": np.array([1, -0.5, 1])},
            r"row 1: the weight is -0.5 \(1 rows in all\); allowed",
        ),
        ({"weights": np.array([1, 1, NAN])}, "row 2: the weight is nan"),
        ({"weights": np.array([BEYOND, 1, 1])}, r"row 0: the weight is 1e\+300"),
        ({"weights": np.array([1, 1e-300, 1])}, "row 1: the weight is 1e-300"),
        ({"weights": np.zeros(3)}, "has the weight 0 in all of its 3 rows"),
        (
            {"label_sets": np.full((3, 3), 2)},
            r"row 0: its labels hold the values \[2\]; allowed are 0 and 1",
        ),
        (
            {"label_sets": np.array([[0, 0, 0], [0, -1, 1], [1, 1, 1]])},
            r"row 1: its labels hold the values \[-1, 0, 1\]",
        ),
        (
            {"label_sets": np.zeros((3, 3), "i1"), "labels": np.array([-1, 0, -1])},
            "row 1 has the label 0 beside its label set",
        ),
    ],
)
def test_bad_columns_are_refused(tmp_path: Path, columns: dict[str, Any], match: str) -> None:
    """What a column may not hold is refused with its row, and nothing is made."""
    given = {"labels": np.full(3, -1), "text_hash": np.arange(3)} | columns
    with (
        CacheWriter(tmp_path / "c", dataset=DATASET) as writer,
        pytest.raises(DataError, match=match),
    ):
        writer.add_split("train", **given)
    assert not (tmp_path / "c").exists()


def test_several_labels_need_a_class(tmp_path: Path) -> None:
    """Label sets over no class at all are refused."""
    dataset = type(DATASET)(name="none", labels=(), provenance={})
    given = {"labels": np.full(3, -1), "text_hash": np.arange(3), "label_sets": np.zeros((3, 0))}
    with (
        CacheWriter(tmp_path / "c", dataset=dataset) as writer,
        pytest.raises(DataError, match="several labels a text of 0 classes; 1 to 1048576 are"),
    ):
        writer.add_split("train", **given)


def test_they_enter_the_fingerprint(tmp_path: Path, path: Path) -> None:
    """Caches whose label sets, weights or groups differ are different caches."""
    prints = {open_cache(path).fingerprint}
    for number, name in enumerate(("labels", *COLUMNS)):
        write_rows(tmp_path / str(number), 100, name)
        prints.add(open_cache(tmp_path / str(number)).fingerprint)
    assert len(prints) == 5


def test_merge_brings_them(tmp_path: Path, path: Path) -> None:
    """A merged cache has the columns of whichever cache has them."""
    write_rows(tmp_path / "plain", 100, "label_sets")
    merge(tmp_path / "merged", [tmp_path / "plain", path])
    assert_rows(open_cache(tmp_path / "merged"))
    assert tree(tmp_path / "merged") == tree(path)
    merge(tmp_path / "merged", [tmp_path / "plain"])
    assert tree(tmp_path / "merged") == tree(path)


def test_copies_and_hdf5_are_the_same_bytes(tmp_path: Path, path: Path) -> None:
    """A copy, and what comes back from HDF5, is bit-identical."""
    copy(path, tmp_path / "copy")
    convert(path, tmp_path / "rows.h5")
    convert(tmp_path / "rows.h5", tmp_path / "back")
    assert tree(tmp_path / "copy") == tree(tmp_path / "back") == tree(path)


def test_archives_have_them(tmp_path: Path, path: Path) -> None:
    """An archive gives the same columns, and takes no others."""
    convert(path, tmp_path / "archive", archive=True)
    assert_rows(open_cache(tmp_path / "archive"))
    write_rows(tmp_path / "plain", 100, "label_sets")
    convert(tmp_path / "plain", tmp_path / "bare", archive=True)
    with pytest.raises(CacheMismatchError, match="an export is only read"):
        merge(tmp_path / "bare", [path])
    assert_rows(open_cache(tmp_path / "bare"), 100, "label_sets")


def test_remove_takes_them_along(tmp_path: Path, path: Path) -> None:
    """Removing a split removes its columns; removing a source leaves them."""
    remove(path, source="tiny")
    assert_rows(open_cache(path))
    remove(path, split="train")
    assert not (path / "train").exists()
    assert "minor" not in root(path)


@pytest.mark.parametrize("name", ["labels", "weight", "group"])
def test_damage_is_named(path: Path, name: str) -> None:
    """A flipped bit of a column is named by verify, and refused by the reader."""
    chunk = next((path / "train" / name).glob("c.0*"))
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(bytes(data))
    damage = verify(open_store(path)).damage
    assert [found.key for found in damage] == [f"train/{name}"]
    field = {"labels": "label_sets", "weight": "weights", "group": "groups"}[name]
    with pytest.raises(CacheCorruptError, match=f"train/{name}: the values are not those that"):
        _ = getattr(open_cache(path)["train"], field)


def test_a_column_of_another_type_is_refused(path: Path) -> None:
    """Labels whose document says another dtype or width are refused with both."""
    document = path / "train/weight/zarr.json"
    document.write_text(document.read_text().replace('"float32"', '"float16"'))
    match = r"train/weight is float16 \(100,\), but the cache states float32 \(100,\)"
    with pytest.raises(CacheCorruptError, match=match):
        _ = open_cache(path)["train"].weights


def test_a_newer_minor_version_is_read_and_not_written(tmp_path: Path, path: Path) -> None:
    """What a newer minor version added is ignored by readers; a writer would lose it, and stops."""
    edit_root(path, minor=7, something_new={"a": 1})
    assert_rows(open_cache(path))
    assert verify(open_store(path)).damage == ()
    before, match = tree(path), "is of cache format 1.7; this version .* writes up to format 1.1"
    with pytest.raises(CacheFormatError, match=match):
        write_rows(path)
    with pytest.raises(CacheFormatError, match=match):
        remove(path, source="tiny")
    assert tree(path) == before
    copy(path, tmp_path / "copy")
    assert tree(tmp_path / "copy") == before


@pytest.mark.parametrize("minor", [-1, "1", None, 1.5])
def test_a_minor_version_is_a_number(path: Path, minor: Any) -> None:
    """Anything but an integer from 0 on is refused."""
    edit_root(path, minor=minor)
    with pytest.raises(CacheFormatError, match="'minor'"):
        open_cache(path)


@pytest.mark.parametrize("name", ["labels", "weight", "Group"])
def test_their_names_are_reserved(tmp_path: Path, name: str) -> None:
    """No new source takes the place of a column."""
    source = type(SOURCE)(**vars(SOURCE) | {"name": name})
    with pytest.raises(ConfigError, match=f"'{name}' cannot name a source"):
        write_toy(tmp_path / "c", source=source)


def test_an_old_source_of_such_a_name_is_read_and_goes_on(tmp_path: Path) -> None:
    """A source `weight` of minor version 0 is read and extended; weights have no place there."""
    path = tmp_path / "old"
    write_toy(path, 80)
    for file in (
        path / "train/tiny",
        path / ".llmembed/index/train/tiny",
        path / ".llmembed/commits/train/tiny",
    ):
        file.rename(file.with_name("weight"))
    for record in (path / ".llmembed/commits/train/weight").iterdir():
        record.write_text(record.read_text().replace('"tiny"', '"weight"'))
    text = (
        (path / "zarr.json")
        .read_text()
        .replace('"tiny"', '"weight"')
        .replace("train/tiny", "train/weight")
    )
    (path / "zarr.json").write_text(text)
    edit_root(path)
    source = type(SOURCE)(**vars(SOURCE) | {"name": "weight"})
    write_toy(path, 100, source=source)
    np.testing.assert_array_equal(
        open_cache(path)["train"].features(8, pooling="mean"), Toy(100).features("mean", 8)
    )
    with (
        CacheWriter(path, dataset=DATASET) as writer,
        pytest.raises(
            ConfigError, match="has a source named 'weight', where the column of that name"
        ),
    ):
        writer.add_split("train", **rows_of(100, "weights"))


def test_leftovers_of_columns_do_not_count(tmp_path: Path) -> None:
    """Columns that lie there without the root naming them are written anew."""
    write_rows(tmp_path / "whole", 100, "weights")
    write_rows(tmp_path / "cut", 100, "groups")
    (tmp_path / "cut/train/weight").mkdir()
    for file in (tmp_path / "whole/train/weight").iterdir():
        (tmp_path / "cut/train/weight" / file.name).write_bytes(file.read_bytes()[:-2])
    assert open_cache(tmp_path / "cut")["train"].weights is None
    write_rows(tmp_path / "cut", 100, "weights")
    np.testing.assert_array_equal(
        open_cache(tmp_path / "cut")["train"].weights, toy_rows.weights(100)
    )
    assert verify(open_store(tmp_path / "cut")).damage == ()


def test_info_tells_of_them(path: Path) -> None:
    """`info` counts labels a text, the span of the weights, and groups."""
    description = describe(open_cache(path))
    sets = label_sets(100)
    n_labels = sets.sum(axis=1)[sets[:, 0] >= 0]
    split = description["splits"]["train"]
    assert split["label_sets"] == {
        "n_labelled": 90,
        "labels_per_text": round(n_labels.mean(), 4),
        "n_without_label": (n_labels == 0).sum(),
    }
    assert split["weights"] == {"min": 0.0, "max": 1.5}
    assert split["groups"] == {"n_groups": 20}
    lines = list(tree_of(description))
    assert lines[0].endswith("toy, 3 classes, several labels a text")
    told = "train/  100 rows, 1.4333 labels a text in 90 labelled rows (13 have none)"
    assert any(f"{told}, weights 0.0 to 1.5, 20 groups" in line for line in lines)
