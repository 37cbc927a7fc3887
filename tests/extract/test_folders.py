from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from llmembed.common.errors import DataError, LLMEmbedWarning
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus

Change = Callable[[Path], object]


def write_shard(path: Path, texts: list[str], labels: list[object]) -> None:
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pa.table({"text": texts, "label": labels}), path)


def test_shards_are_one_split_in_their_order(tmp_path: Path) -> None:
    """Rows come shard by shard, by number and not by name of the folder's listing."""
    for index in (10, 2, *range(2), *range(3, 10)):
        name = f"train-{index:05d}-of-00011.parquet"
        write_shard(tmp_path / "data" / name, [f"{index} a", f"{index} b"], [0, 1])
    examples = load_corpus(DatasetOptions(str(tmp_path))).splits["train"]
    assert examples.batch(slice(0, 99)) == [f"{k} {x}" for k in range(11) for x in "ab"]


def test_shards_with_other_columns_are_refused(tmp_path: Path) -> None:
    """A shard whose column has another type is named, with both types."""
    write_shard(tmp_path / "train-00000-of-00002.parquet", ["a"], [0])
    write_shard(tmp_path / "train-00001-of-00002.parquet", ["b"], ["1"])
    with pytest.raises(DataError, match=r"label \(string\), its first shard .*label \(int64\)"):
        load_corpus(DatasetOptions(str(tmp_path)))


def test_splits_left_out_need_no_columns(tmp_path: Path) -> None:
    """--split is the way out where another file of the folder is no split."""
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "prices.csv").write_text("item,price\na,0\n")
    with pytest.raises(DataError, match="split 'prices' has no column 'text'"):
        load_corpus(DatasetOptions(str(tmp_path)))
    assert list(load_corpus(DatasetOptions(str(tmp_path), splits=["train"])).splits) == ["train"]


def test_a_folder_without_a_training_split_is_warned_of(tmp_path: Path) -> None:
    """Where no file is called train, that is said, unless --split names what is wanted."""
    for name in ("part1", "part2"):
        (tmp_path / f"{name}.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.warns(LLMEmbedWarning, match="has no split 'train'.* only part1, part2. Rename"):
        load_corpus(DatasetOptions(str(tmp_path)))
    assert list(load_corpus(DatasetOptions(str(tmp_path), splits=["part2"])).splits) == ["part2"]


def test_two_splits_of_one_purpose_are_refused(tmp_path: Path) -> None:
    """A saved data set with dev beside validation does not lose one of them."""
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    splits = {"train": part, "dev": part, "validation": part}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    with pytest.raises(DataError, match="two splits for 'validation': 'dev' and 'validation'"):
        load_corpus(DatasetOptions(str(tmp_path)))


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["labels.json", "dataset_dict.json", "train/state.json"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text("{"), " is not a JSON document: "),
        (lambda path: path.write_text("[" * 10**5), " is not a JSON document: "),
        (lambda path: path.write_text("9" * 5000), " is not a JSON document: "),
        (lambda path: path.write_bytes('["ä"]'.encode("cp1252")), " is not UTF-8. Save it as"),
        (lambda path: path.write_text("[1]"), "list"),
        (lambda path: path.write_text("{}"), "list"),
        (replace_by_a_folder, " is missing or not a file"),
        (replace_by_a_fifo, " is missing or not a file"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, change: Change, message: str
) -> None:
    """Malformed, nested, of another encoding, of another shape, or no file: one sentence."""
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    if name == "labels.json":
        write_shard(tmp_path / "train.parquet", ["a", "b"], [0, 1])
        (tmp_path / name).touch()
    else:
        datasets.DatasetDict({"train": part}).save_to_disk(tmp_path)
    change(tmp_path / name)
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / name))}.*{message}"):
        load_corpus(DatasetOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset_dict.json", '{"splits": ["../outside"]}', "names '../outside', which is not the"),
        ("dataset_dict.json", '{"splits": [".."]}', "names '..', which is not the name of a file"),
        ("dataset_dict.json", '{"splits": ["/etc"]}', "names '/etc', which is not the name of a"),
        ("dataset_dict.json", '{"splits": [7]}', "names 7, which is not the name of a file"),
        ("dataset_dict.json", '{"splits": ["test"]}', "test/state.json is missing or not a file"),
        ("train/state.json", '{"_data_files": [{"filename": "../x"}]}', "names '../x', which is"),
        ("train/state.json", '{"_data_files": [{}]}', "names None, which is not the name of a"),
        ("train/state.json", '{"_data_files": [{"filename": "x"}]}', "which state.json names, is"),
        (
            "train/state.json",
            '{"_data_files": [{"filename": "state.json"}]}',
            "state.json cannot be read as an Arrow stream",
        ),
    ],
)
def test_a_saved_data_set_leads_nowhere_else(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    """Names in its descriptions are names of files beside them, and these are Arrow streams."""
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    part.save_to_disk(tmp_path / "outside")
    datasets.DatasetDict({"train": part}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        load_corpus(DatasetOptions(str(tmp_path / "saved")))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ('["a", "b", "a"]', "labels.json has the class name 'a' more than once. Rename one."),
        (r'["a", "\ud800"]', "labels.json has the class name '\\ud800', which is no text. Rename"),
        ('["a", 1]', "labels.json must be a JSON list of class names"),
    ],
)
def test_class_names_that_cannot_be_told_apart_or_written_are_refused(
    tmp_path: Path, names: str, message: str
) -> None:
    """Two integers with one name would be one class to a reader and two to a classifier."""
    (tmp_path / "labels.json").write_text(names)
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(DataError, match=re.escape(message)):
        load_corpus(DatasetOptions(str(tmp_path)))
