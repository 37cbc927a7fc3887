"""The shape of the project: which way imports point, doctests, markers."""

from __future__ import annotations

import ast
import collections
import doctest
import graphlib
import importlib
import pkgutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cache_format", "extract", "train")
MODULES = [
    module.name
    for package in ("llmembed.common", *(f"llmembed.{name}" for name in PACKAGES))
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
]
BELOW = {
    "common": {"common"},
    "cache_format": {"common", "cache_format", "cli"},
    "extract": {"common", "cache_format", "extract"},
    "train": {"common", "cache_format", "train"},
}
MEET_BOTH_STAGES = (
    "cache_format/cli.py",
    "cache_format/llmembed/__init__.py",
    "train/verbs/estimator.py",
    "train/reports/baselines.py",
    "train/reports/texts.py",
    "train/runs/predict.py",
)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    """Both stages import cache_format, not each other; only six files meet both."""
    here = path.relative_to(ROOT).as_posix()
    package = "common" if "llmembed/common/" in here else here.partition("/")[0]
    allowed = {*BELOW} if here in MEET_BOTH_STAGES else BELOW[package]
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("llmembed.")}
    assert ours <= allowed


@pytest.mark.parametrize("path", sources("cache_format"), ids=lambda path: path.name)
def test_the_cache_needs_no_deep_learning_library(path: Path) -> None:
    """A cache is read where neither torch nor transformers is installed."""
    roots = {name.partition(".")[0] for name in imported(path)}
    if path.name == "process.py":
        roots -= {"torch"}  # within what only the stages call
    assert not roots & {"torch", "transformers", "lightning", "datasets", "sklearn"}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_hold(name: str) -> None:
    """Every doctest gives what it says."""
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("path", sources("tests"), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_states_its_fact(path: Path) -> None:
    """A test has a docstring of one sentence or more."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            assert (ast.get_docstring(node) or "").endswith((".", "?")), node.name


MEASURED_FOLDERS = (*PACKAGES, "benchmarks")


def module_name(path: Path) -> str:
    """Give the name by which a file of the product is imported."""
    name = path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("cache_format/llmembed/")
    return f"llmembed.{name.replace('/', '.')}".removesuffix(".__init__")


def test_no_import_comes_back_to_where_it_began() -> None:
    """Modules of the product form no circle, imports inside functions counted."""
    modules = {module_name(path): path for path in sources(*PACKAGES)}
    graph = {
        name: {
            target if target in modules else target.rpartition(".")[0] for target in imported(path)
        }
        & set(modules)
        for name, path in modules.items()
    }
    # Raises CycleError, which names the circle.
    assert {*graphlib.TopologicalSorter(graph).static_order()} == set(modules)


@pytest.mark.parametrize("top", MEASURED_FOLDERS)
def test_a_folder_can_be_taken_in_at_a_glance(top: str) -> None:
    """A folder of modules has at most 12 entries that git keeps."""
    listed = subprocess.run(
        ["git", "ls-files", top], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    entries = collections.defaultdict(set)
    for path in map(Path, listed):
        for folder in path.parents:
            entries[folder].add(path.relative_to(folder).parts[0])
    crowded = {
        str(folder): len(held)
        for folder, held in entries.items()
        if len(held) > 12 and any(name.endswith(".py") for name in held) and folder != Path()
    }
    assert crowded == {}
