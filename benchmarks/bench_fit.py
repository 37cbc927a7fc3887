"""Every figure the trainer is held to, beside its bar: accuracy, speed, calibration.

    python benchmarks/bench_fit.py --caches FOLDER     # mr.zarr, sst2.zarr, r8.zarr, r52.zarr
    python benchmarks/bench_fit.py                     # speed alone, on made-up rows
    python benchmarks/bench_fit.py --part large --device cuda

The caches hold the last five layers of a source and 8, 16, 24 and 30, mean-pooled, at least; `auto`
and the best single layer take all there is. Speed is measured on R8, solving on MR,
SST-2 and R8.
Times want a quiet machine, so parts can be run one by one: each replaces its own figures in
`--output`. What scikit-learn finds takes hours and is kept in a file of its own.

A bar that is not met is printed as such; the exit code says nothing of it. The last line of stdout
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_fit_accuracy as accuracy
import bench_fit_authors as authors
import bench_fit_commands as commands
import bench_fit_gradient as gradient
import bench_fit_large as large
import bench_fit_solved as solved
import numpy as np
import torch
from bars import Bar, least

from llmembed.cache_format import CacheWriter, DatasetInfo, SourceInfo
from llmembed.train.config import FitConfig

RESULTS = Path(__file__).parent / "results"
DATA_SETS = ("mr", "sst2", "r8", "r52")
LAYERS, ONE_LAYER, N_LAYERS = "8,16,24,30", "16", 30
N_CLASSES = 8


BARS = {
    "cooc over the paper's preset, mean": least(0.3),
    "auto over the best layer, mean": least(0.5),
    "auto over the best layer, worst": least(-0.1),
    "ECE after calibration, worst": Bar(limit=0.03),
    "ECE after less before, worst": Bar(limit=0.0),
    "LDA, times LogisticRegressionCV": least(50),
    "LDA over LogisticRegressionCV": least(-0.1),
    "ridge, times RidgeClassifierCV": least(5),
    "softmax, times LogisticRegression": least(10),
    "softmax, loss above LogisticRegression": Bar(limit=1e-4),
    "sweep of all layers over a concat fit": Bar(limit=2),
    "Lightning over a bare loop": Bar(limit=1.15),
    "cooc at the paper's size, times its authors' loop": least(5),
    "paper's preset, times its authors' loop": least(5),
    "cooc, whole process, s": Bar(limit=15),
    "ridge, whole process, s": Bar(limit=5),
    "five seeds of cooc over one": Bar(limit=2),
    "five seeds of scalar-mix over one": Bar(limit=2),
    "67,349 rows, ridge sweep, s": Bar(limit=1),
    "67,349 rows, softmax, s": Bar(limit=1),
    "67,349 rows, ten epochs of the paper's cooc, s": Bar(limit=3),
}
FIGURES: dict[str, Callable[[Any], dict[str, float]]] = {
    "accuracy": accuracy.figures,
    "solved": solved.figures,
    "gradient": gradient.figures,
    "authors": authors.figures,
    "commands": commands.figures,
    "large": large.figures,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for, and print every figure there is."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.work is None:
            options.work = Path(folder) / "runs"
        result = json.loads(options.output.read_text()) if options.output.exists() else {}
        for part in options.part or _parts(options):
            measured = _measure(part, options, Path(folder))
            result[part] = {
                "measured": measured,
                "figures": FIGURES[part](measured),
                "n_cpus": os.cpu_count(),
                "n_threads": torch.get_num_threads(),
                "load_average": os.getloadavg()[0],
            }
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(json.dumps({part: one["figures"] for part, one in result.items()}))


def table(result: Mapping[str, Any]) -> str:
    """Lay out every figure beside its bar."""
    lines = [accuracy.table(result["accuracy"]["measured"]), ""] if "accuracy" in result else []
    for part in result.values():
        for name, figure in part["figures"].items():
            lines.append(BARS[name].line(name, figure))
    return "\n".join(lines)


def _measure(part: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if part == "accuracy":
        caches = {name: options.caches / f"{name}.zarr" for name in options.data_set or DATA_SETS}
        return accuracy.measure(caches, options.source, options.work, options.reference)
    if part == "large":
        size = options.rows or 67_349, options.hidden_size or 4096
        return large.measure(torch.device(options.device), *size)
    if part == "authors":
        size = options.rows or 4096, options.hidden_size or 4096
        return authors.measure(*size, options.repeats)
    if part == "solved":
        names = options.data_set or ("mr", "sst2", "r8")
        configs = {_speed_config(name, options, folder): None for name in names}
        return solved.measure(list(configs), ONE_LAYER, options.repeats)
    config = _speed_config("r8", options, folder)
    if part == "gradient":
        return gradient.measure(gradient.config_of(config), options.repeats)
    return commands.measure(config, options.repeats)


def _speed_config(name: str, options: argparse.Namespace, folder: Path) -> FitConfig:
    source = options.source
    path = folder / "made-up.zarr"
    if options.caches is not None:
        path = options.caches / f"{name}.zarr"
    elif not path.exists():
        write_features(path, source, options.rows or 5485, options.hidden_size or 576)
    return FitConfig(cache=str(path), source=(source,), pooling=("mean",), layers=LAYERS)


def _parts(options: argparse.Namespace) -> list[str]:
    if options.device != "cpu":
        return ["large"]
    speed = ["solved", "gradient", "authors", "commands"]
    return speed if options.caches is None else ["accuracy", *speed]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--caches", type=Path, help="folder of the four caches")
    parser.add_argument(
        "--data-set", action="append", choices=DATA_SETS, help="of accuracy, solved"
    )
    parser.add_argument("--source", default="smollm2-135m")
    parser.add_argument("--part", action="append", choices=tuple(FIGURES), help="repeatable")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="of the part large: cpu or cuda")
    parser.add_argument("--rows", type=int, help="made-up rows: 5,485, or 67,349 in the part large")
    parser.add_argument("--hidden-size", type=int, help="576, or 4,096 in the part large")
    parser.add_argument("--work", type=Path, help="folder of the runs, to go on from")
    parser.add_argument("--reference", type=Path, default=RESULTS / "bench_fit_reference.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_fit.json")
    return parser


def write_features(path: Path, source: str, n_rows: int, hidden_size: int) -> None:
    """Write noisy class centres, all layers, hard enough that early stopping has work."""
    generator = np.random.default_rng(0)
    info = SourceInfo(
        name=source, fingerprint={}, recipe={}, hidden_size=hidden_size, n_layers=N_LAYERS
    )
    names = tuple(f"class {k}" for k in range(N_CLASSES))
    dataset = DatasetInfo(name="made-up", labels=names, provenance={})
    arrays = [("mean", layer) for layer in range(N_LAYERS + 1)]
    centres = generator.normal(size=(N_CLASSES, hidden_size)) * 0.2
    with CacheWriter(path, dataset=dataset) as writer:
        writer.add_source(info)
        for split, n, first in (("train", n_rows, 0), ("test", n_rows // 2, n_rows)):
            labels = generator.integers(0, N_CLASSES, n).astype(np.int32)
            text_hash = np.arange(first, first + n, dtype=np.uint64)
            writer.add_split(split, labels=labels, text_hash=text_hash)
            plan = writer.plan(split, source, arrays=arrays)
            for block in plan.blocks:
                of_rows = centres[labels[block.compute_from : block.stop]]
                features = {
                    array: (of_rows + generator.normal(size=of_rows.shape)).astype(np.float16)
                    for array in arrays
                }
                n_tokens = np.full(len(of_rows), 9, dtype=np.int32)
                writer.write(plan, block, n_tokens=n_tokens, features=features)
            writer.finish(split, source)


if __name__ == "__main__":
    main()
