"""Fits in closed form: folds of the training rows choose the strength, all of them fit the head.

No row is set aside: the held-out scores of the folds choose the strength, calibrate the
temperature, and say how well the classifier does on rows that it has not seen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmembed.cache_format.errors import ConfigError
from llmembed.train.calibration import fit_temperature
from llmembed.train.classifier import Classifier, Trained
from llmembed.train.closed import CLOSED_FORMS, LDA, LinearMap, Ridge, held_out_scores
from llmembed.train.config import FitConfig
from llmembed.train.data import FitData, architecture_of, class_weights
from llmembed.train.gram import FoldMoments
from llmembed.train.heads import LinearHead
from llmembed.train.shares import draw_folds


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The strength that the folds chose."""

    strength: float
    """Strength with the highest held-out accuracy; of equals the strongest."""
    accuracy: float
    """Held-out accuracy, weighted as the fit is."""
    scores: Tensor
    """float32 `[N, C]`, held-out scores."""


def train_solved(config: FitConfig, data: FitData, seed: int) -> Trained:
    """Fit one classifier in closed form; the seed draws the folds.

    Raises:
        ConfigError: there are fewer training rows than folds.
    """
    started = time.perf_counter()
    device = _device(config.accelerator)
    classifier = Classifier(architecture_of(config, data)).eval()
    x, y = classifier.fuse_all(data.x.to(device)), data.y.to(device)
    folds = _folds(config, data, seed, device)
    weights = class_weights(config, data)
    weights = torch.ones(len(data.cache.labels)) if weights is None else weights
    moments = FoldMoments.of(x, y, folds, weights.to(device))
    kind = CLOSED_FORMS[config.head_name]
    choice = choose_strength(kind, moments, x, y, folds, weights.to(device))
    _set_head(classifier, kind(moments.total()).solve(choice.strength))
    rows = torch.cat(folds)
    held_out, labels = choice.scores[rows].cpu().numpy(), y[rows].cpu().numpy()
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
            "n_folds": len(folds),
            "strength": choice.strength,
            "held_out_accuracy": choice.accuracy,
        },
    )


def choose_strength(
    kind: type[Ridge | LDA],
    moments: FoldMoments,
    x: Tensor,
    y: Tensor,
    folds: list[Tensor],
    weights: Tensor,
) -> Choice:
    """Try all strengths on all folds.

    Args:
        kind: what to fit.
        moments: of the same features, classes and folds.
        x: float32 `[N, K]`, features.
        y: int64 `[N]`, classes.
        folds: k tensors int64 `[n]`, the rows of each fold.
        weights: float32 `[C]`, weight of each row of a class.
    """
    scores = held_out_scores(kind, moments, x, folds, kind.STRENGTHS)
    rows = torch.cat(folds)
    hits = (scores[:, rows].argmax(dim=2) == y[rows]).double()
    of_rows = weights[y[rows]].double()
    accuracies = (hits @ of_rows / of_rows.sum()).tolist()
    best = max(range(len(accuracies)), key=lambda k: (accuracies[k], kind.STRENGTHS[k]))
    return Choice(strength=kind.STRENGTHS[best], accuracy=accuracies[best], scores=scores[best])


def _folds(config: FitConfig, data: FitData, seed: int, device: torch.device) -> list[Tensor]:
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


def _device(accelerator: str) -> torch.device:
    """Use a GPU where there is one and it is not ruled out; MPS has no float64, so never that."""
    wants_gpu = accelerator in {"auto", "gpu"} and torch.cuda.is_available()
    return torch.device("cuda" if wants_gpu else "cpu")
