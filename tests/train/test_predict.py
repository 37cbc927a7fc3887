from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clustered import MakeCache
from toy_model import toy_texts

from llmembed.cache_format import open_cache
from llmembed.cache_format.cli import main as cache_main
from llmembed.common.errors import (
    ConfigError,
    DataError,
    DatasetNotFoundError,
    LLMEmbedWarning,
    ModelError,
    ModelNotFoundError,
)
from llmembed.extract.cli import main as extract_main
from llmembed.train import Run, load_run
from llmembed.train.cli.fit import fit_main
from llmembed.train.cli.predict import predict_main
from llmembed.train.cli.sweep import sweep_main
from llmembed.train.inputs.data import read_features
from llmembed.train.runs.predict import read_input


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


def test_a_prediction_imports_no_more_than_it_needs(texts_run: Run) -> None:
    """Beyond torch and transformers, --text wants neither tables nor trainers nor plots."""
    code = (
        "import sys; from llmembed.train.cli.predict import predict_main as main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-Pc", code, "--run", str(texts_run.path), "--text", "w1"]
    result = subprocess.run(command, capture_output=True, check=True, text=True)
    assert result.stdout.endswith("\tw1\n")
    found = {name.partition(".")[0] for name in result.stderr.split()}
    unwanted = {"pandas", "datasets", "lightning", "pyarrow", "sklearn", "matplotlib", "zarr"}
    assert found & (unwanted | {"torch"}) == {"torch"}


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


def test_a_run_in_a_notebook_is_one_line(texts_run: Run) -> None:
    """Its record and weights are not printed."""
    assert repr(texts_run) == f"Run(path={texts_run.path!r})"


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


@pytest.mark.skipif(sys.platform != "linux", reason="the file that cannot be read is Linux's")
def test_an_input_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """What the system refuses while lines are read is told in one sentence."""
    (tmp_path / "in.txt").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"in\.txt cannot be read: Input/output error\. Check"):
        read_input(tmp_path / "in.txt")


def test_the_input_is_never_replaced(texts_run: Run, tmp_path: Path) -> None:
    """The output under the input's own name, by whatever path, is refused, and the file stays."""
    path = tmp_path / "in.csv"
    path.write_text("message\nw1\n")
    (tmp_path / "link.csv").symlink_to(path)
    result = invoke(texts_run, "--input", str(path), "--output", str(tmp_path / "link.csv"))
    assert (result.exit_code, "is the file of --input" in result.stderr) == (1, True)
    assert path.read_text() == "message\nw1\n"


def test_the_training_file_is_read_as_extraction_read_it(texts_run: Run, tmp_path: Path) -> None:
    """The column that the cache recorded is taken, else the usual ones are looked for, and said."""
    path, target = tmp_path / "in.csv", tmp_path / "out.jsonl"
    path.write_text("id,text,body,label\n7,w1,w2,x\n3,w3,w4,y\n")
    result = invoke(texts_run, "--input", str(path), "--output", str(target))
    assert "Text from column 'text'." in result.stderr
    assert "the input has a column 'label'" in result.stderr
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == [("7", "w1"), ("3", "w3")]
    assert [(row["body"], row["input_label"]) for row in rows] == [("w2", "x"), ("w4", "y")]
    assert read_input(path, known="body").texts == ["w2", "w4"]
    assert read_input(path, known="text,body").texts == ["w1\x1fw2", "w3\x1fw4"]
    path.write_text("Review,label\nw1,x\n")
    assert read_input(path, known="text").texts == ["w1"]
    path.write_text("a,b\nw1,x\n")
    with pytest.raises(DataError, match="no column looks like the text among a, b"):
        read_input(path, known="text")


def test_a_delimited_file_is_read_as_extraction_reads_it(texts_run: Run, tmp_path: Path) -> None:
    """Delimiter, escape and quote are said as there, and only of a delimited file."""
    path = tmp_path / "in.csv"
    path.write_text("id;text\n7;'w1 \\'w2'\n")
    given = ["--delimiter", ";", "--csv-escape", "\\", "--csv-quote", "'"]
    result = invoke(texts_run, "--input", str(path), *given)
    assert result.stdout.split("\t")[2] == "w1 'w2\n"
    path.rename(tmp_path / "in.txt")
    result = invoke(texts_run, "--input", str(tmp_path / "in.txt"), *given[:2])
    assert "error: --delimiter is for csv, tsv and tab files" in result.stderr
    result = invoke(texts_run, "--text", "w1", *given[:2])
    assert (result.exit_code, "are for a file of --input" in result.stderr) == (2, True)


def test_lines_of_stdin(texts_run: Run) -> None:
    """`--input -` reads a text a line, as a txt file."""
    arguments = ["--run", str(texts_run.path), "--input", "-"]
    result = CliRunner().invoke(predict_main, arguments, input="w1 w2\r\n\nw3\n")
    assert [line.split("\t")[2] for line in result.stdout.splitlines()] == ["w1 w2", "", "w3"]
    result = CliRunner().invoke(predict_main, arguments, input=b"w1\n\xff\n")
    assert "error: stdin, line 2: byte 0xff is not UTF-8" in result.stderr


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_an_input_that_is_no_regular_file(tmp_path: Path, kind: str, suffix: str) -> None:
    """A FIFO, a folder or a device is named at once, and never waited for."""
    path = tmp_path / f"in{suffix}"
    {"FIFO": os.mkfifo, "folder": Path.mkdir}.get(kind, lambda at: at.symlink_to("/dev/zero"))(path)
    with pytest.raises(DataError, match=f"{suffix} is a {kind}, not a regular file"):
        read_input(path)


