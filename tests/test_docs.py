"""What the README and docs say can be typed, and where they point there is something."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import click
import nbformat
import pytest
from nbclient import NotebookClient

from llmembed.extract.backbones.models import MODELS
from llmembed.extract.texts.options import DATASETS
from llmembed.train import load_run
from llmembed.train.fusions import FUSIONS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *DOCS,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "cache_format" / "FORMAT.md",
]
TOUR = ROOT / "docs" / "tour.ipynb"


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[str]:
    return [
        line.removesuffix(" &")
        for language, block in blocks(page)
        if language in ("", "sh")
        for line in re.sub(r" \\\n *", " ", block).splitlines()
        if re.match(r"llmembed(-\w+)? ", line)
    ]


LINES = [line for page in (ROOT / "README.md", *DOCS) for line in command_lines(page)]
SCALING = re.sub(r"( \\)?\n +--", " --", (ROOT / "docs" / "scaling.md").read_text())
JOBS = re.findall(r"llmembed-(?:extract|cache|sweep) [^'`\n]+", SCALING)


@pytest.mark.parametrize("line", sorted({*LINES, *JOBS}))
def test_every_command_line_is_understood(line: str) -> None:
    """Commands and options exist, and their values are of the right kind, in job files too."""
    filled = re.sub(r"\$[A-Z_]+", "1", line)
    name, *arguments = shlex.split(filled, comments=True)
    module, _, attribute = PROJECT["scripts"][name].partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    while isinstance(command, click.Group):
        name = arguments.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, name
        command = found
    context = command.make_context(name, arguments)
    assert context.info_name == name


def test_job_files_are_found() -> None:
    """Ranks by hand, SLURM, torchrun, two of Kubernetes, two of Ray, and what closes the cache."""
    assert sum("--rank" in line for line in JOBS) == 4
    assert sum("--engine ray" in line for line in JOBS) == 3
    assert sum("finalize" in line for line in JOBS) == 2


def test_the_readme_shows_the_two_lines_of_the_method() -> None:
    """The two commands that follow one another stand at the head."""
    assert command_lines(ROOT / "README.md")[:2] == [
        "llmembed-extract --model llama2-7b --layers 8,16,24,32",
        "llmembed-fit --cache sst2.zarr --fusion cooc",
    ]


def anchors(page: Path) -> set[str]:
    """Give the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


MADE_FOR_THE_SITE = {ROOT / "docs" / name for name in ("commands.md", "python.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    """Files that pages point to are there, and so are the headings."""
    for target, anchor in re.findall(r"\]\(([^)\s:#]*)(?:#([^)\s]*))?\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        if path not in MADE_FOR_THE_SITE:
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_extras_that_pages_name_exist(page: Path) -> None:
    """`pip install 'llmembed-cache[...]'` finds what it asks for."""
    for names in re.findall(r"llmembed-cache\[([\w,]+)\]", page.read_text()):
        assert {*names.split(",")} <= {*PROJECT["optional-dependencies"]}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_examples_of_python_give_what_they_say(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example with a prompt has the answer that stands beneath it."""
    monkeypatch.chdir(ROOT)
    failed, _ = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert failed == 0


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("default::llmembed.common.errors.LLMEmbedWarning")
def test_the_python_of_the_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eight lines of the README extract, fit and predict; a fusion of one's own fits, too."""
    monkeypatch.chdir(tmp_path)
    for registry in (DATASETS, FUSIONS, MODELS):
        monkeypatch.setattr(registry, "_specs", dict(registry._specs))
    names: dict[str, object] = {}
    for page in (ROOT / "README.md", ROOT / "docs" / "howto.md", ROOT / "docs" / "data.md"):
        for language, code in blocks(page):
            if language == "python":
                exec(compile(code, page.name, "exec"), names)  # noqa: S102 - they are our own pages
    exec('run = fit(FitConfig(cache="r8.zarr", fusion="range"))', names)  # noqa: S102
    assert getattr(names["x"], "shape", None) == (100, 576)
    assert load_run("runs/r8-range-0").predict(["oil prices rose"])


@pytest.mark.real
@pytest.mark.slow
def test_the_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    """Its blocks, one after another in an empty folder, print what stands beneath them."""
    steps = [block for block in blocks(ROOT / "docs" / "tutorial.md") if block[0]]
    script, shown = ["set -e", "trap 'kill $(jobs -p) 2> server.log || true' EXIT"], {}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for number, (language, code) in enumerate(steps):
        if language == "text":
            shown[number - 1] = code
            continue
        step = code.replace("8000", port)  # where another server may listen
        (tmp_path / f"{number}.py").write_text(step)
        script += [rf"printf '\n# {number}\n'", step if language == "sh" else f"python {number}.py"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = dict(
        re.findall(r"^# (\d+)\n(.*?)(?=^# \d|\Z)", done.stdout, re.DOTALL | re.MULTILINE)
    )
    check = doctest.OutputChecker().check_output
    assert shown
    for number, wanted in shown.items():
        got = printed[str(number)]
        assert check(wanted, got.strip() + "\n", doctest.ELLIPSIS), f"{got}instead of\n{wanted}"


@pytest.mark.real
@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Every cell of the tour runs in an empty folder, and it is kept without outputs."""
    notebook = nbformat.read(TOUR, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    NotebookClient(notebook, timeout=240).execute(cwd=str(tmp_path))
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "earn  " in printed


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    """The module that makes pages of the site."""
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_become_markdown(generated: ModuleType) -> None:
    """Its examples hold."""
    failed, attempted = doctest.testmod(generated)
    assert (failed, attempted) == (0, 1)
