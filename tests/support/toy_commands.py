"""Commands on toy data as users type them: done, or refused in a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
from click.testing import CliRunner, Result

from llmembed.extract.cli import main as extract_main

EXTRACTED = ("--layers", "1,2", "--pooling", "mean", "--max-length", "64", "--quiet")


def run(command: click.Command, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def done(command: click.Command, *arguments: str) -> Result:
    result = run(command, *arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(command: click.Command, *arguments: str) -> str:
    """Run it; it must end in one known error, and not by a traceback."""
    result = run(command, *arguments)
    assert isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code in {1, 2}, (arguments, result.output)
    assert "Traceback" not in result.output
    return result.stderr


def extracted(model: Path | str, dataset: Path | str, cache: Path | str, *more: str) -> Result:
    given = ["--model", str(model), "--dataset", str(dataset), "--cache", str(cache)]
    return done(extract_main, *given, *EXTRACTED, *more)


def start(command: str, *arguments: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    line = [sys.executable, "-Pm", "llmembed", command, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment)
