"""What the commands have in common: usage, version, exit codes, any console."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from toy_cache import write_toy

from llmembed.cache_format.cli import main as cache_main
from llmembed.common.console import Command, echo_json
from llmembed.extract.cli import main as extract_main
from llmembed.train.cli.fit import fit_main
from llmembed.train.cli.predict import predict_main
from llmembed.train.cli.report import report_main
from llmembed.train.cli.serve import serve_main
from llmembed.train.cli.sweep import sweep_main

COMMANDS = {
    "llmembed-cache": cache_main,
    "llmembed-extract": extract_main,
    "llmembed-fit": fit_main,
    "llmembed-predict": predict_main,
    "llmembed-report": report_main,
    "llmembed-serve": serve_main,
    "llmembed-sweep": sweep_main,
}
EACH = pytest.mark.parametrize(("name", "command"), COMMANDS.items(), ids=COMMANDS)
ALL = {**COMMANDS, **{f"llmembed-cache {name}": one for name, one in cache_main.commands.items()}}


@pytest.mark.parametrize(("name", "command"), ALL.items(), ids=ALL)
def test_a_bare_command_is_bad_usage(name: str, command: click.Command) -> None:
    """Without what it needs a command says so in one sentence, with exit code 2."""
    result = CliRunner().invoke(command, [], prog_name=name)
    assert (result.exit_code, result.stdout) == (2, "")
    usage, *_, missing = result.stderr.splitlines()
    assert usage.startswith(f"Usage: {name} [OPTIONS]")
    assert missing.startswith("Error: Missing ")


@EACH
def test_an_unknown_option_gets_a_close_match(name: str, command: click.Command) -> None:
    """A slip of the finger is bad usage, and the option that was meant is named."""
    result = CliRunner().invoke(command, ["--versoin"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--version" in result.stderr


@EACH
def test_every_command_tells_its_version(name: str, command: click.Command) -> None:
    """`--version` prints the version of the package, and nothing else is needed."""
    result = CliRunner().invoke(command, ["--version"], prog_name=name)
    assert result.exit_code == 0
    assert result.stdout == f"{name}, version {version('llmembed-cache')}\n"


@pytest.mark.parametrize(("name", "command"), ALL.items(), ids=ALL)
def test_the_help_lists_the_exit_codes(name: str, command: click.Command) -> None:
    """`--help` of every command names 0, 1, 2, 4 and 130."""
    text = " ".join(CliRunner().invoke(command, ["--help"]).stdout.split())
    _, _, codes = text.partition("Exit codes: ")
    assert [part.split()[0] for part in codes.split("; ")] == ["0", "1", "2", "4", "130"]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_console_without_the_letters_shows_them_escaped(encoding: str, tmp_path: Path) -> None:
    """A name that the console's encoding lacks ends no command, on stdout or on stderr."""
    write_toy(tmp_path / "r.zarr", n_rows=3)
    command = [Path(sys.executable).parent / "llmembed-cache", "copy"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    copied, missing = (
        subprocess.run(
            [*command, source, "\u65e5\u672c \u2192.zarr"],
            cwd=tmp_path,
            env=environment,
            check=False,
            capture_output=True,
        )
        for source in ("r.zarr", "\u65e5.zarr")
    )
    assert (copied.returncode, missing.returncode) == (0, 1), copied.stderr
    escaped = encoding == "cp1252"  # click itself takes ascii for a mistake, and writes UTF-8
    name = r"\u65e5\u672c \u2192" if escaped else "\u65e5\u672c \u2192"
    assert name in copied.stdout.decode("utf-8")
    assert missing.stderr.startswith(b"error: ")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_json_is_json_on_every_console(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --json prints reads back, letters beyond the Basic Multilingual Plane included."""
    document = {"label": "\u65e5\u672c \U0001f600 \x9d"}
    command = Command("show", callback=lambda: echo_json(document))
    result = CliRunner(charset=encoding).invoke(command)
    assert json.loads(result.stdout_bytes.decode(encoding)) == document


def test_bars_of_libraries_are_hidden_where_no_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's libraries draw no bar into a log, unless the user has chosen."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    CliRunner().invoke(Command("nothing", callback=lambda: None))
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"
