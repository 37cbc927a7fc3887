"""Heads that are solved: folds of the training rows choose head and strength, all rows fit it.

No row is set aside: the held-out scores of the folds choose the strength, calibrate the
temperature, and say how well the classifier does on rows that it has not seen, a little better
than it will do, since the choices were made on the same rows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmembed.common.errors import ConfigError
from llmembed.train.config import Method
from llmembed.train.fusions.classifier import Classifier, Trained
from llmembed.train.fusions.heads import LinearHead
from llmembed.train.inputs.data import FitData
from llmembed.train.inputs.shares import draw_folds
from llmembed.train.inputs.weighing import mean_loss, weights_of
from llmembed.train.linear.closed import LinearMap, without_absent
from llmembed.train.linear.ray_moments import RayMoments
from llmembed.train.linear.solvers import Problem, choose_head
from llmembed.train.linear.stack import Member, average, spread
from llmembed.train.linear.sweep import Candidate, Grid, Summed, stack_of, sweep
from llmembed.train.measures.calibration import calibrate


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """A linear head, and what it would have said of each row without having seen it."""

    linear: LinearMap
    head: str
    scores: Tensor
    """float32 `[N, C]`."""
    held_out: Tensor
    """int64 `[n]`, rows that could be held out: those not alone in their class."""
    folds: list[Tensor]
    details: dict[str, Any]


def train_solved(config: Method, data: FitData, seed: int) -> Trained:
    """Solve for one classifier; the seed draws the folds.

    Raises:
        ConfigError: there are fewer training rows than folds.
    """
    started = time.perf_counter()
    device = device_of(config)
    fusion = Classifier(data.architecture(config.fusion, "linear")).eval()
    folds = folds_of(config, data, seed, device)
    weights, own = data.class_weights().to(device), data.sample_weights
    summed = _summed(config, data, folds, weights)
    problem = Problem.of(
        x=fusion.fuse_all(data.x.to(device)),
        y=data.y.to(device),
        folds=folds,
        class_weights=weights,
        moments=summed and summed(config.fusion, range(len(data.features))),
        sample_weights=None if own is None else own.to(device),
    )
    choice = choose_head(problem, config.solved_heads)
    solved = _Solved(
        linear=choice.linear or choice.solver.solve(choice.strength),
        head=choice.head,
        scores=choice.scores,
        held_out=problem.held_out,
        folds=problem.folds,
        details={"strength": choice.strength},
    )
    return _trained(config, data, seed, started, solved)


def train_stack(config: Method, data: FitData, members: Sequence[Member], seed: int) -> Trained:
    """Solve for the members of a stack, and average them; the seed draws the folds.

    The sweep chose the members and their strengths, by the folds of the first seed.
    """
    started = time.perf_counter()
    grid = grid_of(config, data, seed)
    judged = ((member, grid.judge_again(member)) for member in members)
    return _trained(config, data, seed, started, _solve_stack(grid, judged))


@dataclass(frozen=True, kw_only=True)
class Base:
    """A stack that a head trained by gradient completes."""

    linear: LinearMap
    """On standardised features."""
    held_out: Tensor
    """float32 `[N, C]`, logits of the training split by classifiers that had not seen the row."""

    def beneath(self, data: FitData, config: Method) -> FitData:
        """Give the data with the held-out logits, which a head is trained to complete.

        Of rows too few for a validation share they are those of the base itself: a head that sets
        right what bases of fewer rows got wrong, and that nothing stops, would spoil this one.
        """
        is_unwatched = config.val_fraction is None and not len(data.shares.validation)
        logits = self.linear.scores(data.x) if is_unwatched else self.held_out
        return dataclasses.replace(data, base_logits=logits)

    def complete(self, trained: Trained) -> Trained:
        """Put the stack under the head that was trained to complete it."""
        assert trained.classifier.base is not None
        trained.classifier.base.weight.data.copy_(self.linear.weight)
        trained.classifier.base.bias.data.copy_(self.linear.bias)
        return trained


def solve_base(config: Method, data: FitData) -> Base:
    """Solve for a stack on all rows of the training split, for all seeds.

    A validation share that was drawn from it is among them; a validation split is not.
    """
    shares = data.shares
    is_drawn = shares.validation_split is None
    everything = dataclasses.replace(
        shares,
        train=np.concatenate([shares.train, shares.validation]) if is_drawn else shares.train,
        validation=shares.validation[:0],
    )
    grid = grid_of(config, dataclasses.replace(data, shares=everything), config.seed)
    solved = _solve_stack(grid, stack_of(grid, sweep(grid)).items())
    rows = torch.cat(grid.folds)
    held_out = solved.scores.nan_to_num()  # of rows without a label
    if not is_drawn:
        unseen = torch.from_numpy(shares.validation).to(grid.x.device)
        held_out[unseen] = solved.linear.scores(grid.x[unseen]).to(held_out)
    temperature = _calibrated(held_out[rows].cpu(), data, rows.cpu())
    return Base(
        linear=average([solved.linear], [1 / temperature]), held_out=(held_out / temperature).cpu()
    )


def _solve_stack(grid: Grid, judged: Iterable[tuple[Member, Candidate]]) -> _Solved:
    rows, scores = torch.cat(grid.folds), torch.zeros_like(grid.x[:, :1])
    maps, factors = [], []
    for member, candidate in judged:
        scores = scores + member.weight * candidate.scores
        columns = [grid.columns([feature]) for feature in member.features]
        maps.append(spread(candidate.solve(), member.fusion, columns, grid.x.shape[1]))
        factors.append(member.weight / candidate.temperature)
    mean = average(maps, factors)
    counts = torch.bincount(grid.y[rows], minlength=scores.shape[1])
    return _Solved(
        linear=without_absent(mean.weight, mean.bias, counts),
        head=grid.head,
        scores=scores,
        held_out=grid.held_out,
        folds=grid.folds,
        details={"n_members": len(maps)},
    )


def _trained(config: Method, data: FitData, seed: int, started: float, solved: _Solved) -> Trained:
    classifier = Classifier(data.architecture(config.fusion, solved.head)).eval()
    assert isinstance(classifier.head, LinearHead)
    classifier.head.logits.weight.data.copy_(solved.linear.weight)
    classifier.head.logits.bias.data.copy_(solved.linear.bias)
    classifier.standardise.load_state_dict(data.standardiser.state_dict())
    rows, scores = torch.cat(solved.folds).cpu(), solved.scores.cpu()
    if config.calibrate == "temperature":
        classifier.temperature.fill_(_calibrated(scores[rows], data, rows))
    held_out, own = solved.held_out.cpu(), data.sample_weights
    weights = weights_of(data.y, held_out, data.class_weights(), own).double()
    own = None if own is None else own[held_out].double()
    scores, labels = scores[held_out].double(), data.y[held_out]
    loss = mean_loss(scores / classifier.temperature, labels, sample_weights=own).item()
    hits = (scores.argmax(dim=1) == labels).double()
    return Trained(
        seed=seed,
        classifier=classifier,
        val_loss=loss if len(held_out) else None,
        fit_s=time.perf_counter() - started,
        device=str(solved.scores.device),
        details={
            "head": solved.head,
            "n_folds": len(solved.folds),
            **solved.details,
            # Flattering: on these rows strength and members were chosen.
            "held_out_accuracy": (hits @ weights / weights.sum()).item() if len(held_out) else None,
        },
    )


def _calibrated(held_out: Tensor, data: FitData, rows: Tensor) -> float:
    """Find the temperature of held-out scores `[n, C]` of some rows."""
    own = None if data.sample_weights is None else data.sample_weights[rows].numpy()
    return calibrate(held_out.numpy(), data.y[rows].numpy(), own)


def grid_of(config: Method, data: FitData, seed: int) -> Grid:
    """Make the grid of a fit's training rows; the seed draws the folds."""
    device = device_of(config)
    folds = folds_of(config, data, seed, device)
    weights, own = data.class_weights().to(device), data.sample_weights
    return Grid(
        x=data.x.to(device),
        y=data.y.to(device),
        widths=tuple(feature.hidden_size for feature in data.features),
        folds=folds,
        class_weights=weights,
        head=config.head if config.head in {"ridge", "lda"} else "lda",
        summed=_summed(config, data, folds, weights),
        sample_weights=None if own is None else own.to(device),
    )


def _summed(
    config: Method, data: FitData, folds: Sequence[Tensor], weights: Tensor
) -> Summed | None:
    """Have the moments summed on Ray where that is the engine; it is joined by now."""
    return RayMoments(config, data, folds, weights) if config.engine == "ray" else None


def folds_of(config: Method, data: FitData, seed: int, device: torch.device) -> list[Tensor]:
    """Draw the stratified folds of the training rows: by default at most as many as rows."""
    rows = data.shares.train
    if len(rows) < config.folds:
        raise ConfigError(
            f"{len(rows)} training rows can't be divided into {config.folds} folds. Pass a "
            "smaller --folds, or extract more examples."
        )
    generator = np.random.default_rng(seed)
    folds = draw_folds(data.y.numpy(), rows, min(config.n_folds, len(rows)), generator)
    return [torch.from_numpy(fold).to(device) for fold in folds]


def device_of(config: Method) -> torch.device:
    """Use a GPU where there is one and it is not ruled out; MPS has no float64, so never that."""
    wants_gpu = config.accelerator in {"auto", "gpu"} and torch.cuda.is_available()
    return torch.device("cuda", config.device_index) if wants_gpu else torch.device("cpu")
