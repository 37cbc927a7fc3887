from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from clustered import MakeCache

from llmembed.train import FitConfig
from llmembed.train.cli import fit_main


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


def test_every_field_of_the_config_is_an_option_with_its_default() -> None:
    """Options and dataclass fields cannot drift apart."""
    options = {parameter.name: parameter for parameter in fit_main.params}
    for field in dataclasses.fields(FitConfig):
        option = options.pop(field.name)
        assert option.help
        if field.default is dataclasses.MISSING:
            assert option.required
        elif not option.multiple:
            assert option.default == field.default
    assert set(options) == {"as_json", "quiet", "debug"}
