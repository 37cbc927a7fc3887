"""The cache's benchmarks run at toy size, so that they cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, tmp_path: Path, *arguments: str) -> dict[str, object]:
    """Run a benchmark in an empty folder and return the JSON of its last line."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments, "--output", "result.json"]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    document: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "result.json").read_text()) == document
    return document


def test_the_cache_benchmark_checks_its_answers(tmp_path: Path) -> None:
    """All readers agree at toy size, and every target has a ratio."""
    sizes = ["--n-rows", "256", "--hidden-size", "32", "--rounds", "1"]
    result = run("bench_cache.py", tmp_path, *sizes)
    assert result["ratios"].keys() >= result["targets"].keys()


def test_the_scaling_benchmark_extrapolates(tmp_path: Path) -> None:
    """Objects grow by whole blocks along a straight line."""
    result = run("bench_scaling.py", tmp_path, "--n-rows", "4096", "8192")
    assert result["extrapolated"]["n_rows"] == 10_000_000
    # Five arrays have 4 and 8 blocks of 1,024 rows; each column stays one chunk.
    n_chunks = [size["n_chunks"] for size in result["measured"]]
    assert n_chunks[1] - n_chunks[0] == 5 * 4
