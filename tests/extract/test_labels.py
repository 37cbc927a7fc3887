from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmembed.common.errors import DataError, LLMEmbedWarning
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.columns import as_labels
from llmembed.extract.texts.corpora import load_corpus
from llmembed.extract.texts.labels import Labels, encode_labels

NAMES = {"coarse": ["animal", "plant"], "fine": ["cat", "dog", "oak"]}


def encode(**splits: list[Any]) -> Labels:
    return encode_labels({split: pa.chunked_array([values]) for split, values in splits.items()})


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50).filter(lambda x: len(set(x)) > 1))
def test_integers_of_a_csv_name_classes_minus_one_too(labels: list[int]) -> None:
    """Whatever integers a csv has, each row keeps its own as class name, and none is unlabelled."""
    encoded = encode(train=[str(label) for label in labels])
    assert [int(encoded.names[code]) for code in encoded.codes["train"]] == labels
    assert list(encoded.names) == [str(label) for label in sorted(set(labels))]


def two_class_labels() -> datasets.Dataset:
    features = datasets.Features(
        {"coarse": datasets.ClassLabel(names=NAMES["coarse"])}
        | {"text": datasets.Value("string"), "count": datasets.Value("int64")}
        | {"fine": datasets.ClassLabel(names=NAMES["fine"])}
    )
    rows = {"text": ["a", "b", "c"], "coarse": [0, 1, -1], "fine": [1, 2, 0], "count": [7, 7, 9]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("kind", ["parquet", "hub layout", "saved split", "saved splits"])
@pytest.mark.parametrize(
    ("column", "names", "codes"),
    [
        ("coarse", ("animal", "plant"), [0, 1, -1]),
        ("fine", ("cat", "dog", "oak"), [1, 2, 0]),
        ("count", ("7", "9"), [0, 0, 1]),
    ],
)
def test_names_of_classes_are_those_of_the_label_column_alone(
    tmp_path: Path, kind: str, column: str, names: tuple[str, ...], codes: list[int]
) -> None:
    """Beside another ClassLabel, a column has its own names or none, however it was saved."""
    if kind == "saved split":
        two_class_labels().save_to_disk(tmp_path / "d")
    elif kind == "saved splits":
        datasets.DatasetDict({"train": two_class_labels()}).save_to_disk(tmp_path / "d")
    else:
        name = "train.parquet" if kind == "parquet" else "data/train-00000-of-00001.parquet"
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True)
        two_class_labels().to_parquet(path)
    corpus = load_corpus(DatasetOptions(str(tmp_path / "d"), label_column=column))
    assert (corpus.labels, corpus.splits["train"].labels.tolist()) == (names, codes)


def test_splits_that_name_their_classes_differently_are_refused(tmp_path: Path) -> None:
    """The same integer would be two classes."""
    for split, names in (("train", ["no", "yes"]), ("test", ["yes", "no"])):
        features = {"label": {"_type": "ClassLabel", "names": names}}
        table = pa.table({"text": ["a", "b"], "label": [0, 1]}).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=r"split 'train' \['no', 'yes'\], so the same integer is"):
        load_corpus(DatasetOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{", "the metadata 'huggingface' of the file with column 'label' cannot be read"),
        ("[]", "the metadata 'huggingface' of the file with column 'label' cannot be read"),
        ("[" * 10**5, "cannot be read (RecursionError)"),
        ('{"info": {"features": {"label": 1}}}', "cannot be read (AttributeError)"),
        (
            '{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, 2]}}}}',
            "the ClassLabel 'label' must be a JSON list of class names",
        ),
        (
            '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "a"]}}}}',
            "the ClassLabel 'label' has the class name 'a' more than once",
        ),
    ],
)
def test_a_description_of_columns_that_is_none_is_refused(
    tmp_path: Path, about: str, message: str
) -> None:
    """Metadata of another shape ends in one sentence."""
    table = pa.table({"text": ["a", "b"], "label": [0, 1]})
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": about}), path)
    with pytest.raises(DataError, match=re.escape(message)):
        load_corpus(DatasetOptions(str(path)))


