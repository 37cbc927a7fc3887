"""How long `llmembed-fit` takes, and what Lightning adds to a step.

Two figures: the whole command on features of the size of R8 (process start, reading, fitting,
evaluation and writing), and the epochs of a fit through Lightning over the same steps in a
hand-written loop in this process, which is the ceiling. Medians of interleaved repetitions.

    python benchmarks/bench_fit.py [--rows 5485] [--hidden-size 576] [--repeats 5]

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmembed.cache_format import CacheWriter, DatasetInfo, SourceInfo
from llmembed.train.classifier import Classifier
from llmembed.train.config import FitConfig
from llmembed.train.data import FeatureBatches, FitData, architecture_of, load_data
from llmembed.train.gradient import train_seed
from llmembed.train.module import ClassifierModule, Optimisation

LAYERS = (8, 16, 24)
N_CLASSES = 8
EPOCHS = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5485)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = write_features(Path(folder) / "r8.zarr", options.rows, options.hidden_size)
        figures = measure(cache, Path(folder) / "run", options.repeats)
    print(f"whole command   {figures['command_s']:.1f} s, {figures['n_epochs']} epochs")
    print(f"Lightning       {figures['lightning_over_hand_loop']:.2f} x the hand-written loop")
    print(json.dumps({"rows": options.rows, "hidden_size": options.hidden_size, **figures}))


def write_features(path: Path, n_rows: int, hidden_size: int) -> Path:
    """Write noisy class centres, hard enough that early stopping has something to watch."""
    generator = np.random.default_rng(0)
    source = SourceInfo(
        name="made-up", fingerprint={}, recipe={}, hidden_size=hidden_size, n_layers=30
    )
    names = tuple(f"class {k}" for k in range(N_CLASSES))
    dataset = DatasetInfo(name="made-up", labels=names, provenance={})
    centres = generator.normal(size=(N_CLASSES, hidden_size)) * 0.2
    with CacheWriter(path, dataset=dataset) as writer:
        writer.add_source(source)
        for split, n, first in (("train", n_rows, 0), ("test", n_rows // 2, n_rows)):
            labels = generator.integers(0, N_CLASSES, n).astype(np.int32)
            text_hash = np.arange(first, first + n, dtype=np.uint64)
            writer.add_split(split, labels=labels, text_hash=text_hash)
            plan = writer.plan(split, source.name, arrays=[("mean", layer) for layer in LAYERS])
            for block in plan.blocks:
                rows = labels[block.compute_from : block.stop]
                arrays = {
                    ("mean", layer): (
                        centres[rows] + generator.normal(size=(len(rows), hidden_size))
                    ).astype(np.float16)
                    for layer in LAYERS
                }
                n_tokens = np.full(len(rows), 9, dtype=np.int32)
                writer.write(plan, block, n_tokens=n_tokens, features=arrays)
            writer.finish(split, source.name)
    return path


def measure(cache: Path, output: Path, repeats: int) -> dict[str, Any]:
    """Time the command once, and both loops by turns."""
    started = time.perf_counter()
    command = "import sys; from llmembed.train.cli import fit_main; fit_main()"
    arguments = ["--cache", str(cache), "--output", str(output), "--quiet"]
    subprocess.run([sys.executable, "-Pc", command, *arguments], check=True)
    command_s = time.perf_counter() - started
    metrics = json.loads((output / "metrics.json").read_text())
    config = FitConfig(cache=str(cache), epochs=EPOCHS, patience=EPOCHS, accelerator="cpu")
    data = load_data(config)
    ratios = [_seconds(config, data, True) / _seconds(config, data, False) for _ in range(repeats)]
    return {
        "command_s": command_s,
        "accuracy": metrics["accuracy"],
        "n_epochs": metrics["per_seed"][0]["n_epochs"],
        "seconds": metrics["seconds"],
        "lightning_over_hand_loop": statistics.median(ratios),
        "load_average": os.getloadavg()[0],
        "n_cpus": os.cpu_count(),
    }


def _seconds(config: FitConfig, data: FitData, lightning: bool) -> float:
    started = time.perf_counter()
    if lightning:
        train_seed(config, data, seed=0)
    else:
        _hand_loop(config, data)
    return time.perf_counter() - started


def _hand_loop(config: FitConfig, data: FitData) -> None:
    """Do the same steps and validations with nothing around them."""
    torch.manual_seed(0)
    optimisation = Optimisation(lr=config.lr, weight_decay=config.weight_decay)
    module = ClassifierModule(
        Classifier(architecture_of(config, data, config.gradient_head)), optimisation
    )
    optimizer = module.configure_optimizers()
    shares = [torch.from_numpy(rows) for rows in (data.shares.train, data.shares.validation)]
    order = torch.Generator().manual_seed(0)
    train = FeatureBatches(data.x, data.y, shares[0], config.batch_size, order)
    validation = FeatureBatches(data.x, data.y, shares[1], config.batch_size)
    for _ in range(config.epochs):
        module.train()
        for index, batch in enumerate(train):
            optimizer.zero_grad()
            module.training_step(batch, index).backward()
            optimizer.step()
        module.eval()
        with torch.no_grad():
            for index, batch in enumerate(validation):
                module.validation_step(batch, index)
        module.on_validation_epoch_end()


if __name__ == "__main__":
    main()
