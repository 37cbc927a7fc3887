"""Every file format gives the same table, however long its rows and whatever its texts."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmembed.common import scratch
from llmembed.common.errors import ConfigError, DataError, LLMEmbedWarning
from llmembed.extract.texts import Dialect
from llmembed.extract.texts.columns import as_labels, as_texts
from llmembed.extract.texts.files import READERS, read_table, split_suffix

Columns = dict[str, list[Any]]


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def delimited(columns: Columns, delimiter: str = ",") -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerows([columns, *zip(*columns.values(), strict=True)])
    return buffer.getvalue().encode()


def json_lines(columns: Columns) -> bytes:
    return "\n".join(json.dumps(row) for row in rows_of(columns)).encode()


def arrow(columns: Columns, *, as_file: bool) -> bytes:
    table, sink = pa.table(columns), io.BytesIO()
    make = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def parquet(columns: Columns) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), sink, row_group_size=2)
    return sink.getvalue()


def feather(columns: Columns) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pa.table(columns), sink)
    return sink.getvalue()


WRITERS: dict[str, Callable[[Columns], bytes]] = {
    ".csv": delimited,
    ".tsv": lambda columns: delimited(columns, "\t"),
    ".json": lambda columns: json.dumps(rows_of(columns), indent=1).encode(),
    ".jsonl": json_lines,
    ".ndjson": lambda columns: b"\xef\xbb\xbf" + json_lines(columns).replace(b"\n", b"\r\n\r\n"),
    ".parquet": parquet,
    ".arrow": lambda columns: arrow(columns, as_file=False),
    ".ipc": lambda columns: arrow(columns, as_file=True),
    ".feather": feather,
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
PACKED = [base + packed for base in (".csv", ".tsv", ".json", ".jsonl") for packed in PACKERS]
SUFFIXES = [*WRITERS, *PACKED]


def content_of(suffix: str, columns: Columns) -> bytes:
    base, _, packed = suffix.removeprefix(".").partition(".")
    content = WRITERS[f".{base}"](columns)
    return PACKERS[f".{packed}"](content) if packed else content


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **dialect: str) -> Columns:
    table = read_table(path, Dialect(**dialect))
    return {name: table[name].to_pylist() for name in table.column_names}


def refusal(path: Path, **dialect: str) -> str:
    with pytest.raises(DataError) as caught:
        read_table(path, Dialect(**dialect))
    message = str(caught.value)
    assert "\n" not in message
    return message


STRANGE: Columns = {
    "text": [
        'a "quoted",\ntext',
        "null",
        "",
        "Ünï 🦙\u2028\x85\x0b\x1c",
        "2024-01-01",
        "a\r\nb\rc",
    ],
    "label": ["01", "1e3", "NaN", "true", "2024-01-01T00:00:00Z", "-0"],
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("spool_from", [0, scratch.SPOOL_FROM_BYTES])
def test_every_format_gives_the_same_table(
    tmp_path: Path, suffix: str, spool_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strings stay as written, also where they look like dates, numbers or nothing."""
    monkeypatch.setattr(scratch, "SPOOL_FROM_BYTES", spool_from)
    assert read(write(tmp_path, f"t{suffix}", content_of(suffix, STRANGE))) == STRANGE


