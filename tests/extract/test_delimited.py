"""Delimited files: what is read to the letter, what is refused with its line and the way out."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from llmembed.cache_format import open_cache
from llmembed.common.errors import ConfigError, DataError, DatasetNotFoundError
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.cli import main as extract_main
from llmembed.extract.features.recheck import recheck
from llmembed.extract.texts import DatasetOptions, Dialect
from llmembed.extract.texts.corpora import load_corpus
from llmembed.extract.texts.files import read_table


def read(
    folder: Path, content: str | bytes, name: str = "t.csv", **dialect: str
) -> list[list[str]]:
    """Write a file and read it: the names, then the rows."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    table = read_table(path, Dialect(**dialect))
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return [table.column_names, *map(list, rows)]


@pytest.mark.parametrize(
    ("content", "dialect", "rows"),
    [
        ('text,label\n"a ""b"", c",x\n', {}, [['a "b", c', "x"]]),
        ('text,label\n5" disk,x\n', {}, [['5" disk', "x"]]),
        ('text,label\n"C:\\",x\n', {}, [["C:\\", "x"]]),
        ("\ufefftext,label\r\na,x\r\n\r\n\r\nb,y", {}, [["a", "x"], ["b", "y"]]),
        ("text,label\ra,x\rb,y\r", {}, [["a", "x"], ["b", "y"]]),
        ('text,label\n"say \\"hi\\"",x\n', {"csv_escape": "\\"}, [['say "hi"', "x"]]),
        (
            'text,label\n"say \\"hi\\", he said",x\n',
            {"csv_escape": "\\"},
            [['say "hi", he said', "x"]],
        ),
        ('text,label\n"a ""b"" \\\\",x\n', {"csv_escape": "\\"}, [['a "b" \\', "x"]]),
        ("text;label\na, b;x\n", {"delimiter": ";"}, [["a, b", "x"]]),
        ("text\tlabel\na, b\tx\n", {"delimiter": "tab"}, [["a, b", "x"]]),
        ("text|label\na|x\n", {"delimiter": "|"}, [["a", "x"]]),
        ("text,label\n'a, b',x\n", {"csv_quote": "'"}, [["a, b", "x"]]),
        ('text,label\n"a" b",x\n', {"csv_quote": "none"}, [['"a" b"', "x"]]),
        ("text;raw\na\n", {"delimiter": ","}, [["a"]]),
    ],
)
def test_a_delimited_file_is_read_to_the_letter(
    tmp_path: Path, content: str, dialect: dict[str, str], rows: list[list[str]]
) -> None:
    """Quotes, escapes, delimiters, line ends and a byte-order mark mean what they mean, no more."""
    assert read(tmp_path, content, **dialect)[1:] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            'text,label\na,y\n"say \\"hi\\" now",x\n',
            (
                'line 3: a quoted field has a " inside that is not doubled. Double it; or pass '
                "--csv-escape '\\' if the file writes \\\", or --csv-quote none if quotes are "
                "characters as any other."
            ),
        ),
        ('text,label\n"a\nb" c,x\n', 'lines 2 to 3: a quoted field has a " inside that is not'),
        ('text,label\n"ends with \\"",x\n"b",y\n', 'lines 2 to 3: a quoted field has a " inside'),
        ('text,label\n"say \\"hi\\", he said",x\n', 'line 2: a quoted field has a " inside'),
        ('text,label\n"so \\", he said",x\n', "line 2: the number of fields is 3, but the header"),
        ('text,label\na,x\n"b\nc,y\n', "line 3: a quote opens here that nothing closes. Close it;"),
        ("text,label\na,x\n\nb, c,y\n", "line 4: the number of fields is 3, but the header has 2."),
        ("text,label\na\n", "line 2: the number of fields is 1, but the header has 2. Quote field"),
        (
            "text;label\na;x\n",
            (
                "has one column, 'text;label', whose name holds another delimiter. Pass "
                "--delimiter ';', or --delimiter ',' if it is one column."
            ),
        ),
        ("text\tlabel\na\tx\n", "whose name holds another delimiter. Pass --delimiter tab, or --"),
        ("text,label,text \na,b,c\n", "has the column 'text' more than once. Rename one."),
    ],
)
@pytest.mark.filterwarnings("ignore:.*without the blanks")
def test_what_breaks_the_rules_is_refused_with_its_line(
    tmp_path: Path, content: str, message: str
) -> None:
    """No text is ever garbled: quotes escaped otherwise and other delimiters name the way out."""
    with pytest.raises(DataError, match=re.escape(message)):
        read(tmp_path, content)


