"""Which features are worth having: single layers, their mean, and concatenations of the best.

One reading of the training split answers all of it. Every feature is judged alone on rows held
out; those that a stack of single features picks first, because they know what the others don't,
form a pool whose Gram matrix is accumulated once, and concatenations grow along it: each is a
leading block of that matrix, and its Cholesky factor one of the pool's.

What a stack is picked from has softmax heads too, on the best single feature and on the pool: of
many classes they know what a covariance that all classes share does not. They take steps where the
others take a factorisation, so they are left out where a step is dear.

Of few rows nothing is chosen: what folds of them prefer is mostly chance. The deeper half of the
layers side by side and LDA, half shrunk in the space of the rows, do better than the layer, the
strength or the stack that they pick, and than all layers (benchmarks/README.md).

The figure of the winner is the best of many on the rows that chose it, so it flatters.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmembed.common.process import full_float32
from llmembed.train.fusions.tricks import map_on_cores
from llmembed.train.inputs import Feature, columns_of
from llmembed.train.linear.choice import Choice, choose_strength, scaled
from llmembed.train.linear.closed import LDA, ClosedSolver, LinearMap, OneVsRestRidge, Ridge
from llmembed.train.linear.moments import FoldMoments, Problem, in_span
from llmembed.train.linear.softmax import SoftmaxSolver
from llmembed.train.linear.stacking import Member, pick
from llmembed.train.measures import fit_temperature, wilson_interval

_KINDS: dict[str, type[Ridge | LDA]] = {"ridge": Ridge, "lda": LDA}
_POOL_WIDTH = 8192  # of the pool's Gram matrix, 256 MiB a fold
_LARGEST_SUBSET = 4
_SOFTMAX_STRENGTHS = SoftmaxSolver.STRENGTHS[::2]
_SOFTMAX_TOLERANCE = 1e-4  # nats; a tenth of it takes half as many steps again
_MOST_PRODUCTS = 1e10  # of a step of a softmax head: some 0.6 s of one core
_FEW_ROWS = 512  # fewer choose nothing
_OF_FEW = 0.5  # strength of LDA then, in units of the variance a dimension that the rows span
_NEIGHBOURS = 1  # strengths tried on either side of the one that suited the best single feature


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A fusion of some features, and how well a linear head does on it."""

    fusion: str  # single, mean or concat
    features: tuple[int, ...]  # positions of its features
    head: str  # ridge, lda or linear
    strength: float  # with the highest held-out accuracy
    # held-out accuracy on the training rows, weighted as the fit is; of several labels a text the
    # loss, less than 0 (`Problem.merits`)
    merit: float
    scores: Tensor = field(repr=False, compare=False)  # float32 `[N, C]`, held-out logits divided
    temperature: float  # by this
    solve: Callable[[], LinearMap] = field(repr=False, compare=False)  # for scores not divided

    def record(
        self, names: Sequence[Feature], n_rows: int, *, multilabel: bool = False
    ) -> dict[str, Any]:
        """Give the row of the table, with the 95 % interval of the accuracy on so many rows."""
        told: dict[str, Any] = {"nll": -self.merit}
        if not multilabel:
            low, high = 0.0, 1.0
            if n_rows:
                low, high = wilson_interval(round(self.merit * n_rows), n_rows)
            told = {"accuracy": self.merit, "accuracy_ci95": [low, high]}
        return {
            "fusion": self.fusion,
            "features": [names[index]._asdict() for index in self.features],
            "strength": self.strength,
            **told,
        }