@given(
    suffix=st.sampled_from(SUFFIXES),
    rows=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_any_texts_come_back_as_they_were_written(suffix: str, rows: list[tuple[str, str]]) -> None:
    """Writing and reading is identity for every table of Unicode strings, in every format."""
    columns = {"text": [row[0] for row in rows], "label": [row[1] for row in rows]}
    with tempfile.TemporaryDirectory() as folder:
        found = read(write(Path(folder), f"t{suffix}", content_of(suffix, columns)))
    assert found == columns


@pytest.mark.parametrize("suffix", [*WRITERS, ".csv.gz", ".jsonl.zst"])
def test_a_row_may_be_of_any_length(tmp_path: Path, suffix: str) -> None:
    """A text of 3 million characters between short ones is read in every format."""
    columns = {"text": ["a", "Ünï,\n" * 600_000, "b"], "label": ["x", "y", "x"]}
    assert read(write(tmp_path, f"t{suffix}", content_of(suffix, columns))) == columns


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_hundred_thousand_columns_are_read(tmp_path: Path, suffix: str) -> None:
    """The work grows with the number of columns, not with its square."""
    columns = {"text": ["a"], "label": ["x"], **{f"c{index}": ["1"] for index in range(100_000)}}
    table = read_table(write(tmp_path, f"t{suffix}", content_of(suffix, columns)))
    assert (table.num_columns, table["text"].to_pylist()) == (100_002, ["a"])


def test_a_large_table_of_categories_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups that know other categories share no dictionary, and are read all the same."""
    monkeypatch.setattr(scratch, "SPOOL_FROM_BYTES", 0)
    groups = [pa.table({"text": pa.array(texts).dictionary_encode()}) for texts in ("ab", "cb")]
    with pyarrow.parquet.ParquetWriter(tmp_path / "t.parquet", groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)
    column = read_table(tmp_path / "t.parquet")["text"]
    assert as_texts("t", "text", column).to_pylist() == ["a", "b", "c", "b"]


def test_a_full_disk_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room for the mapped file the sentence names TMPDIR."""

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def tell(self) -> int:
            return 3_000_000

        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch, "SPOOL_FROM_BYTES", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    message = refusal(write(tmp_path, "t.csv", "text,label\na,x\n"))
    assert re.match(
        r"/.* cannot take the table \(more than 3 MB\): No space .*\. Set TMPDIR", message
    )


def test_categories_views_and_bytes_of_pandas_and_others_are_texts_and_labels(
    tmp_path: Path,
) -> None:
    """Categories of pandas, polars' views and large strings, and decimals pass through a file."""
    texts = {
        "category": pd.Series(["a", "b"], dtype="category"),
        "view": pa.array(["a", "b"], pa.string_view()),
        "large": pa.array(["a", "b"], pa.large_string()),
        "bytes": pa.array([b"a", b"b"], pa.large_binary()),
    }
    table = pa.table({name: pa.array(values) for name, values in texts.items()})
    table = table.append_column("price", pa.array([1, 0]).cast(pa.decimal128(38, 2)))
    for name in ("t.parquet", "t.feather", "t.arrow"):
        write(
            tmp_path,
            name,
            content_of(Path(name).suffix, dict(zip(table.column_names, table, strict=True))),
        )
        found = read_table(tmp_path / name)
        for column in texts:
            assert as_texts(name, column, found[column]).to_pylist() == ["a", "b"]
        assert as_labels(name, "price", found["price"]).to_pylist() == ["1", "0"]
        assert as_labels(name, "category", found["category"]).to_pylist() == ["a", "b"]


# --- what is no file of texts ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", READERS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    """A FIFO, a device, a folder, a link to one: none is opened, so none can hang a command."""
    os.mkfifo(tmp_path / f"fifo{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / f"link{suffix}").symlink_to("/dev/zero")
    for name, kind in (("fifo", "a FIFO"), ("folder", "a folder"), ("link", "a device")):
        path = tmp_path / f"{name}{suffix}"
        assert refusal(path).startswith(f"{path} is {kind}, not a regular file, so it is not read.")


def test_a_path_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    """A path of 5,000 characters, one with NUL, and one that is not there."""
    message = refusal(tmp_path / ("a" * 5000 + ".csv"))
    assert message.endswith(
        "characters) cannot be read: File name too long. Check the path and who may read it."
    )
    assert len(message) < 400
    assert re.search(r"cannot be a path: .*embedded null", refusal(tmp_path / "a\0.csv"))
    assert "none.csv cannot be read: No such file or directory." in refusal(tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["t.xlsx", "t", "t.parquet.gz", "t.gz", ".csv"])
def test_an_unknown_suffix_says_which_are_known(tmp_path: Path, name: str) -> None:
    """Only text files are unpacked; what is packed inside itself already is not."""
    message = refusal(write(tmp_path, name, "text\n"))
    assert f"t{name}: the file format" in message.replace(str(tmp_path) + "/", "t")
    assert "Known: .csv, .tsv, .tab, .json, .jsonl, .ndjson, .parquet, .arrow" in message
    assert message.endswith("may be packed (.gz, .bz2, .zst).")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.b.csv", ("a.b", ".csv")),
        ("train.CSV.GZ", ("train", ".csv.gz")),
        ("x.feather", ("x", ".feather")),
        ("x.gz", ("x.gz", "")),
        ("README.md", ("README.md", "")),
    ],
)
def test_a_name_is_split_into_stem_and_suffix(name: str, parts: tuple[str, str]) -> None:
    """The stem names a split or a cache, whatever the file is packed with."""
    assert split_suffix(name) == parts


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_was_cut_is_refused(tmp_path: Path, suffix: str) -> None:
    """Half of a file is an error in every format that can know; rows are never lost in silence."""
    columns = {"label": [str(row) for row in range(50)], "text": ['a "b"\n'] * 50}
    content = content_of(suffix, columns)
    cut = content[:-6] if suffix in (".csv", ".tsv") else content[: -len(content) // 8]
    path = write(tmp_path, f"t{suffix}", cut)
    assert refusal(path).startswith(str(path))


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".tab"])
def test_an_empty_file_is_refused(tmp_path: Path, suffix: str) -> None:
    """A file without a byte, packed or not, has no rows."""
    base, _, packed = suffix.removeprefix(".").partition(".")
    content = PACKERS[f".{packed}"](b"") if packed else b""
    message = refusal(write(tmp_path, f"t{suffix}", content))
    assert "has no rows. Pass a file with at least one example." in message or (
        f"cannot be read as {base}: " in message
    )


