"""Fits of solved heads: folds of the training rows choose head and strength, all rows fit it.

No row is set aside: the held-out scores of the folds choose the strength, calibrate the
temperature, and say how well the classifier does on rows that it has not seen, a little better
than it will do, since the choices were made on the same rows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmembed.common.errors import ConfigError
from llmembed.common.process import full_float32
from llmembed.train.config import Method
from llmembed.train.fusions import AUTO
from llmembed.train.fusions.classifier import Classifier, Trained
from llmembed.train.fusions.heads import LinearHead
from llmembed.train.inputs import FitData, draw_folds, mean_loss, strata_of, usual_folds
from llmembed.train.inputs.grouping import check_groups
from llmembed.train.linear.choice import Choice, choose_head
from llmembed.train.linear.closed import LDA, LinearMap, without_absent
from llmembed.train.linear.devices import device_of, fits, free_bytes, solving_bytes
from llmembed.train.linear.moments import Problem
from llmembed.train.linear.ray_moments import RayMoments
from llmembed.train.linear.stacking import Member, average, spread
from llmembed.train.linear.sweep import Candidate, Grid, best_of, deeper_half, stack_of, sweep
from llmembed.train.measures import HeldOutRows, calibrate, share_right

_CHUNK_ROWS = 8192
_SHRINKAGE = 0.1
_LESS = 0.75  # of a fold: above that a classifier without the watched rows knows hardly more


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """A linear head, and what it would have said of each row without having seen it."""

    linear: LinearMap
    head: str
    scores: Tensor
    """float32 `[N, C]`."""
    problem: Problem
    details: dict[str, Any]


@full_float32()
def train_solved(method: Method, data: FitData, seed: int) -> Trained:
    """Solve for one classifier; the seed draws the folds.

    Raises:
        ConfigError: there are fewer training rows than folds.
    """
    started = time.perf_counter()
    problem, choice = _choose(method, data, grid_of(method, data, seed))
    solved = _Solved(
        linear=choice.fit(),
        head=choice.head,
        scores=choice.scores,
        problem=problem,
        details={"strength": choice.strength},
    )
    return _trained(method, data, seed, started, solved)


def _choose(method: Method, data: FitData, grid: Grid) -> tuple[Problem, Choice]:
    fusion = Classifier(data.architecture(method.fusion, "linear")).eval()
    problem = grid.problem(method.fusion, range(len(data.features)), fusion.fuse_all(grid.x))
    heads = method.solved_heads
    if data.multilabel:
        heads = tuple(head for head in heads if head != "lda")
    return problem, choose_head(problem, heads)


@full_float32()
def train_stack(
    method: Method, data: FitData, members: Mapping[Member, Candidate], seed: int
) -> Trained:
    """Solve for the members of a stack, and average them; the seed draws the folds.

    The sweep chose the members and their strengths, by the folds of the first seed: what they were
    judged as there holds for that seed, and by the folds of another they are judged again.
    """
    started = time.perf_counter()
    grid = grid_of(method, data, seed)
    judged = (
        (member, judged if seed == method.seed else grid.judge_again(member))
        for member, judged in members.items()
    )
    return _trained(method, data, seed, started, _solve_stack(grid, judged))


@dataclass(frozen=True, kw_only=True)
class Base:
    """A stack that a head trained by gradient completes."""

    linear: LinearMap
    """On standardised features."""
    held_out: Tensor
    """float32 `[N, C]`, logits of the training split by classifiers that had not seen the row."""

    def beneath(self, data: FitData, method: Method) -> FitData:
        """Give the data with the held-out logits, which a head is trained to complete.

        Of rows too few for a validation share they are those of the base itself: a head that sets
        right what bases of fewer rows got wrong, and that nothing stops, would spoil this one.
        """
        is_unwatched = method.val_fraction is None and not len(data.shares.validation)
        logits = self.linear.scores(data.x) if is_unwatched else self.held_out
        return dataclasses.replace(data, base_logits=logits)

    def complete(self, trained: Trained) -> Trained:
        """Put the stack under the head that was trained to complete it."""
        assert trained.classifier.base is not None
        self.linear.fill(trained.classifier.base)
        return trained


@full_float32()
def solve_base(method: Method, data: FitData) -> Base:
    """Solve for a stack on all rows of the training split, for all seeds.

    A validation share that was drawn from it is among them; a validation split is not. That share
    is judged by a stack of all other rows where folds, which hold out more, would say too little.
    """
    shares = data.shares
    is_drawn = shares.validation_split is None
    everything = dataclasses.replace(
        shares,
        train=np.concatenate([shares.train, shares.validation]) if is_drawn else shares.train,
        validation=shares.validation[:0],
    )
    grid = grid_of(method, dataclasses.replace(data, shares=everything), method.seed)
    stack = stack_of(grid)
    solved = _solve_stack(grid, stack.items())
    held_out = solved.scores.nan_to_num()  # of rows without a label
    watched = torch.from_numpy(shares.validation).to(grid.device)
    judge = None if is_drawn else solved.linear
    if is_drawn and _is_less_than_a_fold(grid, watched):
        judge = _solve_without(watched, method, data, grid, stack)
    if judge is not None:
        held_out[watched] = judge.scores(grid.features_of(watched)).to(held_out)
    temperature = grid.temperature(held_out, calibrate)
    return Base(
        linear=average([solved.linear], [1 / temperature]), held_out=(held_out / temperature).cpu()
    )


def _is_less_than_a_fold(grid: Grid, watched: Tensor) -> bool:
    """Tell whether more rows are left without those watched than without a fold, and it matters.

    Of few rows nothing was chosen, and of several labels each was calibrated on the folds.
    """
    largest = max(len(rows) for rows in grid.folds)
    return 0 < len(watched) < _LESS * largest and not (grid.is_few or grid.multilabel)


def _solve_without(
    watched: Tensor,
    method: Method,
    data: FitData,
    grid: Grid,
    stack: Mapping[Member, Candidate],
) -> LinearMap:
    """Solve for a stack on the rows in folds that are not watched: they know it as new texts do."""
    folds = [rows[~torch.isin(rows, watched)] for rows in grid.folds]
    summed = RayMoments(method, data, folds, grid.class_weights) if grid.summed_of else None
    others = dataclasses.replace(grid, folds=folds, summed_of=summed)
    return _mean_of(
        others,
        ((member, others.solve_again(member), one.temperature) for member, one in stack.items()),
    )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What classifiers that have not seen a row's fold say of it, for all training rows."""

    logits: Tensor
    """float32 `[N, C]`, divided by the temperature that they choose."""
    distances: Tensor
    """float32 `[N]`, a dimension's share of the squared Mahalanobis distance to the nearest mean of
    a class, in the features of the fusion, of a stack those of its best member."""
    alone: Tensor
    """int64 `[n]`, rows that are the only ones of their class; their logits are not held out."""
    details: dict[str, Any]


