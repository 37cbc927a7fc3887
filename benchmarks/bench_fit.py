"""How long `llmembed-fit` takes, what Lightning adds to a step, and what solving saves.

Two figures always: the whole command on features of the size of R8 (process start, reading,
fitting, evaluation and writing), and the epochs of a fit through Lightning over the same steps in
a hand-written loop in this process, which is the ceiling. Medians of interleaved repetitions.
With `--baselines` also scikit-learn on the same rows: ridge with 10 strengths and 5 folds against
RidgeClassifierCV, and one softmax regression against LogisticRegression at the same penalty, with
the loss that each reaches (minutes at the size of R8).

    python benchmarks/bench_fit.py [--rows 5485] [--hidden-size 576] [--repeats 5] [--baselines]

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold

from llmembed.cache_format import CacheWriter, DatasetInfo, SourceInfo
from llmembed.train.classifier import Classifier
from llmembed.train.closed import LinearMap, Ridge
from llmembed.train.config import FitConfig
from llmembed.train.crossfit import folds_of
from llmembed.train.data import FeatureBatches, FitData, architecture_of, load_data
from llmembed.train.gradient import train_by_gradient
from llmembed.train.module import ClassifierModule, Optimisation
from llmembed.train.solvers import Problem, SoftmaxSolver, choose_head

LAYERS = (8, 16, 24)
N_CLASSES = 8
EPOCHS = 3
PENALTY = 0.01  # of the softmax regression; features have variance 1


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5485)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--baselines", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = write_features(Path(folder) / "r8.zarr", options.rows, options.hidden_size)
        figures = measure(cache, Path(folder) / "run", options.repeats)
        if options.baselines:
            figures |= compare_with_scikit_learn(cache, options.repeats)
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


def compare_with_scikit_learn(cache: Path, repeats: int) -> dict[str, Any]:
    """Time the solvers against scikit-learn's, and compare what they find."""
    config = FitConfig(cache=str(cache), fusion="concat", head="ridge")
    data = load_data(config)
    x, y = data.x, data.y
    weights = torch.ones(len(data.labels))
    folds = folds_of(config, data, 0, torch.device("cpu"))

    def problem() -> Problem:
        return Problem.of(x, y, folds, weights)

    ridge_s, ridge = _median(lambda: choose_head(problem(), ("ridge",)), repeats)
    alphas = [len(x) * strength for strength in Ridge.STRENGTHS]
    reference = RidgeClassifierCV(alphas=alphas, cv=StratifiedKFold(len(folds)))
    ridge_cv_s, _ = _median(lambda: reference.fit(x.numpy(), y.numpy()), 1)
    found = ridge.solver.solve(ridge.strength).scores(data.x_eval).argmax(dim=1)
    softmax_s, softmax = _median(lambda: SoftmaxSolver(problem()).solve(PENALTY), repeats)
    regression = LogisticRegression(C=1 / (PENALTY * len(x)), max_iter=1000)
    regression_s, _ = _median(lambda: regression.fit(x.numpy(), y.numpy()), repeats)
    theirs = LinearMap(
        weight=torch.from_numpy(regression.coef_), bias=torch.from_numpy(regression.intercept_)
    )
    return {
        "ridge_s": ridge_s,
        "ridge_classifier_cv_s": ridge_cv_s,
        "ridge_accuracy": (found == data.y_eval).double().mean().item(),
        "ridge_classifier_cv_accuracy": reference.score(data.x_eval.numpy(), data.y_eval.numpy()),
        "softmax_s": softmax_s,
        "logistic_regression_s": regression_s,
        "softmax_loss": _penalised_loss(softmax, x, y),
        "logistic_regression_loss": _penalised_loss(theirs, x, y),
    }


def _median(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def _penalised_loss(linear: LinearMap, x: torch.Tensor, y: torch.Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(linear.scores(x.double()), y)
    return (loss + PENALTY / 2 * linear.weight.double().square().sum()).item()


def _seconds(config: FitConfig, data: FitData, lightning: bool) -> float:
    started = time.perf_counter()
    if lightning:
        train_by_gradient(config, data, [0])
    else:
        _hand_loop(config, data)
    return time.perf_counter() - started


def _hand_loop(config: FitConfig, data: FitData) -> None:
    """Do the same steps and validations with nothing around them."""
    torch.manual_seed(0)
    optimisation = Optimisation(lr=config.training.lr, weight_decay=config.training.weight_decay)
    module = ClassifierModule(
        Classifier(architecture_of(config, data, config.gradient_head)), optimisation, 0
    )
    optimizer = module.configure_optimizers()
    shares = [torch.from_numpy(rows) for rows in (data.shares.train, data.shares.validation)]
    order = torch.Generator().manual_seed(0)
    train = FeatureBatches(data.x, data.y, shares[0], config.training.batch_size, order)
    validation = FeatureBatches(data.x, data.y, shares[1], config.training.batch_size)
    for _ in range(config.training.epochs):
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
