"""What stands in the output of a prediction, beside each text and in which form."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmembed.common.errors import ConfigError, LLMEmbedWarning, RunStorageError
from llmembed.train.runs.answers import Answers, check_output, write

PROBA = np.array([[0.25, 0.75], [0.875, 0.125]])
BESIDE: dict[str, Any] = {
    "id": [7, None],
    "day": [dt.date(2026, 1, 2), None],
    "price": [Decimal("1.50"), Decimal("2.25")],
    "share": [0.5, float("nan")],
    "tags": [["a", "b"], []],
}


def answers(*, with_all: bool = True, **beside: list[Any]) -> Answers:
    return Answers(
        texts=["one", "two\nlines"],
        labels=["no", "yes"],
        proba=PROBA,
        with_all=with_all,
        beside=pa.table(beside) if beside else None,
    )


def test_columns_beside_the_texts_go_along(tmp_path: Path) -> None:
    """Each row keeps what stood beside its text, in its order and before ours, in every form."""
    for suffix in (".csv", ".jsonl", ".parquet"):
        write(tmp_path / f"out{suffix}", answers(**BESIDE))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    first = {"id": 7, "day": "2026-01-02", "price": "1.50", "share": 0.5, "tags": ["a", "b"]}
    ours = {"text": "one", "label": "yes", "probability": 0.75}
    assert list(rows[0].items())[:-1] == [*first.items(), *ours.items()]
    assert rows[0]["probabilities"] == {"no": 0.25, "yes": 0.75}
    assert [rows[1][name] for name in ("id", "share", "text")] == [None, None, "two\nlines"]
    written = csv.DictReader(io.StringIO((tmp_path / "out.csv").read_bytes().decode()))
    one, two = written
    assert list(one) == [*BESIDE, "text", "label", "probability", "p_no", "p_yes"]
    assert (one["id"], one["tags"], two["id"], two["text"]) == ("7", '["a", "b"]', "", "two\nlines")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == list(one)
    assert table.schema.field("day").type == pa.date32()
    assert table["price"].to_pylist() == BESIDE["price"]
    assert table["p_yes"].to_pylist() == [0.75, 0.125]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".jsonl", ".parquet"]


def test_a_column_that_is_called_like_one_of_ours_is_renamed() -> None:
    """The input's own labels stand beside the predicted ones under a free name, and it is said."""
    beside: dict[str, Any] = {"label": ["x", "y"], "input_label": ["u", "v"], "p_no": [1, 2]}
    with pytest.warns(LLMEmbedWarning, match=r"a column 'label'.*input's is 'input_input_label'"):
        row = next(answers(with_all=False, **beside).rows())
    assert list(row)[:3] == ["input_input_label", "input_label", "p_no"]
    assert (row["label"], row["input_label"], row["input_input_label"]) == ("yes", "u", "x")
    with pytest.warns(LLMEmbedWarning, match=r"a column 'p_no'.*the input's is 'input_p_no'"):
        assert answers(p_no=[1, 2]).table()["input_p_no"].to_pylist() == [1, 2]


LIKELY = np.array([[0.1, 0.3, 0.6], [0.4, 0.4, 0.2]])


def test_the_likeliest_classes_are_told_in_their_order(tmp_path: Path) -> None:
    """On a terminal, as JSON and as columns; of equally likely ones the first class is first."""
    names = ["a", "b", "c"]
    top = Answers(texts=["x", "y"], labels=names, proba=LIKELY, with_all=False, top_k=2)
    assert [*top.lines()] == [
        *("c\t0.6000\tx", "  c\t0.6000", "  b\t0.3000"),
        *("a\t0.4000\ty", "  a\t0.4000", "  b\t0.4000"),
    ]
    first, second = top.rows()
    assert [one["label"] for one in (*first["top"], *second["top"])] == ["c", "b", "a", "b"]
    assert [one["probability"] for one in first["top"]] == [0.6, 0.3]
    assert "probabilities" not in first
    for suffix in (".csv", ".parquet"):
        write(tmp_path / f"out{suffix}", top)
    table = pq.read_table(tmp_path / "out.parquet")
    columns = ["text", "label", "probability", "label_1", "probability_1", "label_2"]
    assert table.column_names == [*columns, "probability_2"]
    assert table["label_1"].to_pylist() == table["label"].to_pylist() == ["c", "a"]
    assert table["probability_2"].to_pylist() == [0.3, 0.4]
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == "x,c,0.6,c,0.6,b,0.3"


def test_formulas_are_defused_on_request(tmp_path: Path) -> None:
    """Texts of a csv that a spreadsheet runs get an apostrophe, names too; numbers stay."""
    begin = ["=1+1", "+a", "-a", "@a", "\ta", "\ra"]
    harmless = ["a=1", "", "-5", "+1.5e-3", "'=1", " =1"]
    texts = [*begin, *harmless]
    beside = pa.table({"=cmd": [-5, *range(len(texts) - 1)], "share": [-0.5] * len(texts)})
    proba = np.tile([0.25, 0.75], (len(texts), 1))
    given: Any = {"texts": texts, "proba": proba, "with_all": False, "beside": beside}
    found = Answers(labels=["no", "@yes"], **given)
    for defuses in (True, False):
        write(tmp_path / "out.csv", found, defuses_formulas=defuses)
        with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
            names, *rows = csv.reader(file)
        mark = "'" if defuses else ""
        assert names == [f"{mark}=cmd", "share", "text", "label", "probability"]
        assert [row[2] for row in rows] == [*(f"{mark}{text}" for text in begin), *harmless]
        assert [rows[0][0], rows[0][1], rows[0][3]] == ["-5", "-0.5", f"{mark}@yes"]


def test_a_terminal_gets_no_control_characters() -> None:
    """Labels, texts and class names are escaped, a row a line; tabs stand between fields alone."""
    shown = Answers(
        texts=["a\x1b[2Jb\tc\nd"], labels=["no", "\x9b\u202e"], proba=PROBA[:1], with_all=True
    ).lines()
    first, *others = shown
    assert first == "\\x9b\\u202e\t0.7500\ta\\x1b[2Jb\\tc\\nd"
    assert others == ["  no\t0.2500", "  \\x9b\\u202e\t0.7500"]


def test_no_text_gives_no_row(tmp_path: Path) -> None:
    """The columns of no text at all are written, without a row."""
    write(
        tmp_path / "out.csv",
        Answers(texts=[], labels=["no", "yes"], proba=np.empty((0, 2)), with_all=True),
    )
    assert (tmp_path / "out.csv").read_text() == "text,label,probability,p_no,p_yes\n"


def test_an_output_that_fails_is_told(tmp_path: Path) -> None:
    """A folder in its place, and a name that cannot be, end in one sentence and leave nothing."""
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(RunStorageError, match=r"out\.csv could not be written: Is a directory"):
        write(tmp_path / "out.csv", answers())
    with pytest.raises(RunStorageError, match="could not be written: File name too long"):
        write(tmp_path / f"{'x' * 300}.csv", answers())
    with pytest.raises(ConfigError, match=r"out\.csv is a folder\. Pass a file"):
        check_output(tmp_path / "out.csv")
    with pytest.raises(ConfigError, match=r"does not exist\. Make it"):
        check_output(Path("x" * 5000) / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