@full_float32()
def judge_held_out(method: Method, data: FitData) -> HeldOut:
    """Score the training rows as a fit of a solved fusion, or of auto, does to choose.

    Raises:
        ConfigError: there are fewer training rows than folds.
    """
    grid = grid_of(method, data, method.seed)
    if method.fusion == AUTO:
        candidates = sweep(grid)
        stack, best = stack_of(grid, candidates), best_of(candidates)
        parts = [member.weight * candidate.scores for member, candidate in stack.items()]
        scores = torch.stack(parts).sum(dim=0)
        fused = grid.fuse(best.fusion, best.features)
        problem = grid.problem(best.fusion, best.features, fused)
        details: dict[str, Any] = {"head": grid.head, "n_members": len(stack)}
    else:
        problem, choice = _choose(method, data, grid)
        scores = choice.scores
        details = {"head": choice.head, "strength": choice.strength}
    temperature = grid.temperature(scores, calibrate)
    (accuracy,) = grid.accuracies(scores[None], grid.held_out)
    details |= {"temperature": temperature, "held_out_accuracy": accuracy}
    return HeldOut(
        logits=scores / temperature,
        distances=_distances(problem),
        alone=grid.alone,
        details=details,
    )


def _distances(problem: Problem) -> Tensor:
    found = problem.class_weights.new_empty(len(problem.y))
    for fold, rows in enumerate(problem.folds):
        lda = LDA(problem.moments.without(fold))
        for chunk in torch.split(rows, _CHUNK_ROWS):
            x = problem.features_of(chunk)
            found[chunk] = lda.distances(x, _SHRINKAGE).to(found) / x.shape[1]
    return found


def _solve_stack(grid: Grid, judged: Iterable[tuple[Member, Candidate]]) -> _Solved:
    scores = grid.class_weights.new_zeros(len(grid.y), 1)
    solved = []
    for member, candidate in judged:
        scores = scores + member.weight * candidate.scores
        solved.append((member, candidate.solve(), candidate.temperature))
    return _Solved(
        linear=_mean_of(grid, solved),
        head=grid.head,
        scores=scores,
        problem=grid,
        details={"n_members": len(solved)},
    )