@pytest.mark.parametrize("suffix", PACKED)
def test_a_packed_file_that_grows_without_end_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What unpacks to far more than texts do is stopped, not written to the disk."""
    monkeypatch.setattr(scratch, "SPOOL_FROM_BYTES", 2**20)
    columns = {"text": ["a" * 2**23] * 2, "label": ["x", "y"]}
    path = write(tmp_path, f"t{suffix}", content_of(suffix, columns))
    assert refusal(path) == (
        f"{path} unpacks to more than 250 times its size, which texts do not. If it is meant so, "
        "unpack it first."
    )


@pytest.mark.parametrize(
    "suffix", [".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson", ".csv.gz"]
)
def test_bytes_that_are_not_utf8_are_told_with_their_line(tmp_path: Path, suffix: str) -> None:
    """The line is that of the file, also where it is packed and the byte lies far behind."""
    content = b'{"text": "a"}\n' * 100_000 + b'{"text": "\xe9"}\n'
    path = write(
        tmp_path, f"t{suffix}", gzip.compress(content) if suffix.endswith("gz") else content
    )
    assert refusal(path) == (
        f"{path}, line 100001: byte 0xe9 is not UTF-8. Save the file as UTF-8."
    )


@given(suffix=st.sampled_from(SUFFIXES), data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_table_or_one_sentence(suffix: str, data: st.DataObject) -> None:
    """Damage anywhere in a file never ends in a traceback, nor in a column that cannot be read."""
    content = bytearray(content_of(suffix, STRANGE))
    places = st.integers(0, len(content) - 1)
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1)):
        content[place] = byte
    del content[data.draw(places) :: data.draw(st.integers(20, 10_000))]
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.suppress(DataError),
        warnings.catch_warnings(action="ignore", category=LLMEmbedWarning),
    ):
        table = read_table(write(Path(folder), f"t{suffix}", bytes(content)))
        for name in table.column_names:
            as_labels("t", name, table[name]).to_pylist()


def test_damaged_files_name_their_kind(tmp_path: Path) -> None:
    """What only looks like a parquet, arrow or gz file is one sentence."""
    for name, kind in (("t.parquet", "parquet"), ("t.arrow", "arrow"), ("t.csv.gz", "csv.gz")):
        path = write(tmp_path, name, "text,label\na,x\n" * 10)
        assert refusal(path).startswith(f"{path} cannot be read as {kind}: ")
        assert refusal(path).endswith(". Repair the file.")


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Which of two columns is meant cannot be known."""
    twice = pa.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "t.parquet")
    assert "has the column 'text' more than once. Rename one." in refusal(tmp_path / "t.parquet")


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_a_delimiter_for_what_has_none_is_refused(tmp_path: Path, name: str) -> None:
    """An option that would be ignored is an error."""
    path = write(tmp_path, name, '{"text": "a"}')
    with pytest.raises(ConfigError, match=rf"^--delimiter is for csv, tsv and tab files; .*{name}"):
        read_table(path, Dialect(delimiter=";"))


def test_blanks_around_a_header_are_said(tmp_path: Path) -> None:
    """Names lose their blanks, with one warning; fields keep theirs."""
    path = write(tmp_path, "t.csv", "text, label\na, x\n")
    with pytest.warns(LLMEmbedWarning, match="the column ' label' is named without the blanks"):
        assert read(path) == {"text": ["a"], "label": [" x"]}
