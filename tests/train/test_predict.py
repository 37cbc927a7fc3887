from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from toy_model import toy_texts

from llmembed.cache_format import open_cache
from llmembed.cache_format.errors import (
    ConfigError,
    DataError,
    DatasetNotFoundError,
    ModelError,
    ModelNotFoundError,
)
from llmembed.train import Run, load_run
from llmembed.train.cli import predict_main
from llmembed.train.data import read_features
from llmembed.train.predict import read_input


def invoke(run: Run, *options: str) -> Any:
    return CliRunner().invoke(predict_main, ["--run", str(run.path), *options])


def with_recipe(run: Run, source: str, **changes: object) -> Run:
    """Change what the run has recorded of a backbone."""
    sources = json.loads(json.dumps(run.config["sources"]))
    sources[source]["recipe"] |= changes
    return dataclasses.replace(run, config={**run.config, "sources": sources})


def test_a_text_is_predicted_as_the_cache_has_it(texts_run: Run) -> None:
    """Predicting the training texts equals classifying the features that the cache holds."""
    run = load_run(texts_run.path)
    split = open_cache(run.config["fit"]["cache"])["train"]
    with torch.inference_mode():
        logits = run.classifier(read_features(split, run.features))
    expected = logits.double().softmax(dim=1).numpy()
    np.testing.assert_allclose(run.predict_proba(toy_texts(120)), expected, atol=2e-3)
    best = [run.labels[index] for index in expected.argmax(axis=1)]
    assert run.predict(toy_texts(120)) == best


def test_what_is_printed(texts_run: Run) -> None:
    """Each text gets a line with label, probability and text; --proba lists every class."""
    options = ["--text", "w1 w2", "--text", ""]
    lines = invoke(texts_run, *options).stdout.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["w1 w2", ""]
    rows = json.loads(invoke(texts_run, *options, "--proba", "--json").stdout)
    assert [list(row["probabilities"]) for row in rows] == [["long", "short"]] * 2
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    best = max(texts_run.labels, key=rows[0]["probabilities"].__getitem__)
    assert (rows[0]["label"], rows[0]["probability"]) == (best, rows[0]["probabilities"][best])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_files_in_and_out(texts_run: Run, tmp_path: Path, suffix: str) -> None:
    """A csv or jsonl that is written can be read again, text by text, in order."""
    texts = ['with "quotes", commas', "and\nlines", "plain"]
    source, target = tmp_path / "in.jsonl", tmp_path / f"out{suffix}"
    source.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    result = invoke(texts_run, "--input", str(source), "--output", str(target), "--proba")
    assert result.stdout == f"3 predictions: {target}\n"
    assert read_input(target).texts == texts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", target.name]


def test_a_csv_has_a_column_for_each_probability(texts_run: Run, tmp_path: Path) -> None:
    """With --proba the columns are text, label, probability and p_<class>, which sum to 1."""
    target = tmp_path / "out.csv"
    invoke(texts_run, "--text", "w1 w2", "--output", str(target), "--proba")
    with target.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["text", "label", "probability", "p_long", "p_short"]
    assert float(row["p_long"]) + float(row["p_short"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".csv", "text\n", "has no rows"),
        (".txt", "", "holds no text"),
        (".jsonl", "", "Empty JSON file"),
    ],
)
def test_a_file_without_texts_is_refused(
    texts_run: Run, tmp_path: Path, suffix: str, content: str, message: str
) -> None:
    """An input without a single text is named, and no output is written."""
    source, target = tmp_path / f"in{suffix}", tmp_path / "out.csv"
    source.write_text(content)
    result = invoke(texts_run, "--input", str(source), "--output", str(target))
    assert result.exit_code == 1
    assert str(source) in result.stderr
    assert message in result.stderr
    assert not target.exists()


def test_one_source_of_texts(texts_run: Run) -> None:
    """Neither or both of --text and --input is bad usage, exit code 2."""
    result = invoke(texts_run)
    assert result.exit_code == 2
    assert "Pass either --text or --input." in result.stderr


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.xlsx", "has none of the suffixes .csv, .jsonl, .parquet. Give it one."),
        ("no/such/out.csv", "the folder no/such does not exist. Make it."),
    ],
)
def test_outputs_that_cannot_be_written(texts_run: Run, output: str, message: str) -> None:
    """An output of another kind or in a missing folder is refused before anything is computed."""
    result = invoke(texts_run, "--text", "a", "--output", output)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_backbone_that_is_not_on_this_machine(texts_run: Run, tmp_path: Path) -> None:
    """A run whose backbone was moved or never fetched says which source wants which model."""
    gone = with_recipe(texts_run, "toy-llama", model=str(tmp_path / "moved"))
    with pytest.raises(
        ModelNotFoundError,
        match=r"source 'toy-llama'.*moved' does not exist.*--model toy-llama=PLACE",
    ):
        gone.predict(["w1"])
    on_hub = with_recipe(texts_run, "toy-llama", model="nobody/nothing")
    with pytest.raises(ModelNotFoundError, match=r"needs the backbone.*is not on this machine"):
        on_hub.predict(["w1"])


def test_another_backbone_is_refused(texts_run: Run) -> None:
    """A backbone at the recorded place that is not the one of the cache is refused."""
    model = texts_run.config["sources"]["toy-bert"]["recipe"]["model"]
    with pytest.raises(ModelError, match="the backbone toy-bert has backbone 'toy-bert', but the"):
        with_recipe(texts_run, "toy-llama", model=model).predict(["w1"])


def test_the_code_of_a_foreign_model_needs_the_flag(texts_run: Run, tmp_path: Path) -> None:
    """A run can't order that the code of a model runs: that takes the flag of the command."""
    run = with_recipe(texts_run, "toy-llama", trust_remote_code=True)
    with pytest.raises(ConfigError, match=r"wants to run the code.*Pass --trust-remote-code if"):
        run.predict(["w1"])
    assert run.predict(["w1"], trust_remote_code=True) == texts_run.predict(["w1"])
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(run.config))
    arguments = ["--run", str(tmp_path / "run"), "--text", "w1"]
    assert CliRunner().invoke(predict_main, arguments).exit_code == 1
    assert CliRunner().invoke(predict_main, [*arguments, "--trust-remote-code"]).exit_code == 0


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    """A txt file gives a text a line, empty ones too; bad UTF-8 is named by its line."""
    path = tmp_path / "texts.txt"
    path.write_bytes(b"one\r\n\nthree\n")
    assert read_input(path).texts == ["one", "", "three"]
    path.write_bytes(b"one\n\xff\n")
    with pytest.raises(DataError, match="line 2: byte 0xff is not UTF-8"):
        read_input(path)


def test_columns_and_files_that_do_not_exist(tmp_path: Path) -> None:
    """A missing file, an unknown column and a value that is no text are named."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"body": "a", "n": 1}\n')
    assert read_input(path, "body").texts == ["a"]
    with pytest.raises(ConfigError, match="column 'bodi' does not exist; did you mean 'body'"):
        read_input(path, "bodi")
    with pytest.raises(DataError, match=r"column 'n' of .*holds int64, not text"):
        read_input(path, "n")
    with pytest.raises(DatasetNotFoundError, match=r"none\.csv: No such file or directory"):
        read_input(tmp_path / "none.csv")


def test_a_single_string_is_not_a_list_of_texts(texts_run: Run) -> None:
    """A string in place of a list is refused, and no text at all gives no row."""
    with pytest.raises(DataError, match=r"Pass \[text\] for a single one"):
        texts_run.predict_proba("text")
    assert texts_run.predict_proba([]).shape == (0, 2)
