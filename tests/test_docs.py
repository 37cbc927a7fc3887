"""What the README and docs say can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from llmembed.cache_format.cli import main as cache_main
from llmembed.extract.cli import main as extract_main
from llmembed.train import load_run
from llmembed.train.cli.fit import fit_main
from llmembed.train.cli.predict import predict_main
from llmembed.train.cli.report import report_main
from llmembed.train.cli.serve import serve_main
from llmembed.train.cli.sweep import sweep_main
from llmembed.train.fusions import FUSIONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCALING = re.sub(r"( \\)?\n +--", " --", (ROOT / "docs" / "scaling.md").read_text())
COMMANDS: dict[str, click.Command] = {
    "llmembed-cache": cache_main,
    "llmembed-extract": extract_main,
    "llmembed-fit": fit_main,
    "llmembed-predict": predict_main,
    "llmembed-report": report_main,
    "llmembed-serve": serve_main,
    "llmembed-sweep": sweep_main,
}
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
LINES = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("llmembed-")
]


JOBS = re.findall(r"llmembed-(?:extract|cache|sweep) [^'`\n]+", SCALING)
SERVING = re.findall(
    r"^llmembed-serve .+$", (ROOT / "docs" / "serving.md").read_text(), flags=re.MULTILINE
)


@pytest.mark.parametrize("line", [*LINES, *JOBS, *SERVING])
def test_every_command_line_is_understood(line: str) -> None:
    """Commands and options exist, and their values are of the right kind, in job files too."""
    filled = re.sub(r"\$[A-Z_]+", "1", line)
    name, *arguments = shlex.split(filled, comments=True)
    command = COMMANDS[name]
    if isinstance(command, click.Group):
        name = arguments.pop(0)
        command = command.commands[name]
    context = command.make_context(name, arguments)
    assert context.info_name == name


def test_job_files_are_found() -> None:
    """Ranks by hand, SLURM, torchrun, two of Kubernetes, two of Ray, and what closes the cache."""
    assert sum("--rank" in line for line in JOBS) == 4
    assert sum("--engine ray" in line for line in JOBS) == 3
    assert sum("finalize" in line for line in JOBS) == 2


def test_the_readme_shows_the_two_lines_of_the_method() -> None:
    """The two commands that follow one another stand at the head."""
    assert LINES[:2] == [
        "llmembed-extract --model llama2-7b --layers 8,16,24,32",
        "llmembed-fit --cache sst2.zarr --fusion cooc",
    ]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("default::llmembed.common.errors.LLMEmbedWarning")
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eight lines extract, fit and predict as they stand, then with a fusion of one's own."""
    eight_lines, own_fusion = [block for language, block in BLOCKS if language == "python"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FUSIONS, "_specs", dict(FUSIONS._specs))
    names: dict[str, object] = {}
    again = 'run = fit(FitConfig(cache="r8.zarr", fusion="range"))'
    for code in (eight_lines, own_fusion, again):
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - it is our own README
    assert getattr(names["x"], "shape", None) == (100, 576)
    assert load_run("runs/r8-range-0").predict(["oil prices rose"])