@dataclass(frozen=True, kw_only=True)
class Grid(Problem):
    """What is swept: rows whose columns are standardised features side by side."""

    widths: tuple[int, ...]  # width of each feature
    head: str  # ridge or lda
    deep: tuple[int, ...]  # features that few rows are judged by
    is_softened: bool = False  # softmax heads are candidates too
    summed_of: Callable[[str, Sequence[int]], FoldMoments] | None = None  # elsewhere, on Ray

    @property
    def kind(self) -> type[Ridge | LDA]:
        """What its head is solved as."""
        return OneVsRestRidge if self.multilabel else _KINDS[self.head]

    def columns(self, features: Sequence[int]) -> Tensor:
        """List the columns of some features, int64 `[c]`."""
        return columns_of(self.widths, features).to(self.x.device)

    def fuse(self, fusion: str, features: Sequence[int]) -> Tensor:
        """Give the fused features of a candidate, float32 `[N, K]`."""
        x = self.x.index_select(1, self.columns(features))
        return x.reshape(len(x), len(features), -1).mean(dim=1) if fusion == "mean" else x

    def problem(self, fusion: str, features: Sequence[int], fused: Tensor) -> Problem:
        """Pose the problem of fused features, float32 `[N, K]`."""
        summed = self.summed_of and functools.partial(self.summed_of, fusion, features)
        own = self.sample_weights
        return Problem(fused, self.y, self.folds, self.class_weights, own, summed)

    def solver(
        self, fusion: str, features: Sequence[int], strengths: tuple[float, ...] | None = None
    ) -> ClosedSolver:
        """Make what solves the problem of a candidate."""
        problem = self.problem(fusion, features, self.fuse(fusion, features))
        return ClosedSolver(self.kind, problem, strengths)

    def solve(self, fusion: str, features: Sequence[int], strength: float) -> LinearMap:
        """Fit all rows in folds."""
        return self.solver(fusion, features).solve(strength)

    def choose(
        self, fusion: str, features: Sequence[int], strengths: tuple[float, ...] | None = None
    ) -> Choice:
        """Judge a candidate by its held-out accuracy."""
        solver = self.solver(fusion, features, strengths)
        return choose_strength(solver.problem, self.head, solver.held_out_parts(), solver.solve)

    def soften(
        self,
        fusion: str,
        features: Sequence[int],
        strengths: tuple[float, ...] = _SOFTMAX_STRENGTHS,
    ) -> Candidate:
        """Judge a softmax head on some features by its held-out accuracy."""
        problem = self.problem(fusion, features, self.fuse(fusion, features))
        solver = SoftmaxSolver(problem, strengths, tolerance=_SOFTMAX_TOLERANCE)
        choice = choose_strength(problem, "linear", solver.held_out_parts(), solver.solve)
        return self.candidate(fusion, features, choice)

    def products(self, features: Sequence[int]) -> int:
        """Count the products of a step of a softmax head on a concatenation, all folds together."""
        width = sum(self.widths[index] for index in features)
        return len(self.x) * width * len(self.class_weights) * len(self.folds)

    def candidate(
        self,
        fusion: str,
        features: Sequence[int],
        choice: Choice,
        solve: Callable[[], LinearMap] | None = None,
    ) -> Candidate:
        """Describe what was judged; without `solve` the choice fits all rows."""
        temperature = self.temperature(choice.scores, fit_temperature)
        return Candidate(
            fusion=fusion,
            features=tuple(features),
            head=choice.head,
            strength=choice.strength,
            merit=choice.merit,
            scores=choice.scores / temperature,
            temperature=temperature,
            solve=solve or choice.fit,
        )

    @property
    def is_few(self) -> bool:
        """Whether there are too few rows to choose by, and fewer than columns."""
        few = are_few(len(self.taking_part), sum(self.widths))
        return few and self.head == "lda" and self.summed_of is None

    def of_few(self) -> Candidate:
        """Judge the deep features side by side at the strength for few rows."""
        fused = self.fuse("concat", self.deep)
        problem, basis = in_span(self.problem("concat", self.deep, fused))
        solver = ClosedSolver(LDA, problem, (_OF_FEW,))
        choice = choose_strength(problem, self.head, solver.held_out_parts(), solver.solve)

        def solve() -> LinearMap:
            found = choice.fit()
            return LinearMap(weight=found.weight @ basis.T.to(found.weight), bias=found.bias)

        return self.candidate("concat", self.deep, choice, solve)

    def judge_again(self, member: Member) -> Candidate:
        """Judge a member of a stack with its strength, on these folds."""
        if self.is_few:
            return self.of_few()
        strengths = (member.strength,)
        if member.head == "linear":
            return self.soften(member.fusion, member.features, strengths)
        choice = self.choose(member.fusion, member.features, strengths)
        return self.candidate(member.fusion, member.features, choice)

    def solve_again(self, member: Member) -> LinearMap:
        """Fit a member of a stack, with its strength, to the rows in these folds."""
        fusion, features, strength = member.fusion, member.features, member.strength
        if member.head != "linear":
            return self.solve(fusion, features, strength)
        problem = self.problem(fusion, features, self.fuse(fusion, features))
        return SoftmaxSolver(problem, tolerance=_SOFTMAX_TOLERANCE).solve(strength)

    def pick(self, scores: Sequence[Tensor]) -> dict[int, float]:
        """Pick the members of a stack by their held-out scores, float32 `[N, C]` each."""
        rows = self.taking_part
        held_out = [one[rows] for one in scores]
        return pick(held_out, self.y[rows], self.class_weights, self.own_weights(rows))


def deeper_half(features: Sequence[Feature]) -> tuple[int, ...]:
    """List the features of the deeper half of each source's layers, of one layer that.

    >>> deeper_half([Feature("llm", "mean", layer, 8) for layer in (8, 16, 24)])
    (1, 2)
    """
    deepest: dict[str, int] = {}
    for one in features:
        deepest[one.source] = max(one.layer, deepest.get(one.source, 0))
    return tuple(k for k, one in enumerate(features) if 2 * one.layer >= deepest[one.source])


def are_few(n_rows: int, n_columns: int) -> bool:
    """Say whether there are too few training rows to choose by.

    >>> are_few(160, 2688), are_few(160, 64), are_few(600, 2688)
    (True, False, False)
    """
    return n_rows < min(_FEW_ROWS, n_columns)


