"""The benchmarks of ranks and of Ray run at toy size, so that they cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def run(name: str, tmp_path: Path, *arguments: str) -> dict[str, object]:
    """Run a benchmark in an empty folder and return the JSON of its last line."""
    command = [sys.executable, "-P", str(BENCHMARKS / name), *arguments, "--output", "result.json"]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    document: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "result.json").read_text()) == document
    return document


def test_the_ray_benchmark_counts_receipts(tmp_path: Path) -> None:
    """Every unit has one receipt, and the shares are of the time between them."""
    result = run("bench_ray.py", tmp_path, "--n-units=4", "--n-many=8", "--seconds=0.1")
    assert result.keys() >= {"engine_share", "driver_cpu_share", "units_a_minute"}


def test_the_ranks_benchmark_compares_features(tmp_path: Path, llama: Path) -> None:
    """Two ranks give the features of one, and a plan tells its memory."""
    model = [f"--model={llama}", "--layers=2"]
    result = run("bench_ranks.py", tmp_path, *model, "--n-texts=200", "--n-rows", "300")
    (planned,) = result["planned"]  # type: ignore[misc]
    assert planned["n_units"] == 5