def test_what_has_no_label_is_told_with_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each kind of "no label" is named once a split, and a split without any label is left out."""
    for split, labels in (("train", "a,b,,?,?"), ("test", ",,"), ("dev", "a,b")):
        rows = "".join(f"text,{label}\n" for label in labels.split(","))
        (tmp_path / f"{split}.csv").write_text("text,label\n" + rows)
    with caplog.at_level(logging.INFO, logger="llmembed"):
        corpus = load_corpus(DatasetOptions(str(tmp_path), unlabelled=""))
    assert corpus.splits.keys() == {"train", "validation"}
    assert corpus.labels == ("?", "a", "b")
    assert caplog.messages == [
        f"{tmp_path}: train from train.csv, test from test.csv, validation from dev.csv.",
        "1 of 5 rows of split 'train' have no label (empty).",
        "3 of 3 rows of split 'test' have no label (empty). It is left out; --split test takes it.",
    ]
    assert corpus.provenance["unlabelled"] == ""


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["Pos", "pos", "neg"]}, "labels differ only by blanks or case, and are differ"),
        ({"train": ["x", "y", " x"]}, "' x' and 'x'. Write them alike if they are one."),
        ({"train": ["x", "y"], "test": ["x", "X"]}, "'X' and 'x'"),
        (
            {"train": ["x", "y"], "test": ["x", "z", "z"]},
            "that no row of split 'train' has, so no classifier can learn them: 'z' (2 rows).",
        ),
        (
            {"train": ["x", "y", "x; y"]},
            "others joined by ';', and are classes of their own: 'x; y'. If a text may have",
        ),
    ],
)
def test_labels_that_look_like_a_mistake_are_warned_of(
    splits: dict[str, list[str]], message: str
) -> None:
    """Both values are named, and each stays a class of its own."""
    with pytest.warns(LLMEmbedWarning) as caught:
        encoded = encode(**splits)
    assert any(message in str(one.message) for one in caught)
    assert len(encoded.names) == len({label for labels in splits.values() for label in labels})


def test_labels_that_are_fine_are_not_warned_of() -> None:
    """Splits without a label, and classes that only train has, pass without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(train=["a", "b", "c"], validation=["a", "b"], test=["", ""])
        encode(train=["sports", "arts, sports and more", "a|b"])


def test_an_unlabelled_that_no_row_has_is_warned_of() -> None:
    """A slip of the pen in --unlabelled does not go unseen."""
    with pytest.warns(LLMEmbedWarning, match="no row has the label '--' that --unlabelled names"):
        encode_labels({"train": pa.chunked_array([["a", "b"]])}, unlabelled="--")


def test_names_that_do_not_apply_are_warned_of() -> None:
    """labels.json names integers; beside strings it is not used, and that is said."""
    with pytest.warns(LLMEmbedWarning, match="has the label 'a': these names are not used"):
        encoded = encode_labels({"train": pa.chunked_array([["a", "b"]])}, ["no", "yes"])
    assert encoded.names == ("a", "b")


def test_a_single_label_that_only_evaluation_has_is_a_class_if_its_split_is_named() -> None:
    """What looks like a mark for "no label" is refused, and taken where its split is named."""
    columns = {"train": pa.chunked_array([[0, 1]]), "test": pa.chunked_array([[-1, -1]])}
    with pytest.raises(DataError, match="If it means that there is no label, pass --unlabelled"):
        encode_labels(columns)
    with pytest.warns(LLMEmbedWarning, match="no classifier can learn them: '-1'"):
        named = encode_labels(columns, wanted=["train", "test"])
    assert named.names == ("-1", "0", "1")


def test_labels_of_categories_and_decimals_are_class_names() -> None:
    """A pandas category with missing rows, and whole decimals, are read as their values."""
    category = pa.chunked_array([pa.array(["b", None, "a"]).dictionary_encode()])
    found = encode_labels({"train": category}, unlabelled="")
    assert (found.names, found.codes["train"].tolist()) == (("a", "b"), [1, -1, 0])
    decimals = pa.chunked_array([pa.array(["1.0", "0.0"]).cast(pa.decimal128(3, 1))])
    assert encode_labels({"train": as_labels("t", "label", decimals)}).names == ("0", "1")


def test_the_order_of_classes_does_not_depend_on_the_order_of_rows() -> None:
    """Labels that are the same number are ordered by how they are written."""
    for labels in (["01", "1", "2"], ["2", "1", "01"]):
        assert encode(train=labels).names == ("01", "1", "2")
    huge = "1" * 5000
    assert encode(train=[huge, "1"]).names == ("1", huge)
    np.testing.assert_array_equal(encode(train=[huge, "1"]).codes["train"], [1, 0])