def test_a_tsv_with_commas_names_the_comma(tmp_path: Path) -> None:
    """The hint works in both directions."""
    with pytest.raises(DataError, match=r"Pass --delimiter ',', or --delimiter tab if it is one"):
        read(tmp_path, "text,label\na,x\n", name="t.tsv")


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.text(), min_size=2, max_size=2), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|:"),
)
def test_an_escaped_file_gives_back_its_texts(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], delimiter: str
) -> None:
    """Whatever is written with a backslash as escape is read with it, for any delimiter."""
    path = tmp_path_factory.mktemp("escaped") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(
            file, delimiter=delimiter, escapechar="\\", doublequote=False, quoting=csv.QUOTE_ALL
        )
        writer.writerows([["text", "label"], *rows])
    table = read_table(path, Dialect(delimiter=delimiter, csv_escape="\\"))
    assert [list(row.values()) for row in table.to_pylist()] == rows


def test_the_limit_of_the_csv_module_is_left_as_it_was(tmp_path: Path) -> None:
    """A program that uses the csv module itself sees no change, also after an error."""
    before = csv.field_size_limit()
    read(tmp_path, "text,label\n" + "a" * 200_000 + ",x\n")
    with pytest.raises(DataError):
        read(tmp_path, "text,label\na\n")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delimiter": ";;"}, "--delimiter is ';;', which is not one character. Pass one, such as"),
        ({"delimiter": ""}, "--delimiter is '', which is not one character"),
        ({"csv_escape": "\n"}, "--csv-escape is '\\n', which is not one character"),
        ({"csv_quote": "no"}, "--csv-quote is 'no', which is not one character"),
        ({"csv_quote": "\\", "csv_escape": "\\"}, "--csv-escape and --csv-quote are the same"),
    ],
)
def test_options_that_can_not_be_are_refused(options: dict[str, str], message: str) -> None:
    """Each is one character, and they differ; told before any file is read."""
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        ExtractConfig(model="minilm", layers="1", **options)


def test_what_was_said_of_the_file_stays_with_the_cache(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The cache records the options, resumes with them, and its rows are found again by them."""
    path = tmp_path / "semicolons.csv"
    path.write_text("text;label\n" + '"a \\"b\\", c";x\nb, c;y\n' * 8)
    options: dict[str, Any] = {
        **settings,
        "dataset": str(path),
        "delimiter": ";",
        "csv_escape": "\\",
        "cache": str(tmp_path / "c.zarr"),
    }
    extract(ExtractConfig(**options))
    assert extract(ExtractConfig(**options)).n_rows_computed == 0
    provenance = open_cache(options["cache"]).dataset.provenance
    assert (provenance["delimiter"], provenance["csv_escape"]) == (";", "\\")
    assert "csv_quote" not in provenance
    assert recheck(options["cache"], model=options["model"]).differences == ()


def test_the_command_takes_them(tmp_path: Path) -> None:
    """A wrong file is one sentence before any model is looked for."""
    path = tmp_path / "t.csv"
    path.write_text("text;label\na;x\n")
    arguments = ["--model", "no/such", "--layers", "1", "--dataset", str(path)]
    result = CliRunner().invoke(extract_main, arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "Pass --delimiter ';'" in result.stderr
    result = CliRunner().invoke(extract_main, [*arguments, "--delimiter", ";"])
    assert "the labels have the classes ['x']" in result.stderr


@pytest.mark.parametrize("dataset", ["r8", "some/where"])
def test_options_of_files_are_refused_for_other_data_sets(dataset: str) -> None:
    """An alias or a data set of the Hub has no delimiter."""
    with pytest.raises(
        ConfigError, match=f"--csv-escape is for csv, .*the data set '{dataset}' is"
    ):
        load_corpus(DatasetOptions(dataset, dialect=Dialect(csv_escape="\\")))


@pytest.mark.parametrize("dataset", ["a" * 5000 + ".csv", "a/" + "b" * 5000, "a\0.csv"])
def test_what_can_be_no_path_is_one_short_sentence(dataset: str) -> None:
    """A data set that no file system and no Hub can have is not there."""
    with pytest.raises(DatasetNotFoundError, match=r"^data set '.*' does not exist") as caught:
        load_corpus(DatasetOptions(dataset))
    assert len(str(caught.value)) < 500
