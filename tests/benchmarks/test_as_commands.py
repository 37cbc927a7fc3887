"""Benchmarks of the cache, of ranks and of Ray, started at toy size, so that they cannot rot."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_model import save_toy_model

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = [f"{path.parent.name}.{path.stem}" for path in sorted(BENCHMARKS.glob("*/*.py"))]


def run(name: str, tmp_path: Path, *arguments: str) -> dict[str, object]:
    """Run a benchmark in an empty folder and return the JSON of its last line."""
    command = [sys.executable, str(BENCHMARKS), name, *arguments, "--output", "result.json"]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    document: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "result.json").read_text()) == document
    return document


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_hold(name: str) -> None:
    """Every doctest of the benchmarks gives what it says."""
    if name == "studies.plots":
        pytest.importorskip("matplotlib")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_without_a_name_all_benchmarks_are_listed() -> None:
    """Each has a line that says what it measures; a wrong name is bad usage."""
    command = [sys.executable, str(BENCHMARKS)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True)
    names = {line.split()[0] for line in listed.stdout.splitlines()[2:]}
    assert {"rerun", "extract", "cache", "fit", "ablation", "transfer"} <= names
    assert names <= {name.partition(".")[2] for name in MODULES}
    assert subprocess.run([*command, "fti"], check=False).returncode == 2


def test_the_cache_benchmark_checks_its_answers(tmp_path: Path) -> None:
    """All readers agree at toy size, and every target has a ratio."""
    sizes = ["--n-rows", "256", "--hidden-size", "32", "--rounds", "1"]
    result = run("cache", tmp_path, *sizes)
    assert result["ratios"].keys() >= result["targets"].keys()  # type: ignore[attr-defined]


def test_the_scaling_benchmark_extrapolates(tmp_path: Path) -> None:
    """Objects grow by whole blocks along a straight line."""
    sizes = ["--n-rows", "4096", "8192", "--n-blocks", "4", "6"]
    result = run("scaling", tmp_path, *sizes)
    assert result["extrapolated"]["n_rows"] == 10_000_000  # type: ignore[index]
    # Five arrays have 4 and 8 blocks of 1,024 rows; each column stays one chunk.
    n_chunks = [size["n_chunks"] for size in result["measured"]]  # type: ignore[attr-defined]
    assert n_chunks[1] - n_chunks[0] == 5 * 4


@pytest.mark.ray
def test_the_ray_benchmark_counts_receipts(tmp_path: Path) -> None:
    """Every unit has one receipt, and the shares are of the time between them."""
    result = run("ray", tmp_path, "--n-units=4", "--n-many=8", "--seconds=0.1")
    assert result.keys() >= {"engine_share", "driver_cpu_share", "units_a_minute"}


@pytest.mark.ray
def test_the_ranks_benchmark_compares_features(tmp_path: Path) -> None:
    """Two ranks give the features of one, and a plan tells its memory."""
    model = [f"--model={save_toy_model(tmp_path / 'llama', 'llama')}", "--layers=2"]
    result = run("ranks", tmp_path, *model, "--n-texts=200", "--n-rows", "300")
    (planned,) = result["planned"]  # type: ignore[misc]
    assert planned["n_units"] == 5


def test_the_benchmark_of_serving_checks_its_answers(tmp_path: Path) -> None:
    """Many clients of a toy all get the answers of each text alone, and the server ends well."""
    model = str(save_toy_model(tmp_path / "toy", "bert"))
    result = run("serve", tmp_path, "--model", model, "--clients", "20", "--seconds", "2")
    figures = result["figures"]
    assert figures["failed requests"] == 0  # type: ignore[index]
    assert figures["largest difference from each text alone"] < 0.02  # type: ignore[index]
    assert result["many"]["n_requests"] > 20  # type: ignore[index]
