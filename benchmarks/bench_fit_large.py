"""Features of the size of SST-2 with LLaMA2-7B, 67,349 x 4 x 4,096, made up on the device.

What is timed begins with the features in the device's memory, reading excluded: the sweep of ridge
(10 strengths, 5 folds) over the four layers, one softmax regression on a layer, and ten epochs of
the paper's cooc on five. The softmax's penalty is that of the middle of its grid.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from llmembed.train.config import FitConfig
from llmembed.train.fusions.classifier import Standardiser
from llmembed.train.fusions.paper import COMPRESSED_WIDTH, N_LLM_LAYERS
from llmembed.train.gradient.fit import train_by_gradient
from llmembed.train.inputs.data import FitData
from llmembed.train.inputs.select import Feature
from llmembed.train.inputs.shares import Shares, draw_folds
from llmembed.train.linear.moments import Problem
from llmembed.train.linear.softmax import SoftmaxSolver
from llmembed.train.linear.sweep import Grid

N_LAYERS, N_CLASSES, N_FOLDS, EPOCHS = 4, 2, 5, 10


def measure(device: torch.device, n_rows: int, hidden_size: int) -> dict[str, Any]:
    """Time all three once, after a warm-up on a sixteenth of the rows."""
    for n in (max(64, n_rows // 16), n_rows):
        result = _solve_s(device, n, hidden_size)
        result["paper_s"] = _paper_s(device, n, hidden_size)
    return {"n_rows": n_rows, "hidden_size": hidden_size, "device": _name(device), **result}


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Give what the bars are about."""
    return {
        "67,349 rows, ridge sweep, s": result["ridge_sweep_s"],
        "67,349 rows, softmax, s": result["softmax_s"],
        "67,349 rows, ten epochs of the paper's cooc, s": result["paper_s"],
    }


def _solve_s(device: torch.device, n_rows: int, hidden_size: int) -> dict[str, float]:
    x, y = _rows(device, n_rows, N_LAYERS * hidden_size)
    generator = np.random.default_rng(0)
    folds = draw_folds(y.cpu().numpy(), np.arange(n_rows), N_FOLDS, generator)
    grid = Grid(
        x=x,
        y=y,
        widths=(hidden_size,) * N_LAYERS,
        folds=[torch.from_numpy(fold).to(device) for fold in folds],
        class_weights=torch.ones(N_CLASSES, device=device),
        head="ridge",
    )

    def sweep() -> list[float]:
        return [grid.choose("single", [layer]).accuracy for layer in range(N_LAYERS)]

    def softmax() -> Any:
        one = grid.fuse("single", [0])
        solver = SoftmaxSolver(Problem(one, y, grid.folds, grid.class_weights))
        return solver.solve(SoftmaxSolver.STRENGTHS[len(SoftmaxSolver.STRENGTHS) // 2])

    return {"ridge_sweep_s": _seconds(device, sweep), "softmax_s": _seconds(device, softmax)}


def _paper_s(device: torch.device, n_rows: int, hidden_size: int) -> float:
    config, data = paper_problem(device, n_rows, hidden_size, n_raw=0, epochs=EPOCHS)
    return _seconds(device, lambda: train_by_gradient(config, data, [0]))


def paper_problem(
    device: torch.device, n_rows: int, hidden_size: int, *, n_raw: int, epochs: int
) -> tuple[FitConfig, FitData]:
    """Make up what the paper's preset trains on: five layers, and features that enter raw."""
    config = FitConfig(
        cache="",
        preset="paper",
        sigma=0.1,
        val_fraction=0,
        epochs=epochs,
        calibrate="none",
        accelerator="gpu" if device.type == "cuda" else "cpu",
    )
    features = [Feature("made-up", "mean", k, hidden_size) for k in range(1, N_LLM_LAYERS + 1)]
    features += [Feature(f"raw {k}", "mean", 1, COMPRESSED_WIDTH) for k in range(n_raw)]
    x, y = _rows(device, n_rows, sum(feature.hidden_size for feature in features))
    rows = np.arange(n_rows)
    data = FitData(
        labels=tuple(map(str, range(N_CLASSES))),
        sources={},
        fingerprint=None,
        features=tuple(features),
        shares=Shares(
            train=rows, validation=rows[:0], eval=rows[:0], train_split="train", eval_split="train"
        ),
        standardiser=Standardiser(x.shape[1]),
        x=x,
        y=y,
        x_eval=x[:0],
        y_eval=y[:0],
    )
    return config, data


def _rows(device: torch.device, n_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw standard normal features with class centres a little apart."""
    generator = torch.Generator(device).manual_seed(0)
    y = torch.randint(N_CLASSES, (n_rows,), generator=generator, device=device)
    centres = torch.randn(N_CLASSES, width, generator=generator, device=device) / width**0.5
    x = torch.randn(n_rows, width, generator=generator, device=device)
    return x.add_(centres[y]), y


def _seconds(device: torch.device, call: Callable[[], Any]) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
