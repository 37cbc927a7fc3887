"""JSON files: strings stay strings, values of several kinds are named, rows are found."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmembed.common.errors import DataError
from llmembed.extract.texts import files
from llmembed.extract.texts.columns import as_labels, as_texts
from llmembed.extract.texts.files import read_table


def table_of(folder: Path, content: str, name: str = "t.jsonl") -> pa.Table:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return read_table(path)


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["2024-01-01", None], pa.large_string()),
        (["2024-01-01T10:00:00Z", "2024-01-01"], pa.large_string()),
        (["12:30:00", "1", "1e3", "true", "null", ""], pa.large_string()),
        ([1, None, -1], pa.int64()),
        ([2**63 - 1, -(2**63)], pa.int64()),
        ([1, 0.5], pa.float64()),
        ([True, False, None], pa.bool_()),
        ([None, None], pa.null()),
    ],
)
def test_a_column_has_the_type_of_its_values(
    tmp_path: Path, values: list[object], kind: pa.DataType
) -> None:
    """Dates, times and numbers in quotes are text; a number is a number; nothing is nothing."""
    table = table_of(tmp_path, lines(*({"text": "a", "label": value} for value in values)))
    assert table["label"].type == kind
    assert table["label"].to_pylist() == values
    assert as_labels("t.jsonl", "label", table["label"]).to_pylist() == values


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1, "1"], "holds a number in row 0 and text in row 1 of t.jsonl. Write all of its values"),
        (["a", None, 123], "holds text in row 0 and a number in row 2 of t.jsonl."),
        (["a", True], "holds text in row 0 and true or false in row 1"),
        ([0, 1, False], "holds a number in row 0 and true or false in row 2"),
        (["a", float("nan")], "holds text in row 0 and NaN in row 1"),
        ([1.5, 2**60], "holds a decimal number in row 0 and a long number in row 1"),
        (
            ["a", ["b"]],
            "holds a list in row 1 of t.jsonl. A text is one value; where a text has",
        ),
        ([{"a": 1}], "holds an object in row 0 of t.jsonl. A text or label is"),
        ([1, 2**70], "holds a number beyond 64 bits in row 1 of t.jsonl. Write it as text, in quo"),
        ([int("9" * 400)], "holds a number beyond 64 bits in row 0"),
        (["a", "b\ud83d"], "holds text with a lone surrogate in row 1 of t.jsonl. Repair the enco"),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_values_of_several_kinds_are_named_with_their_rows(
    tmp_path: Path, values: list[object], reason: str, name: str
) -> None:
    """The column says where two kinds meet when it is asked for, and does no harm before."""
    rows = [{"text": "a", "label": "x", "other": value} for value in values]
    content = json.dumps(rows) if name == "t.json" else lines(*rows)
    table = table_of(tmp_path, content, name)
    assert as_texts(name, "text", table["text"]).to_pylist() == ["a"] * len(values)
    message = f"column 'other' of split 'train' {reason}".replace("t.jsonl", name)
    for use in (as_texts, as_labels):
        with pytest.raises(DataError, match="^" + re.escape(message)):
            use("split 'train'", "other", table["other"])


@pytest.mark.parametrize(
    "number", ["1e400", "-1e400", "1" * 400, "9" * 5000, "9223372036854775808"]
)
def test_a_number_that_nothing_can_hold_is_one_sentence(tmp_path: Path, number: str) -> None:
    """It never becomes infinity, another number, or a traceback."""
    table = table_of(tmp_path, f'{{"text": "a", "label": {number}}}\n')
    with pytest.raises(DataError, match=r"holds a number beyond 64 bits in row 0 of t\.jsonl"):
        as_labels("split 'train'", "label", table["label"])


@pytest.mark.parametrize("opening", ["[", '{"a": '])
def test_nesting_has_one_bound_on_every_machine(tmp_path: Path, opening: str) -> None:
    """A hundred levels in a value are read, one more is refused, wherever the stack ends."""
    closing = {"[": "]", "{": "}"}[opening[0]]
    for levels in (100, 101, 900):
        nested = opening * levels + "1" + closing * levels
        content = f'{{"text": "a", "other": {nested}}}\n'
        if levels == 100:
            assert table_of(tmp_path, content)["other"].to_pylist() == [json.loads(nested)]
        else:
            with pytest.raises(DataError, match=r"row 0: 'other' is nested more than 100 deep\."):
                table_of(tmp_path, content)


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":', '{"text": "a", "b": [', '[[{"text":'])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_deep_nesting_is_refused(tmp_path: Path, opening: str, closed: bool, name: str) -> None:
    """A hundred thousand levels end in one sentence, not in a crash of the process."""
    closing = {"[": "]", "{": "}"}
    back = "".join(closing[one] for one in reversed(opening) if one in closing)
    content = opening * 100_000 + ("1" + back * 100_000 if closed else "")
    with pytest.raises(
        DataError, match=r"line 1: lists and objects are nested too deeply\. Repair"
    ):
        table_of(tmp_path, content, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": b}\n', "line 2: expecting value. Repair the file."),
        ('{"text": "a"}\n\n{"text": "b"\n', "line 4: expecting ',' delimiter."),
        ('{"text": "a\nb"}\n', "line 1: invalid control character at."),
        ('{"text": "a"}\n{"text": "b', "line 2: unterminated string starting at."),
        ('{"text": "a"},\n{"text": "b"}', "line 1: expecting value."),
        ('[{"text": "a"} {"text": "b"}]', "line 1: a comma or the end of the list is missing."),
        ('[{"text": "a"}', "line 1: a comma or the end of the list is missing."),
        ('[{"text": "a"}]\n{"text": "b"}', "line 2: there is more after the end of the list."),
        ("[{}, ]", "line 1: expecting value."),
        ('{"text": "a", "text": "b"}', "line 1: an object has the key 'text' more than once."),
        ('["a", "b"]', "row 0 is text, not an object. Write one object a row, such as {"),
        ('{"text": "a"}\n1\n', "row 1 is a number, not an object."),
        ('{"text": "a"}\nnull\n', "row 1 is nothing, not an object."),
        ("[]", "has no rows."),
        ("{}", "has no rows."),
        (" \n ", "has no rows."),
        ('{"a\\ud800": 1}', "row 0: the key 'a\\ud800' holds a lone surrogate. Rename it."),
    ],
)
def test_what_is_not_rows_is_refused_with_its_place(
    tmp_path: Path, content: str, message: str
) -> None:
    """Broken JSON names its line, a row that is no object its row."""
    with pytest.raises(DataError, match=re.escape(message)):
        table_of(tmp_path, content)


FRAME = pd.DataFrame({"text": ["a", "2024-01-01", "c\n"], "label": [0, 1, 0]})
ROWS = FRAME.to_dict("records")


@pytest.mark.parametrize(
    "content",
    [
        FRAME.to_json(),
        FRAME.to_json(orient="records"),
        FRAME.to_json(orient="records", lines=True),
        FRAME.to_json(orient="table"),
        json.dumps(FRAME.to_dict("list"), indent=2),
        json.dumps({"version": "1.0", "data": ROWS}),
        json.dumps({"anything": ROWS}),
        "\n\n".join(json.dumps(row, indent=4) for row in ROWS),
    ],
)
@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_rows_are_found_where_it_is_clear_what_they_are(
    tmp_path: Path, content: str, name: str
) -> None:
    """Lists, lines, `{"data": [...]}` and the columns that pandas writes give the same rows."""
    found = table_of(tmp_path, content, name).select(["text", "label"])
    assert found.to_pylist() == ROWS


@pytest.mark.parametrize(
    "content",
    [
        FRAME.to_json(orient="split"),
        FRAME.to_json(orient="index"),
        FRAME.set_index("text").T.to_json(),
        json.dumps({"train": ROWS, "test": ROWS}),
        json.dumps({"text": ["a", "b"], "label": [0]}),
        json.dumps({"text": ["a", "b"], "label": [["x"], ["y"]]}),
    ],
)
def test_an_object_without_clear_rows_says_how_to_write_them(tmp_path: Path, content: str) -> None:
    """Where it could be read in two ways, it is read in none."""
    with pytest.raises(
        DataError, match=r"in which it is not clear what a row is\. Write .*orient='"
    ):
        table_of(tmp_path, content, "t.json")


def test_a_column_of_several_kinds_keeps_its_values(tmp_path: Path) -> None:
    """What stands beside the texts can be given on; text that is no Unicode stays escaped."""
    values = [1, "1", None, {"a": [True]}, [0.5], "b\ud83d", ["\ud83d"]]
    table = table_of(tmp_path, lines(*({"text": "a", "other": value} for value in values)))
    assert table["other"].to_pylist() == [*values[:5], '"b\\ud83d"', '["\\ud83d"]']


def test_one_object_is_one_row_where_it_can_be(tmp_path: Path) -> None:
    """A file of one line is a row, lists beside the text or not."""
    row = {"text": "a", "label": "x", "tags": [{"name": "b"}]}
    assert table_of(tmp_path, json.dumps(row)).num_rows == 1


def test_keys_may_be_missing(tmp_path: Path) -> None:
    """A key that only a later row has is a column, missing before."""
    table = table_of(tmp_path, lines({"text": "a"}, {"label": "x", "text": "b"}, {}))
    assert table.to_pylist() == [
        {"text": "a", "label": None},
        {"text": "b", "label": "x"},
        {"text": None, "label": None},
    ]


def test_a_table_that_is_all_holes_is_refused(tmp_path: Path) -> None:
    """Rows that each bring a key of their own would make a table of their square."""
    content = lines(*({f"c{row}": 1} for row in range(5_000)))
    with pytest.raises(DataError, match="has 5000 different keys in 5000 rows, nearly all of them"):
        table_of(tmp_path, content)


values = st.none() | st.booleans() | st.integers() | st.floats(allow_infinity=False) | st.text()


@settings(deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=3), values | st.lists(values, max_size=2), min_size=1),
        min_size=2,
    ),
    block=st.integers(1, 40),
    as_list=st.booleans(),
)
def test_whatever_is_read_is_what_was_written(
    rows: list[dict[str, Any]], block: int, as_list: bool
) -> None:
    """For any rows, wherever blocks and batches end, each value is itself."""
    content = json.dumps(rows, indent=1) if as_list else lines(*rows)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(files, "_BLOCK", block)
        patch.setattr(files, "_AT_ONCE", 2 * block)
        table = table_of(Path(folder), content)
    assert table.num_rows == len(rows)
    for name in table.column_names:
        written = [row.get(name) for row in rows]
        found = table[name].to_pylist()
        assert json.dumps(found) == json.dumps([as_float(table, name, v) for v in written])


def as_float(table: pa.Table, name: str, value: object) -> object:
    return float(value) if table[name].type == pa.float64() and isinstance(value, int) else value
