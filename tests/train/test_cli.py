from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from clustered import MakeCache

from llmembed.common.errors import ConfigError, RunStorageError
from llmembed.train import FitConfig, SweepConfig, run_sweep
from llmembed.train.cli.fit import fit_main
from llmembed.train.cli.sweep import sweep_main
from llmembed.train.verbs.sweeping import table_of


def test_fit_prints_a_table_or_one_json_document(make_cache: MakeCache, tmp_path: Path) -> None:
    """The table and the place of the run are on stdout; --json prints one document."""
    options = ["--cache", str(make_cache()), "--output", str(tmp_path / "r"), "--epochs", "2"]
    table = CliRunner().invoke(fit_main, options, catch_exceptions=False)
    assert table.exit_code == 0
    assert "evaluated on     test, 60 examples" in table.stdout
    assert "seed 0: 2 of 2 epochs in 0:00:" in table.stderr
    assert "\r" not in table.stderr
    assert table.stdout.endswith(f"run: {tmp_path / 'r'}\npage: {tmp_path / 'r' / 'report.html'}\n")
    document = json.loads(CliRunner().invoke(fit_main, [*options, "--json"]).stdout)
    assert (document["n_eval"], document["path"]) == (60, str(tmp_path / "r"))


def test_a_known_error_is_one_line(tmp_path: Path) -> None:
    """An unknown fusion ends with exit code 1 and one line on stderr."""
    result = CliRunner().invoke(fit_main, ["--cache", str(tmp_path), "--fusion", "cooq"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: fusion 'cooq' does not exist; did you mean 'cooc'?")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["fit", "predict", "serve", "sweep"])
def test_help_imports_no_torch(command: str) -> None:
    """`--help` imports neither torch nor lightning."""
    code = (
        f"import sys; from llmembed.train.cli.{command} import {command}_main as main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-Pc", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("command", "config"), [(fit_main, FitConfig), (sweep_main, SweepConfig)])
def test_every_field_of_the_config_is_an_option_with_its_default(
    command: click.Command, config: type[FitConfig | SweepConfig]
) -> None:
    """Options and dataclass fields cannot drift apart."""
    options: dict[Any, Any] = {parameter.name: parameter for parameter in command.params}
    for field in dataclasses.fields(config):
        option = options.pop(field.name)
        assert option.help
        if field.default is dataclasses.MISSING:
            assert option.required
        elif not option.multiple:
            assert option.default == field.default
    assert set(options) == {"as_json", "quiet", "debug", "version"}


def test_a_sweep_prints_a_table_and_writes_it_with_a_plot(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """The table marks the best; sweep.json holds what --json prints, sweep.svg is an SVG."""
    options = ["--cache", str(make_cache()), "--output", str(tmp_path / "s")]
    table = CliRunner().invoke(sweep_main, options, catch_exceptions=False).stdout
    assert "single  tiny/mean 1" in table
    assert table.count("<- best") == 1
    document = json.loads(CliRunner().invoke(sweep_main, [*options, "--json"]).stdout)
    assert document == json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [len(row["features"]) for row in document["candidates"]] == [1, 1, 2, 2]
    plot = (tmp_path / "s" / "sweep.svg").read_text()
    assert (plot.count("<svg"), plot.count("var("), plot[-7:]) == (1, 0, "</svg>\n")


def test_a_sweep_prints_the_command_that_fits_its_best(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """Run as it stands it fits that one feature; where the best is of several, auto weighs all."""
    cache = make_cache(name="my tiny.zarr")
    options = ["--cache", str(cache), "--output", str(tmp_path / "s")]
    for chosen, source in ([], []), (["--source", "tiny"], ["--source", "tiny"]):
        arguments = [*options, "--layers", "2", *chosen]
        printed = CliRunner().invoke(sweep_main, arguments, catch_exceptions=False).stdout
        (line,) = [one for one in printed.splitlines() if one.startswith("to fit the best: ")]
        command = shlex.split(line.removeprefix("to fit the best: "))
        expected = ["--fusion", "single", "--layers", "2", "--pooling", "mean"]
        assert command == ["llmembed-fit", "--cache", str(cache), *expected, *source]
    fitted = [*command[1:], "--output", str(tmp_path / "r"), "--baseline", "none"]
    assert CliRunner().invoke(fit_main, fitted, catch_exceptions=False).exit_code == 0
    record = json.loads((tmp_path / "r" / "config.json").read_text())
    assert [(one["layer"], one["pooling"]) for one in record["features"]] == [(2, "mean")]
    result = run_sweep(SweepConfig(cache=str(cache), output=str(tmp_path / "s")))
    (several, *_) = [row for row in result["candidates"] if row["fusion"] == "concat"]
    last = table_of(result | {"best": several}).splitlines()[-1]
    assert last == f"to weigh them all: llmembed-fit --cache '{cache}' --fusion auto"


def test_a_sweep_refuses_a_file_in_place_of_its_folder(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """Before the cache is read."""
    place = tmp_path / "table.csv"
    place.touch()
    with pytest.raises(ConfigError, match=r"table\.csv is a file, and a sweep writes"):
        run_sweep(SweepConfig(cache=str(make_cache()), output=str(place)))


def test_a_sweep_that_cannot_be_written_is_told(make_cache: MakeCache, tmp_path: Path) -> None:
    """Where no folder can be, before the cache is read; and where a table cannot be."""
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "sweep", tmp_path / ("x" * 300)):
        with pytest.raises(RunStorageError, match="nothing can be written to"):
            run_sweep(SweepConfig(cache="none.zarr", output=str(output)))
    (tmp_path / "s" / "sweep.json").mkdir(parents=True)
    with pytest.raises(RunStorageError, match=r"sweep\.json could not be written: Is a directory"):
        run_sweep(SweepConfig(cache=str(make_cache()), output=str(tmp_path / "s")))


def test_a_sweep_reads_no_evaluation_split(make_cache: MakeCache, tmp_path: Path) -> None:
    """A sweep gives the same figures where the features of the test split are gone."""
    cache = make_cache()
    config = SweepConfig(cache=str(cache), output=str(tmp_path / "s"))
    before = run_sweep(config)["candidates"]
    for chunk in (cache / "test" / "tiny").rglob("c.*"):
        chunk.unlink()
    assert run_sweep(config)["candidates"] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"head": "mlp"},
            "head 'mlp' does not exist. Known: auto, lda, ridge. Pass one to --head.",
        ),
        ({"folds": 1}, "--folds 1 leaves nothing to fit on. Pass 2 or more."),
        ({"class_weight": "equal"}, "class_weight 'equal' does not exist"),
    ],
)
def test_options_of_a_sweep_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    """What a sweep can't do is refused before anything is read."""
    with pytest.raises(ConfigError, match=message):
        SweepConfig(cache="a.zarr", **options)
