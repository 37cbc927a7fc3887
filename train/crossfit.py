"""Heads that are solved: folds of the training rows choose head and strength, all rows fit it.

No row is set aside: the held-out scores of the folds choose the strength, calibrate the
temperature, and say how well the classifier does on rows that it has not seen.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from llmembed.cache_format.errors import ConfigError
from llmembed.train.calibration import fit_temperature
from llmembed.train.classifier import Classifier, Trained
from llmembed.train.closed import LinearMap
from llmembed.train.config import FitConfig
from llmembed.train.data import FitData, architecture_of, class_weights
from llmembed.train.heads import LinearHead
from llmembed.train.shares import draw_folds
from llmembed.train.solvers import Problem, choose_head


def train_solved(config: FitConfig, data: FitData, seed: int) -> Trained:
    """Solve for one classifier; the seed draws the folds.

    Raises:
        ConfigError: there are fewer training rows than folds.
    """
    started = time.perf_counter()
    device = device_of(config)
    fusion = Classifier(architecture_of(config, data, "linear")).eval()
    weights = class_weights(config, data)
    problem = Problem.of(
        x=fusion.fuse_all(data.x.to(device)),
        y=data.y.to(device),
        folds=folds_of(config, data, seed, device),
        class_weights=weights.to(device),
    )
    choice = choose_head(problem, config.solved_heads)
    classifier = Classifier(architecture_of(config, data, choice.head)).eval()
    _set_head(classifier, choice.solver.solve(choice.strength))
    rows = torch.cat(problem.folds)
    held_out, labels = choice.scores[rows].cpu().numpy(), problem.y[rows].cpu().numpy()
    if config.calibrate == "temperature":
        classifier.temperature.fill_(fit_temperature(held_out, labels))
    classifier.standardise.load_state_dict(data.standardiser.state_dict())
    return Trained(
        seed=seed,
        classifier=classifier,
        val_loss=_loss(held_out / float(classifier.temperature), labels),
        fit_s=time.perf_counter() - started,
        device=str(device),
        details={
            "head": choice.head,
            "n_folds": len(problem.folds),
            "strength": choice.strength,
            "held_out_accuracy": choice.accuracy,
        },
    )


def folds_of(config: FitConfig, data: FitData, seed: int, device: torch.device) -> list[Tensor]:
    """Draw the stratified folds of the training rows."""
    rows = data.shares.train
    if len(rows) < config.n_folds:
        raise ConfigError(
            f"{len(rows)} training rows can't be divided into {config.n_folds} folds. Pass a "
            "smaller --folds, or extract more examples."
        )
    generator = np.random.default_rng(seed)
    folds = draw_folds(data.y.numpy(), rows, config.n_folds, generator)
    return [torch.from_numpy(fold).to(device) for fold in folds]


def _set_head(classifier: Classifier, solved: LinearMap) -> None:
    assert isinstance(classifier.head, LinearHead)
    classifier.head.logits.weight.data.copy_(solved.weight)
    classifier.head.logits.bias.data.copy_(solved.bias)


def _loss(scores: np.ndarray, labels: np.ndarray) -> float:
    log_proba = torch.from_numpy(scores).double().log_softmax(dim=1)
    return float(-log_proba[torch.arange(len(labels)), torch.from_numpy(labels)].mean())


def device_of(config: FitConfig) -> torch.device:
    """Use a GPU where there is one and it is not ruled out; MPS has no float64, so never that."""
    wants_gpu = config.accelerator in {"auto", "gpu"} and torch.cuda.is_available()
    return torch.device("cuda", config.device_index) if wants_gpu else torch.device("cpu")
