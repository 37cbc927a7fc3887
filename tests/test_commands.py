"""What the commands have in common: usage, version, help, exit codes, completion, any console."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner
from toy_cache import write_toy

from llmembed.cache_format.cli import main as cache_main
from llmembed.cli import VERBS
from llmembed.cli import main as llmembed_main
from llmembed.common.console import Command, echo_json
from llmembed.extract.cli import main as extract_main
from llmembed.train.cli.audit import audit_main
from llmembed.train.cli.fit import fit_main
from llmembed.train.cli.predict import predict_main
from llmembed.train.cli.report import report_main
from llmembed.train.cli.serve import serve_main
from llmembed.train.cli.sweep import sweep_main

ROOT = Path(__file__).parents[1]
COMMANDS: dict[str, click.Command] = {
    "llmembed": llmembed_main,
    "llmembed-audit": audit_main,
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


@pytest.mark.parametrize(("name", "command"), ALL.items(), ids=ALL)
def test_every_command_tells_its_version(name: str, command: click.Command) -> None:
    """`--version` prints the version of the package, and nothing else is needed."""
    result = CliRunner().invoke(command, ["--version"], prog_name=name)
    assert result.exit_code == 0
    assert result.stdout == f"{name}, version {version('llmembed-cache')}\n"


@pytest.mark.parametrize(("name", "command"), ALL.items(), ids=ALL)
def test_the_help_has_a_table_of_exit_codes(name: str, command: click.Command) -> None:
    """`--help` of every command ends in 0, 1, 2, 4, 75 and 130, a line each, and -h is the same."""
    text = CliRunner().invoke(command, ["--help"]).stdout
    _, _, codes = text.partition("\nExit codes:\n")
    assert [line.split()[0] for line in codes.splitlines()] == ["0", "1", "2", "4", "75", "130"]
    assert CliRunner().invoke(command, ["-h"]).stdout == text


def test_each_command_is_a_verb_of_llmembed() -> None:
    """`llmembed x` is what `llmembed-x` is, for all that is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {f"llmembed-{name}": place for name, (place, _) in VERBS.items()}
    assert project["scripts"] == {"llmembed": "llmembed.cli:main", **installed}
    for name in VERBS:
        shown = CliRunner().invoke(llmembed_main, [name, "--help"], prog_name="llmembed").stdout
        assert shown.startswith(f"Usage: llmembed {name} [OPTIONS]")
        single = CliRunner().invoke(COMMANDS[f"llmembed-{name}"], ["--help"]).stdout
        assert shown.splitlines()[1:] == single.splitlines()[1:]


def test_a_verb_ends_as_its_command_does(tmp_path: Path) -> None:
    """Exit codes and messages go through; of a wrong verb it is said that there is none."""
    write_toy(tmp_path / "r.zarr", n_rows=3)
    run = CliRunner().invoke
    assert run(llmembed_main, ["cache", "verify", str(tmp_path / "r.zarr")]).exit_code == 0
    failed = run(llmembed_main, ["cache", "verify", str(tmp_path / "no.zarr")])
    assert (failed.exit_code, failed.stderr.startswith("error: ")) == (1, True)
    unknown = run(llmembed_main, ["extarct"])
    message = (
        "Error: command 'extarct' does not exist; did you mean 'extract'? Known: extract, fit,"
    )
    assert (unknown.exit_code, message in unknown.stderr) == (2, True)
    unknown = run(llmembed_main, ["cache", "inof"])
    assert (unknown.exit_code, "did you mean 'info'?" in unknown.stderr) == (2, True)


def test_the_help_of_llmembed_imports_no_command() -> None:
    """`python -m llmembed --help` names all verbs from a table, and imports click at most."""
    code = (
        "import sys, runpy; sys.argv = ['llmembed', '--help']\n"
        "try: runpy.run_module('llmembed', run_name='__main__')\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-Pc", code], capture_output=True, check=True, text=True
    )
    assert all(f"\n  {name} " in result.stdout for name in VERBS)
    imported = set(result.stderr.split())
    ours = {name for name in imported if name.startswith("llmembed.")} - {"llmembed.cli"}
    assert all(name.startswith("llmembed.common") for name in ours)
    assert not imported & {"numpy", "torch"}


GROUPED = {
    extract_main: "Model and features, Texts, Cache, Devices",
    fit_main: "Features, Classifier, Rows, Training",
    predict_main: "Run, Texts, Answers",
    audit_main: "Features, Judge, Output",
    sweep_main: "Features, Judge, Who computes, Output",
}


@pytest.mark.parametrize(("command", "groups"), GROUPED.items(), ids=GROUPED.values())
def test_options_stand_in_groups(command: click.Command, groups: str) -> None:
    """Every option once, under the heading that its field or an earlier one names."""
    text = CliRunner().invoke(command, ["--help"]).stdout
    headings = [line[:-1] for line in text.splitlines() if line[:1] not in {"", " "}][1:]
    assert headings[-3:] == ["Command", "Examples", "Exit codes"]
    assert ", ".join(headings).startswith(groups)
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    known = [one.opts[-1] for one in command.params if isinstance(one, click.Option)]
    assert sorted(shown) == sorted(known)


@pytest.mark.parametrize(("name", "command"), COMMANDS.items(), ids=COMMANDS)
def test_examples_can_be_typed(name: str, command: click.Command) -> None:
    """Each line under Examples is understood by the command that it names."""
    lines = CliRunner().invoke(command, ["--help"]).stdout.partition("\nExamples:\n")[2]
    examples = lines.partition("\n\n")[0].splitlines()
    assert len(examples) >= 2 or name == "llmembed-cache"
    for line in examples:
        _, *arguments = shlex.split(line.rpartition("| ")[2].strip())
        found: click.Command | None = command
        if name == "llmembed":
            found = llmembed_main.get_command(click.Context(llmembed_main), arguments.pop(0))
        assert found is not None
        assert found.make_context(name, arguments).params


COMPLETED = {
    "fit --fusion no-such": None,
    "extract --model llama2": {"llama2-7b", "llama2-7b-chat"},
    "extract --pooling mean,l": {"mean,last"},
    "extract --dataset r5": {"r52"},
    "fit --fusion coo": {"cooc", "cooc-cosine", "cooc-sqrt"},
    "fit --head r": {"ridge"},
    "swe": {"sweep"},
    "predict --top": {"--top-k"},
}


@pytest.mark.parametrize(("line", "names"), COMPLETED.items())
def test_a_shell_completes_names(line: str, names: set[str] | None) -> None:
    """As bash asks: verbs, options and the names that options take."""
    words = line.split()
    complete = BashComplete(llmembed_main, {}, "llmembed", "_LLMEMBED_COMPLETE")
    found = {item.value for item in complete.get_completions(words[:-1], words[-1])}
    assert found == (names or set())


def test_a_shell_completes_folders_and_files() -> None:
    """Where an option takes a place, the shell is left to find it."""
    complete = BashComplete(llmembed_main, {}, "llmembed", "_LLMEMBED_COMPLETE")
    places = {
        "predict --run": "dir",
        "predict --input": "file",
        "serve": "dir",
        "cache copy": "file",
        "extract --dataset": "file",
        "extract --model": "file",
    }
    for words, kind in places.items():
        (item,) = complete.get_completions(words.split(), "ru")
        assert (item.value, item.type) == ("ru", kind)


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
