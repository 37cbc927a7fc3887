"""What Lightning costs: a fit through it over a bare loop of the same steps and validations.

Both take the same steps on the same batches in this process, by turns, and must reach the same
validation loss to the last bit. A fit counts from the start of Lightning's `fit` to its end, over
as many epochs as a fit on real features takes until it stops early.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from typing import Any

import torch

from llmembed.train.config import FitConfig
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.gradient.fit import train_by_gradient
from llmembed.train.gradient.module import (
    MIN_IMPROVEMENT,
    VALIDATION_ROWS,
    ClassifierModule,
    Optimisation,
)
from llmembed.train.inputs.data import FeatureBatches, FitData, architecture_of, load_data
from llmembed.train.linear.parallel import one_thread_each

EPOCHS = 20


def measure(config: FitConfig, repeats: int) -> dict[str, Any]:
    """Time both; the ratio is the median over interleaved repetitions.

    Args:
        config: a fit by gradient, whose fusion needs no base, without early stopping.
        repeats: of each.
    """
    data = load_data(config)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        trained = train_by_gradient(config, data, [0])[0]
        started = time.perf_counter()
        reached = _hand_loop(config, data)
        for measured, one in zip(
            seconds, (trained.fit_s, time.perf_counter() - started), strict=True
        ):
            measured.append(one)
        if reached != trained.val_loss:
            raise RuntimeError(f"the loops differ: {reached} against {trained.val_loss}")
    n_steps = config.training.epochs * math.ceil(
        len(data.shares.train) / config.training.batch_size
    )
    return {
        "lightning_s": seconds[0][1:],  # the first is to warm up
        "hand_loop_s": seconds[1][1:],
        "n_steps": n_steps,
        "load_average": os.getloadavg()[0],
    }


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Give what the bar is about."""
    pairs = zip(result["lightning_s"], result["hand_loop_s"], strict=True)
    return {"Lightning over a bare loop": statistics.median(ours / bare for ours, bare in pairs)}


def config_of(config: FitConfig) -> FitConfig:
    """Give a fit by gradient on the features of a config, without early stopping."""
    base: dict[str, Any] = {
        "cache": config.cache,
        "source": config.source,
        "pooling": config.pooling,
    }
    base |= {"epochs": EPOCHS, "patience": EPOCHS, "accelerator": "cpu"}
    return FitConfig(**base, layers=config.layers, fusion="scalar-mix")


def _hand_loop(config: FitConfig, data: FitData) -> float:
    """Do the same with nothing around it, on one thread as the fit does; give the best loss."""
    torch.manual_seed(0)
    classifier = Classifier(architecture_of(config, data, config.gradient_head))
    training = config.training
    optimisation = Optimisation(lr=training.lr, weight_decay=training.weight_decay)
    module = ClassifierModule(classifier, optimisation, 0)
    module.seed_dropout(torch.device("cpu"))
    optimizer = module.configure_optimizers()
    shares = [torch.from_numpy(rows) for rows in (data.shares.train, data.shares.validation)]
    order = torch.Generator().manual_seed(0)
    train = FeatureBatches(data.x, data.y, shares[0], training.batch_size, order)
    validation = FeatureBatches(data.x, data.y, shares[1], VALIDATION_ROWS)
    best = math.inf
    with one_thread_each():
        for _ in range(training.epochs):
            module.train()
            for batch in train:
                optimizer.zero_grad()
                module.loss_of(batch).backward()
                optimizer.step()
            module.average_train_loss()
            module.eval()
            with torch.no_grad():
                for index, batch in enumerate(validation):
                    module.validation_step(batch, index)
            module.on_validation_epoch_end()
            if module.val_loss < best - MIN_IMPROVEMENT:
                best = module.val_loss
    return best