def _mean_of(grid: Grid, solved: Iterable[tuple[Member, LinearMap, float]]) -> LinearMap:
    """Average what was solved for the members of a stack, each with its temperature."""
    maps, factors = [], []
    for member, linear, temperature in solved:
        columns = [grid.columns([feature]) for feature in member.features]
        maps.append(spread(linear, member.fusion, columns, grid.x.shape[1]))
        factors.append(member.weight / temperature)
    mean = average(maps, factors)
    return mean if grid.multilabel else without_absent(mean.weight, mean.bias, grid.class_counts)


def _trained(method: Method, data: FitData, seed: int, started: float, solved: _Solved) -> Trained:
    """Put a solved head into a classifier, calibrate it, and say how well it does."""
    classifier = Classifier(data.architecture(method.fusion, solved.head)).eval()
    assert isinstance(classifier.head, LinearHead)
    solved.linear.fill(classifier.head.logits)
    classifier.standardise.load_state_dict(data.standardiser.state_dict())
    problem, scores = solved.problem, solved.scores
    if method.calibrate == "temperature":
        classifier.temperature.fill_(problem.temperature(scores, calibrate))
    held_out = problem.held_out
    own = problem.own_weights(held_out)
    logits = scores[held_out].double() / float(classifier.temperature)
    loss = mean_loss(logits, problem.y[held_out], None, None if own is None else own.double())
    proba, y = classifier.proba(logits).cpu().numpy(), problem.y[held_out].cpu().numpy()
    if problem.multilabel:
        assert classifier.thresholds is not None
        classifier.decide_by(
            proba,
            y,
            problem.class_counts.cpu().numpy(),
            threshold=method.threshold,
            weights=None if own is None else own.cpu().numpy(),
        )
        accuracy = share_right(proba, y, classifier.thresholds.double().numpy())
    else:
        (accuracy,) = problem.accuracies(scores[None], held_out)
    return Trained(
        seed=seed,
        classifier=classifier,
        val_loss=loss.item() if len(held_out) else None,
        fit_s=time.perf_counter() - started,
        device=str(scores.device),
        details={
            "head": solved.head,
            "n_folds": len(problem.folds),
            **solved.details,
            # Flattering: on these rows strength and members were chosen.
            "held_out_accuracy": accuracy if len(held_out) else None,
        },
        held_out=HeldOutRows.of(proba, y) if len(held_out) and not problem.multilabel else None,
    )


def grid_of(method: Method, data: FitData, seed: int) -> Grid:
    """Make the grid of a fit's training rows; the seed draws the folds.

    It lies on a GPU where there is one and it is not ruled out; MPS has no float64, so never there.
    Features that have no room on it stay in memory, and go through it in blocks of rows.

    Raises:
        ConfigError: there are fewer training rows than folds, or there is no such device.
    """
    device = device_of(method.accelerator, method.devices)
    device = torch.device("cpu") if device.type == "mps" else device
    folds = [rows.to(device) for rows in folds_of(method, data, seed)]
    weights, own = data.class_weights().to(device), data.sample_weights
    n_bytes = solving_bytes(data.x.shape, len(folds), len(weights))
    return Grid(
        x=data.x.to(device) if fits(n_bytes, free_bytes(device)) else data.x,
        y=data.y.to(device),
        widths=tuple(feature.hidden_size for feature in data.features),
        folds=folds,
        class_weights=weights,
        deep=deeper_half(data.features),
        head=method.head if method.head in {"ridge", "lda"} else _judge_of(data),
        is_softened=method.head == AUTO and not data.multilabel,
        summed_of=RayMoments(method, data, folds, weights) if method.engine == "ray" else None,
        sample_weights=None if own is None else own.to(device),
    )


def _judge_of(data: FitData) -> str:
    """Name the head that judges features where none is asked for."""
    return "ridge" if data.multilabel else "lda"


def folds_of(method: Method, data: FitData, seed: int) -> list[Tensor]:
    """Draw the stratified folds of the training rows: by default as many as usual, or as groups.

    Raises:
        ConfigError: there are fewer training rows, or groups of them, than folds.
        DataError: all are of one group.
    """
    rows, groups = data.shares.train, data.groups
    most, of = len(rows), "training rows"
    if groups is not None:
        most, of = check_groups(groups[rows]), "groups of training rows"
    if most < method.folds:
        raise ConfigError(
            f"{most} {of} can't be divided into {method.folds} folds. Pass a smaller --folds, or "
            "extract more examples."
        )
    n_folds = method.folds or min(usual_folds(len(rows)), most)
    generator = np.random.default_rng(seed)
    strata = strata_of(data.y.numpy(), rows)
    folds = draw_folds(strata, rows, n_folds, generator, groups)
    return [torch.from_numpy(fold) for fold in folds]