@full_float32()
def sweep(grid: Grid) -> list[Candidate]:
    """Judge every single feature, then the mean of all, then concatenations of the best."""

    def judged(
        fusion: str, features: Sequence[int], strengths: tuple[float, ...] | None = None
    ) -> Candidate:
        choice = grid.choose(fusion, features, strengths)
        if strengths is not None and choice.strength in _open_ends(grid.kind.STRENGTHS, strengths):
            choice = grid.choose(fusion, features)
        strength, by_label = choice.strength, choice.by_label

        # The moments are summed again where the stack takes it, so that none are kept.
        def solve() -> LinearMap:
            return scaled(grid.solve(fusion, features, strength), by_label)

        return grid.candidate(fusion, features, choice, solve)

    every = range(len(grid.widths))
    first, near = [judged("single", [0])] if grid.multilabel else [], None
    if grid.multilabel:  # losses are smooth along the strengths, as accuracies are not
        near = _near(grid.kind.STRENGTHS, first[0].strength)
    others = every[len(first) :]
    of_others = map_on_cores(lambda index: judged("single", [index], near), others, grid.device)
    found = [*first, *of_others]
    pool, strength = _pool(grid, found), best_of(found).strength
    if len(every) > 1 and len(set(grid.widths)) == 1:
        found.append(judged("mean", every, near))
    return [*found, *_grow(grid, pool, strength), *_soften(grid, found, pool)]


def stack_of(grid: Grid, candidates: Sequence[Candidate] | None = None) -> dict[Member, Candidate]:
    """Pick the stack with the lowest held-out loss: its members, and what each was judged as.

    Without candidates they are swept, where there are rows enough to choose by.
    """
    if grid.is_few:
        candidates, shares = [grid.of_few()], {0: 1.0}
    else:
        candidates = sweep(grid) if candidates is None else candidates
        shares = grid.pick([one.scores for one in candidates])
    return {
        Member(
            fusion=candidates[index].fusion,
            features=candidates[index].features,
            head=candidates[index].head,
            strength=candidates[index].strength,
            weight=share,
        ): candidates[index]
        for index, share in shares.items()
    }


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """Pick the highest held-out accuracy; of equals, the one with the fewest features."""
    return max(candidates, key=lambda one: (one.merit, -len(one.features)))


def _pool(grid: Grid, singles: Sequence[Candidate]) -> list[int]:
    """List the features that a stack picks first, then the best others, as far as they fit."""
    picked = grid.pick([one.scores for one in singles])
    others = sorted(range(len(singles)), key=lambda index: -singles[index].merit)
    pool: list[int] = []
    for index in dict.fromkeys([*picked, *others]):
        width = sum(grid.widths[k] for k in (*pool, index))
        if len(pool) < _LARGEST_SUBSET and (width <= _POOL_WIDTH or len(pool) < 2):
            pool.append(index)
    return pool


def _grow(grid: Grid, pool: Sequence[int], strength: float) -> Iterator[Candidate]:
    """Judge the concatenations of the first two of the pool, the first three, and so on."""
    if len(pool) < 2:
        return
    solver = grid.solver("concat", pool, _near(grid.kind.STRENGTHS, strength))
    ends = [*itertools.accumulate(grid.widths[k] for k in pool)][1:]
    for n, (width, path) in enumerate(zip(ends, solver.held_out_of(ends), strict=True), start=2):
        solve = functools.partial(solver.solve, width=width)
        choice = choose_strength(solver.problem, grid.head, [path], solve)
        yield grid.candidate("concat", pool[:n], choice)


def _soften(grid: Grid, found: Sequence[Candidate], pool: Sequence[int]) -> Iterator[Candidate]:
    """Judge softmax heads on the best single feature, and on as much of the pool as is not dear."""
    if not grid.is_softened:
        return
    features = best_of([one for one in found if one.fusion == "single"]).features
    if grid.products(features) > _MOST_PRODUCTS:
        return
    single = grid.soften("single", features)
    yield single
    n = sum(grid.products(pool[:n]) <= _MOST_PRODUCTS for n in range(1, len(pool) + 1))
    if n > 1:
        near = _SOFTMAX_STRENGTHS.index(single.strength)
        yield grid.soften("concat", pool[:n], _SOFTMAX_STRENGTHS[near : near + 2])


def _near(strengths: tuple[float, ...], strength: float) -> tuple[float, ...]:
    """List the strengths around one: wider features want it or a stronger one.

    >>> _near((0.1, 0.2, 0.3, 0.4, 0.5), 0.2)
    (0.1, 0.2, 0.3, 0.4)
    """
    index = strengths.index(strength)
    return strengths[max(0, index - _NEIGHBOURS) : index + 2 * _NEIGHBOURS + 1]


def _open_ends(strengths: tuple[float, ...], tried: tuple[float, ...]) -> set[float]:
    """List the ends of consecutive strengths beyond which there are others.

    >>> _open_ends((0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3))
    {0.3}
    """
    return {tried[0], tried[-1]} - {strengths[0], strengths[-1]}
