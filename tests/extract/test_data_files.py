"""The page on data is true: its table of decisions is executed row by row."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from llmembed.common.errors import LLMEmbedError
from llmembed.extract.cli import main as extract_main
from llmembed.extract.texts import Dialect
from llmembed.extract.texts.columns import as_labels, as_texts
from llmembed.extract.texts.files import PACKED, READERS, read_table

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
FILES = PAGE.split("## Files", 1)[1].split("\n## ", 1)[0]
ROWS = [
    [cell.strip().strip("`") for cell in re.split(r"(?<= )[|](?= )", line.strip("|"))]
    for line in FILES.split("| file | content |", 1)[1].splitlines()[2:]
    if line.startswith("|")
]


def write(path: Path, content: str) -> None:
    if content.startswith("pa."):
        column = eval(content, {"pa": pa})  # noqa: S307 - it is our own page
        table = pa.table({"text": column, "label": column})
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            pyarrow.feather.write_feather(table, str(path))
        return
    text = content.replace("⏎", "\n").replace("⇥", "\t").encode()
    pack = {".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    path.write_bytes(pack.get(path.suffix, lambda data: data)(text))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_row_of_the_table_of_files_holds(tmp_path: Path, row: list[str]) -> None:
    """The example gives these texts and labels, or an error with these words."""
    suffix, content, option, texts, labels = row
    path = tmp_path / f"t{suffix}"
    write(path, content)
    given = dict([option.removeprefix("--").replace("-", "_").split(" ")]) if option else {}

    def texts_of() -> object:
        return as_texts(path.name, "text", read_table(path, Dialect(**given))["text"]).to_pylist()

    def labels_of() -> object:
        table = read_table(path, Dialect(**given))
        return as_labels(path.name, "label", table["label"]).to_pylist()

    if texts != "refused":
        assert texts_of() == json.loads(texts)
    if labels.startswith("["):
        assert labels_of() == json.loads(labels)
    else:
        with pytest.raises(LLMEmbedError, match=re.escape(labels)):
            (texts_of if texts == "refused" else labels_of)()


def test_the_page_knows_every_suffix_and_option() -> None:
    """What is read stands on the page, and what is on the page exists."""
    assert len(ROWS) > 35
    for suffix in [*READERS, *PACKED]:
        assert suffix in FILES
    options = {option for parameter in extract_main.params for option in parameter.opts}
    assert set(re.findall(r"--(?:delimiter|csv-\w+)", FILES)) <= options
    assert isinstance(extract_main, click.Command)
