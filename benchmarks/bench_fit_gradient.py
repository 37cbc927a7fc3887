"""What a step costs: Lightning over a bare loop, and the paper's recipe over its authors' loop.

Both comparisons take the same steps on the same rows in this process, by turns. The authors' loop
is written after their code: a data set that gives one row of five features, a DataLoader that
stacks 1,024 of them, and the published model, here `PaperCooc` and `PaperHead`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llmembed.train.classifier import Classifier
from llmembed.train.config import FitConfig
from llmembed.train.data import FeatureBatches, FitData, architecture_of, load_data
from llmembed.train.gradient import train_by_gradient
from llmembed.train.module import ClassifierModule, Optimisation

_EPOCHS = 3


def measure(config: FitConfig, paper: FitConfig, repeats: int) -> dict[str, Any]:
    """Time both; ratios are medians over interleaved repetitions.

    Args:
        config: a fit by gradient, whose fusion needs no base.
        paper: the paper's preset with its sigma.
        repeats: of each.
    """
    data, of_paper = load_data(config), load_data(paper)
    lightning, hand = _by_turns(
        lambda: train_by_gradient(config, data, [0]), lambda: _hand_loop(config, data), repeats
    )
    ours, theirs = _by_turns(
        lambda: train_by_gradient(paper, of_paper, [0]),
        lambda: _authors_loop(paper, of_paper),
        repeats,
    )
    n_rows = len(of_paper.shares.train) * paper.training.epochs
    return {
        "lightning_s": lightning,
        "hand_loop_s": hand,
        "paper_rows_per_s": [n_rows / seconds for seconds in ours],
        "authors_rows_per_s": [n_rows / seconds for seconds in theirs],
        "load_average": os.getloadavg()[0],
    }


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Give what the bars are about."""

    def ratio(over: str, under: str) -> float:
        return statistics.median(map(float.__truediv__, result[over], result[under]))

    return {
        "Lightning over a bare loop": ratio("lightning_s", "hand_loop_s"),
        "paper's cooc, times its authors' loop": ratio("paper_rows_per_s", "authors_rows_per_s"),
    }


def configs_of(config: FitConfig) -> tuple[FitConfig, FitConfig]:
    """Give both fits on the features of a config, with a few epochs and no early stopping."""
    base: dict[str, Any] = {
        "cache": config.cache,
        "source": config.source,
        "pooling": config.pooling,
    }
    base |= {"epochs": _EPOCHS, "accelerator": "cpu"}
    learned = FitConfig(**base, layers=config.layers, fusion="scalar-mix", patience=_EPOCHS)
    return learned, FitConfig(**base, preset="paper", sigma=0.1, val_fraction=0)


def _by_turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int
) -> tuple[list[float], list[float]]:
    seconds: tuple[list[float], list[float]] = ([], [])
    ours(), theirs()  # warm up
    for _ in range(repeats):
        for call, measured in ((ours, seconds[0]), (theirs, seconds[1])):
            started = time.perf_counter()
            call()
            measured.append(time.perf_counter() - started)
    return seconds


def _hand_loop(config: FitConfig, data: FitData) -> None:
    """Do the same steps and validations with nothing around them, on one thread as the fit does."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    classifier = Classifier(architecture_of(config, data, config.gradient_head))
    optimisation = Optimisation(lr=config.training.lr, weight_decay=config.training.weight_decay)
    module = ClassifierModule(classifier, optimisation, 0)
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
    torch.set_num_threads(n_threads)


class _OneRow(Dataset[tuple[Tensor, Tensor]]):
    """Gives the five features of one example, as the authors' data set does."""

    def __init__(self, data: FitData) -> None:
        rows = torch.from_numpy(data.shares.train)
        self.x = data.x[rows].unflatten(1, (len(data.features), -1))
        self.y = data.y[rows]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row], self.y[row]


def _authors_loop(config: FitConfig, data: FitData) -> None:
    torch.manual_seed(0)
    model = Classifier(architecture_of(config, data, config.gradient_head)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.training.lr)
    loader = DataLoader(_OneRow(data), batch_size=config.training.batch_size, shuffle=True)
    for _ in range(config.training.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model.logits(x.flatten(1)), y).backward()
            optimizer.step()
