from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_fit.py"


def test_the_benchmark_runs_at_toy_size() -> None:
    """The benchmark ends in one JSON line with its figures."""
    options = ["--rows", "200", "--hidden-size", "8", "--repeats", "1", "--baselines"]
    result = subprocess.run(
        [sys.executable, "-P", str(BENCHMARK), *options], capture_output=True, text=True, check=True
    )
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["lightning_over_hand_loop"] > 0
    assert figures["rows"] == 200
    assert figures["softmax_loss"] <= figures["logistic_regression_loss"] + 1e-4
    assert figures["ridge_accuracy"] > 0.2
