"""docs/data.md says how data is understood; its tables are the test."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llmembed.common.errors import DataError
from llmembed.extract.cli import main
from llmembed.extract.config import ExtractConfig
from llmembed.extract.texts.corpora import Examples, load_corpus

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def rows_of_table(first_column: str, number: int = 0) -> list[list[str]]:
    """Read a Markdown table by the start of its head; of several with one, by its number."""
    rest = PAGE.split(f"| {first_column}")[number + 1]
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


LABELS = [*rows_of_table("labels of train"), *rows_of_table("labels of train", 1)]
FILES = rows_of_table("files")


def write(path: Path, labels: list[Any], class_label: tuple[str, list[str]] | None) -> None:
    texts = [f"text {row}" for row in range(len(labels))]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
        return
    if path.suffix == ".jsonl":
        rows = ({"text": text, "label": label} for text, label in zip(texts, labels, strict=True))
        path.write_text("\n".join(map(json.dumps, rows)))
        return
    table = pa.table({"text": texts, "lang": [0] * len(labels), "label": labels})
    if class_label is not None:
        column, names = class_label
        of_class: dict[str, Any] = {"_type": "ClassLabel", "names": names}
        is_listed = pa.types.is_list(table.schema.field(column).type)
        features = {column: {"_type": "List", "feature": of_class} if is_listed else of_class}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    pyarrow.parquet.write_table(table, path)


def config_of(options: str, **settings: Any) -> ExtractConfig:
    """Read options as the command does."""
    arguments = ["--model", "minilm", "--layers", "1", *shlex.split(options.strip("`"))]
    given = main.make_context("llmembed-extract", arguments).params
    names = {"as_json", "quiet", "debug"}
    fields = {name: value for name, value in given.items() if name not in names}
    return ExtractConfig(**fields | settings)


def indices_of(examples: Examples) -> str:
    """Write the labels of a split as the page does."""
    if examples.label_sets is None:
        return " ".join(map(str, examples.labels.tolist()))
    sets = (None if row[0] < 0 else np.flatnonzero(row).tolist() for row in examples.label_sets)
    return json.dumps([*sets])


@pytest.mark.filterwarnings("ignore::llmembed.common.errors.LLMEmbedWarning")
@pytest.mark.parametrize("row", LABELS, ids=[" ".join(row[:5]) for row in LABELS])
def test_labels_are_understood_as_the_page_says(tmp_path: Path, row: list[str]) -> None:
    """Each row of the table of labels: its classes and indices, or its error."""
    train, test, kind, beside, options, classes, expected = row
    where = re.fullmatch(r"(?:`labels.json`|(ClassLabel)) `(.+)`( of another column)?", beside)
    class_label = None
    if where is not None and where[1]:
        class_label = ("lang" if where[3] else "label", json.loads(where[2]))
    elif where is not None:
        (tmp_path / "labels.json").write_text(where[2])
    for split, labels in (("train", train), ("test", test)):
        if labels:
            write(tmp_path / f"{split}.{kind}", json.loads(labels.strip("`")), class_label)
    config = config_of(options, dataset=str(tmp_path))
    if not classes:
        with pytest.raises(DataError, match=re.escape(expected)):
            load_corpus(config.dataset_options)
        return
    corpus = load_corpus(config.dataset_options)
    assert ", ".join(corpus.labels) == classes.strip("`")
    found = [indices_of(one) for one in corpus.splits.values()]
    assert found == re.findall(r"`(.+?)`", expected)


@pytest.mark.parametrize(("files", "expected"), FILES)
def test_splits_are_understood_as_the_page_says(tmp_path: Path, files: str, expected: str) -> None:
    """Each row of the table of files: the splits that they make, or the error."""
    for name in re.findall(r"`(.+?)`", files):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text,label\na,0\nb,1\n" if name.endswith(".csv") else "{}\n")
    config = config_of("", dataset=str(tmp_path))
    splits = re.findall(r"`(.+?)`", expected)
    if splits:
        assert list(load_corpus(config.dataset_options).splits) == splits
    else:
        with pytest.raises(DataError, match=re.escape(expected)):
            load_corpus(config.dataset_options)
