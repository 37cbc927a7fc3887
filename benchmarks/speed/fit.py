"""Every figure the trainer is held to, beside its bar: accuracy, speed, calibration.

    python benchmarks fit --caches FOLDER     # mr.zarr, sst2.zarr, r8.zarr, r52.zarr
    python benchmarks fit                     # speed alone, on made-up rows
    python benchmarks fit --part large --device cuda

The caches hold the last five layers of a source and 8, 16, 24 and 30, mean-pooled, at least; `auto`
and the best single layer take all there is. Speed is measured on R8, solving on MR, SST-2 and R8.
Times want a quiet machine, so parts can be run one by one: each replaces its own figures in
`--output`. What scikit-learn finds takes hours and is kept in a file of its own.

The part `commands` starts `llmembed-fit` as a user does, and counts to its end.

A bar that is not met is printed as such; the exit code says nothing of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import least, most
from speed.cache import write_cache
from speed.fitting import gradient, solved
from studies import fit_accuracy

from llmembed.train import FitConfig

DATA_SETS = ("mr", "sst2", "r8", "r52")
LAYERS, ONE_LAYER, N_LAYERS = "8,16,24,30", "16", 30
PAPER_SOURCES = {"llm": 5, "bert": 1, "roberta": 1}
BARS = {
    "cooc over the paper's preset, mean": least(0.3),
    "auto over the best layer, mean": least(0.5),
    "auto over the best layer, worst": least(-0.1),
    "ECE after calibration, worst": most(0.03),
    "ECE after less before, worst": most(0.0),
    "LDA, times LogisticRegressionCV": least(50),
    "LDA over LogisticRegressionCV": least(-0.1),
    "ridge, times RidgeClassifierCV": least(5),
    "softmax, times LogisticRegression": least(10),
    "softmax, loss above LogisticRegression": most(1e-4),
    "sweep of all layers over a concat fit": most(2),
    "paper's preset, times its authors' loop": least(5),
    "cooc, whole process, s": most(15),
    "ridge, whole process, s": most(5),
    "67,349 rows, ridge sweep, s": most(1),
    "67,349 rows, softmax, s": most(1),
    "67,349 rows, ten epochs of the paper's cooc, s": most(3),
}
COMMAND = "import sys; from llmembed.train.cli.fit import fit_main; fit_main()"
COMMANDS = {"cooc": ("--fusion", "cooc"), "ridge": ("--fusion", "concat", "--head", "ridge")}
Measured = tuple[dict[str, Any], dict[str, float]]
"""What a part measured, and its figures."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for, and print every figure there is."""
    parser = harness.command_line(__doc__, "speed/fit.json")
    add = parser.add_argument
    add("--caches", type=Path, help="folder of the four caches")
    add("--data-set", action="append", choices=DATA_SETS, help="of accuracy, solved")
    add("--source", default="smollm2-135m")
    add("--part", action="append", choices=tuple(PARTS), help="repeatable")
    add("--repeats", type=int, default=3)
    add("--device", default="cpu", help="of the part large: cpu or cuda")
    add("--rows", type=int, help="made-up rows: 5,485; 4,096 of authors; 67,349 of large")
    add("--hidden-size", type=int, help="576, or 4,096 of authors and large")
    add("--work", type=Path, help="folder of the runs, to go on from")
    add("--reference", type=Path, default=harness.RESULTS / "speed" / "fit_reference.json")
    options = parser.parse_args(arguments)
    parts = ["solved", "gradient", "authors", "commands"]
    if options.device != "cpu":
        parts = ["large"]
    elif options.caches is not None:
        parts = ["accuracy", *parts]
    result = harness.read(options.output)
    with tempfile.TemporaryDirectory() as folder:
        options.scratch = Path(folder)
        for part in options.part or parts:
            measured, figures = PARTS[part](options)
            result[part] = {"measured": measured, "figures": figures, **harness.load()}
            result[part]["n_threads"] = torch.get_num_threads()
            harness.write(result, options.output)
    print(table(result))
    print(json.dumps({part: one["figures"] for part, one in result.items()}))


def table(result: Mapping[str, Any]) -> str:
    """Lay out every figure beside its bar, where it has one."""
    accuracy = result.get("accuracy")
    lines = [fit_accuracy.table(accuracy["measured"]), ""] if accuracy else []
    for part in result.values():
        for name, figure in part["figures"].items():
            bar = BARS.get(name)
            lines.append(bar.line(name, figure) if bar else f"{name:<48} {figure:10.4g}")
    return "\n".join(lines)


