"""How long `llmembed-fit` takes as a user meets it, from the start of the process to its end.

Five seeds stand against the mean of five runs of one seed each, since seeds stop after different
numbers of epochs, on R8 after anything between 11 and 21.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmembed.train.config import FitConfig

_COMMAND = "import sys; from llmembed.train.cli import fit_main; fit_main()"
_OTHER_SEEDS = ("1", "2", "3", "4")
COMMANDS: dict[str, tuple[str, ...]] = {
    "cooc": ("--fusion", "cooc"),
    **{f"cooc, seed {k}": ("--fusion", "cooc", "--seed", k) for k in _OTHER_SEEDS},
    "five seeds of cooc": ("--fusion", "cooc", "--n-seeds", "5"),
    "ridge": ("--fusion", "concat", "--head", "ridge"),
    "scalar-mix": ("--fusion", "scalar-mix"),
    **{f"scalar-mix, seed {k}": ("--fusion", "scalar-mix", "--seed", k) for k in _OTHER_SEEDS},
    "five seeds of scalar-mix": ("--fusion", "scalar-mix", "--n-seeds", "5"),
}


def measure(config: FitConfig, repeats: int) -> dict[str, Any]:
    """Run each command some times, by turns; give seconds and the figures of the last."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    metrics: dict[str, Any] = {}
    for _ in range(repeats):
        for name, options in COMMANDS.items():
            taken, metrics[name] = _run(config, options)
            seconds[name].append(taken)
    return {
        "seconds": seconds,
        "accuracy": {name: one["accuracy"] for name, one in metrics.items()},
        "parts": {name: one["seconds"] for name, one in metrics.items()},
        "load_average": os.getloadavg()[0],
    }


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Give what the bars are about."""
    taken = {name: statistics.median(seconds) for name, seconds in result["seconds"].items()}

    def five_over_one(fusion: str) -> float:
        one = [taken[fusion], *(taken[f"{fusion}, seed {k}"] for k in _OTHER_SEEDS)]
        return float(taken[f"five seeds of {fusion}"] / statistics.mean(one))

    return {
        "cooc, whole process, s": taken["cooc"],
        "ridge, whole process, s": taken["ridge"],
        "five seeds of cooc over one": five_over_one("cooc"),
        "five seeds of scalar-mix over one": five_over_one("scalar-mix"),
    }


def _run(config: FitConfig, options: Sequence[str]) -> tuple[float, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        features = [f"--source={name}" for name in config.source]
        features += [f"--pooling={name}" for name in config.pooling]
        features += [] if config.layers is None else ["--layers", config.layers]
        arguments = ["--cache", config.cache, *features, "--output", str(output), "--quiet"]
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-W", "ignore", "-Pc", _COMMAND, *arguments, *options], check=True
        )
        seconds = time.perf_counter() - started
        metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
        return seconds, metrics
