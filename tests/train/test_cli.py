from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from clustered import LABELS, MakeCache, write_cache

from llmembed.cache_format.errors import DataError, DatasetNotFoundError
from llmembed.train import FitConfig, Run, fit
from llmembed.train.cli import fit_main, predict_main
from llmembed.train.predict import predict_proba, read_texts
from llmembed.train.select import Feature


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    cache = write_cache(folder / "tiny.zarr")
    return fit(FitConfig(cache=str(cache), epochs=3, lr=0.01, output=str(folder / "run"))).path


@pytest.fixture
def known_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """New texts get features by arithmetic: a text of k letters lies at k in every column."""

    def features(run: Run, texts: Sequence[str], device: str) -> np.ndarray:
        assert device == "auto"
        assert run.features[0] == Feature("tiny", "mean", 1, 16)
        return np.array([[len(text)] * 32 for text in texts], dtype=np.float32)

    monkeypatch.setattr("llmembed.train.predict.read_new_features", features)


def test_fit_prints_a_table_or_one_json_document(make_cache: MakeCache, tmp_path: Path) -> None:
    """The table and the place of the run are on stdout; --json prints one document."""
    options = ["--cache", str(make_cache()), "--output", str(tmp_path / "r"), "--epochs", "2"]
    table = CliRunner().invoke(fit_main, options, catch_exceptions=False)
    assert table.exit_code == 0
    assert "evaluated on     test, 60 examples" in table.stdout
    assert f"run: {tmp_path / 'r'}" in table.stdout
    document = json.loads(CliRunner().invoke(fit_main, [*options, "--json"]).stdout)
    assert (document["n_eval"], document["path"]) == (60, str(tmp_path / "r"))


def test_a_known_error_is_one_line(tmp_path: Path) -> None:
    """An unknown fusion ends with exit code 1 and one line on stderr."""
    result = CliRunner().invoke(fit_main, ["--cache", str(tmp_path), "--fusion", "cooq"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: fusion 'cooq' does not exist; did you mean 'cooc'?")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["fit_main", "predict_main"])
def test_help_imports_no_torch(command: str) -> None:
    """`--help` imports neither torch nor lightning."""
    code = (
        f"import sys; from llmembed.train.cli import {command} as main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-Pc", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("known_features")
def test_predictions_of_texts(run_path: Path) -> None:
    """Each text gets a line with label, probability and text; --proba lists every class."""
    options = ["--run", str(run_path), "--text", "wheat", "--text", ""]
    lines = CliRunner().invoke(predict_main, options).stdout.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["wheat", ""]
    result = CliRunner().invoke(predict_main, [*options, "--proba", "--json"])
    rows = json.loads(result.stdout)
    assert [list(row["probabilities"]) for row in rows] == [list(LABELS)] * 2
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert rows[0]["label"] == max(LABELS, key=rows[0]["probabilities"].__getitem__)


@pytest.mark.usefixtures("known_features")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_files_in_and_out(run_path: Path, tmp_path: Path, suffix: str) -> None:
    """A csv or jsonl that is written can be read again, text by text, in order."""
    texts = ['with "quotes", commas', "and\nlines", "plain"]
    source, target = tmp_path / "in.jsonl", tmp_path / f"out{suffix}"
    source.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    options = ["--run", str(run_path), "--input", str(source), "--output", str(target)]
    result = CliRunner().invoke(predict_main, [*options, "--proba"], catch_exceptions=False)
    assert result.stdout == f"3 predictions: {target}\n"
    assert read_texts(target) == texts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", target.name]


def test_one_source_of_texts(run_path: Path) -> None:
    """Neither or both of --text and --input is bad usage, exit code 2."""
    result = CliRunner().invoke(predict_main, ["--run", str(run_path)])
    assert result.exit_code == 2
    assert "Pass either --text or --input." in result.stderr


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.xlsx", "is neither .csv nor .jsonl"),
        ("no/such/out.csv", "the folder no/such does not exist. Make it."),
    ],
)
def test_outputs_that_cannot_be_written(run_path: Path, output: str, message: str) -> None:
    """An output of another kind or in a missing folder is refused before anything is computed."""
    options = ["--run", str(run_path), "--text", "a", "--output", output]
    result = CliRunner().invoke(predict_main, options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    """A txt file gives a text a line, empty ones too; bad UTF-8 is named by its line."""
    path = tmp_path / "texts.txt"
    path.write_bytes(b"one\r\n\nthree\n")
    assert read_texts(path) == ["one", "", "three"]
    path.write_bytes(b"one\n\xff\n")
    with pytest.raises(DataError, match="line 2: byte 0xff is not UTF-8"):
        read_texts(path)


def test_columns_and_files_that_do_not_exist(tmp_path: Path) -> None:
    """A missing file, an unknown column and a value that is no text are named."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"body": "a", "n": 1}\n')
    assert read_texts(path, "body") == ["a"]
    with pytest.raises(DataError, match="the column 'bodi' does not exist; did you mean 'body'"):
        read_texts(path, "bodi")
    with pytest.raises(DataError, match="row 0: column 'n' holds 1, which is no text"):
        read_texts(path, "n")
    with pytest.raises(DatasetNotFoundError, match=r"none\.csv is not a file"):
        read_texts(tmp_path / "none.csv")


def test_a_single_string_is_not_a_list_of_texts(run_path: Path) -> None:
    """A string in place of a list is refused, and no text at all gives no row."""
    from llmembed.train import load_run

    run = load_run(run_path)
    with pytest.raises(DataError, match=r"Pass \[text\] for a single one"):
        predict_proba(run, "text")
    assert predict_proba(run, []).shape == (0, 3)