def _accuracy(options: argparse.Namespace) -> Measured:
    caches = {name: options.caches / f"{name}.zarr" for name in options.data_set or DATA_SETS}
    work = options.work or options.scratch / "runs"
    measured = fit_accuracy.measure(caches, options.source, work, options.reference)
    return measured, fit_accuracy.figures(measured)


def _solved(options: argparse.Namespace) -> Measured:
    names = ["r8"] if options.caches is None else options.data_set or ("mr", "sst2", "r8")
    configs = [_config(name, options) for name in names]
    return solved.measure(configs, ONE_LAYER, options.repeats)


def _large(options: argparse.Namespace) -> Measured:
    path, n_rows = options.scratch / "large.zarr", options.rows or 67_349
    write_features(path, {"llm": 5}, n_rows, options.hidden_size or 4096, n_classes=2)
    return solved.measure_large(path, options.device)


def _gradient(options: argparse.Namespace) -> Measured:
    return gradient.measure(_config("r8", options), options.repeats)


def _authors(options: argparse.Namespace) -> Measured:
    path = options.scratch / "authors.zarr"
    size = options.rows or 4096, options.hidden_size or 4096
    write_features(path, PAPER_SOURCES, *size, n_classes=2)
    return gradient.measure_authors(path, options.repeats)


def _commands(options: argparse.Namespace) -> Measured:
    return measure_commands(_config("r8", options), options.repeats)


PARTS = {
    "accuracy": _accuracy,
    "solved": _solved,
    "gradient": _gradient,
    "authors": _authors,
    "commands": _commands,
    "large": _large,
}


def _config(name: str, options: argparse.Namespace) -> FitConfig:
    """Take four layers of a cache, or of made-up rows where there is none."""
    path = options.scratch / "made-up.zarr"
    if options.caches is not None:
        path = options.caches / f"{name}.zarr"
    elif not path.exists():
        size = options.rows or 5485, options.hidden_size or 576
        write_features(path, {options.source: N_LAYERS + 1}, *size)
    source = (options.source,)
    return FitConfig(cache=str(path), source=source, pooling=("mean",), layers=LAYERS)


def measure_commands(config: FitConfig, repeats: int) -> Measured:
    """Run each command some times, by turns: seconds, and the figures of the last run."""
    metrics: dict[str, Any] = {}

    def run(name: str, options: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            line = ["--cache", config.cache, "--output", f"{folder}/run", "--quiet"]
            line += ["--baseline", "none", *options]
            line += [f"--source={name}" for name in config.source]
            line += [f"--pooling={name}" for name in config.pooling]
            line += [] if config.layers is None else ["--layers", config.layers]
            subprocess.run([sys.executable, "-W", "ignore", "-Pc", COMMAND, *line], check=True)
            metrics[name] = json.loads(Path(folder, "run", "metrics.json").read_text("utf-8"))

    ways = {
        name: lambda name=name, options=options: run(name, options)
        for name, options in COMMANDS.items()
    }
    seconds = harness.by_turns(ways, repeats)
    figures = {f"{name}, whole process, s": statistics.median(seconds[name]) for name in COMMANDS}
    return {
        "seconds": seconds,
        "accuracy": {name: one["accuracy"] for name, one in metrics.items()},
        "parts": {name: one["seconds"] for name, one in metrics.items()},
    }, figures


def write_features(
    path: Path,
    sources: Mapping[str, int],
    n_rows: int,
    hidden_size: int,
    n_classes: int = 8,
) -> None:
    """Write noisy class centres, hard enough that early stopping has work.

    Args:
        path: of the cache.
        sources: name -> number of layers, the first of which is 0.
        n_rows: training rows; half as many are for testing.
        hidden_size: of a source, but 1,024 of those with one layer beside others.
        n_classes: C.
    """
    generator = np.random.default_rng(0)
    classes = tuple(f"class {k}" for k in range(n_classes))
    for source, n_layers in sources.items():
        width = hidden_size if n_layers > 1 or len(sources) == 1 else 1024
        centres = generator.standard_normal((n_classes, width), dtype=np.float32) * 0.2
        for split, n, first in (("train", n_rows, 0), ("test", n_rows // 2, n_rows)):
            labels = np.random.default_rng(n).integers(0, n_classes, n).astype(np.int32)
            own = centres[labels]
            features = {
                layer: (own + generator.standard_normal((n, width), dtype=np.float32)).astype("f2")
                for layer in range(n_layers)
            }
            names: dict[str, Any] = {"split": split, "source": source, "classes": classes}
            text_hash = np.arange(first, first + n, dtype=np.uint64)
            write_cache(path, features, labels, text_hash=text_hash, **names)