def test_names_cannot_command_a_terminal(make_cache: MakeCache, tmp_path: Path) -> None:
    """A class name with ESC is escaped by each command, and stays as it is in the run's files."""
    name = "e\x1b[31marn"
    cache = make_cache(labels=(name, "grain", "trade"))
    common = ["--cache", str(cache), "--output"]
    options = ["--fusion", "mean", "--head", "ridge"]
    fitted = CliRunner().invoke(fit_main, [*common, str(tmp_path / "r"), *options])
    swept = CliRunner().invoke(sweep_main, [*common, str(tmp_path / "s\x1b")])
    as_json = CliRunner().invoke(fit_main, [*common, str(tmp_path / "r"), *options, "--json"])
    assert "e\\x1b[31marn" in fitted.stdout
    assert name in json.loads(as_json.stdout)["per_class"]
    for result in (fitted, swept, as_json):
        assert result.exit_code == 0
        assert "\x1b" not in result.output
    assert load_run(tmp_path / "r").labels[0] == name


def test_an_extraction_cannot_command_a_terminal(texts_run: Run, tmp_path: Path) -> None:
    """Labels, columns and paths with ESC are escaped by llmembed-extract and llmembed-cache."""
    dataset, cache = tmp_path / "toy\x1b[2J.csv", tmp_path / "c\x1b[2J.zarr"
    dataset.write_text("te\x1bxt,label\nw1,a\x1b\nw2,b\n")
    model = texts_run.config["sources"]["toy-llama"]["recipe"]["model"]
    options = ["--model", model, "--layers", "1", "--dataset", str(dataset), "--cache", str(cache)]
    columns = ["--text-column", "te\x1bxt", "--quiet"]
    for command, arguments in (
        (extract_main, [*options, *columns]),
        (extract_main, [*options, *columns[:2]]),
        (extract_main, [*options, *columns[:2], "--dry-run"]),
        (cache_main, ["info", str(cache)]),
        (cache_main, ["verify", str(cache)]),
        (cache_main, ["copy", str(cache), str(tmp_path / "d\x1b[2J.zarr")]),
    ):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.output


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
        (".jsonl", "", "has no rows"),
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


def test_the_likeliest_classes_on_request(texts_run: Run, tmp_path: Path) -> None:
    """--top-k counts from 1 to the number of classes, and stands in place of --proba."""
    (row,) = json.loads(invoke(texts_run, "--text", "w1", "--top-k", "2", "--json").stdout)
    assert row["top"][0] == {"label": row["label"], "probability": row["probability"]}
    assert sum(one["probability"] for one in row["top"]) == pytest.approx(1, abs=1e-5)
    for k in ("0", "3"):
        refused = invoke(texts_run, "--text", "w1", "--top-k", k)
        assert f"error: --top-k is {k}, and the run" in refused.stderr
        assert "has 2 classes. Pass 1 to 2." in refused.stderr
    both = invoke(texts_run, "--text", "w1", "--top-k", "1", "--proba")
    assert (both.exit_code, "Pass either --proba or --top-k." in both.stderr) == (2, True)


def test_formulas_are_defused_in_a_csv_alone(texts_run: Run, tmp_path: Path) -> None:
    """Elsewhere --defuse-formulas would do nothing, and is bad usage."""
    target = tmp_path / "out.csv"
    options = ["--text", "=1+1", "--defuse-formulas"]
    assert invoke(texts_run, *options, "--output", str(target)).exit_code == 0
    assert target.read_text().splitlines()[1].startswith("'=1+1,")
    for others in ([], ["--output", str(tmp_path / "out.jsonl")]):
        refused = invoke(texts_run, *options, *others)
        assert (refused.exit_code, "is for a csv of --output" in refused.stderr) == (2, True)


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


def test_empty_texts_are_warned_of(texts_run: Run, tmp_path: Path) -> None:
    """Blank lines, empty cells and --text "" are counted once a call, in Python too."""
    (tmp_path / "in.csv").write_text("id,text\n1,w1\n2,\n3, \n")
    one = invoke(texts_run, "--text", "w1", "--text", "").stderr
    assert one.count("Leave such texts out.") == 1
    assert "warning: 1 of 2 texts is empty, so there was nothing to read and its label mean" in one
    output = ("--output", str(tmp_path / "out.csv"))
    two = invoke(texts_run, "--input", str(tmp_path / "in.csv"), *output).stderr
    assert "warning: 2 of 3 texts are empty, so there was nothing to read and their labels " in two
    assert "Leave such" not in invoke(texts_run, "--text", "w1").stderr
    with pytest.warns(LLMEmbedWarning) as caught:
        assert len(texts_run.predict(["", "w1", " \n"])) == 3
    assert [m for one in caught if (m := str(one.message)).startswith("2 of 3 texts are empty, so")]


def test_predictions_by_another_version_are_told(texts_run: Run) -> None:
    """One sentence names the version that the run's features were made with; they are given."""
    older = with_recipe(texts_run, "toy-llama", transformers="5.17.0")
    with pytest.warns(LLMEmbedWarning, match=r"made with transformers 5\.17\.0 \(here ") as caught:
        found = older.predict(["w1"])
    assert len(caught) == 1
    assert found == texts_run.predict(["w1"])
