"""Figures of several classifiers on the same rows: intervals, and tests of their differences.

Accuracy has Wilson's score interval, and McNemar's exact test (1947): binomial, of the rows that
one of the two alone is right about. NLL is a mean over rows: Student's t, and the paired t-test.
Macro F1 and ECE have a normal interval, with the deviation over bootstrap samples of the rows,
and a paired randomisation test, in which each row's two answers change places at random (E. W.
Noreen, 1989; A. Yeh, COLING 2000). All tests are two-sided.

Intervals of a difference are Student's t over the rows for accuracy and NLL, and for the other two
normal, over the same bootstrap samples for both. What is drawn is drawn with a fixed seed. Of
several tests of one figure the p-values are corrected after S. Holm (1979).

Where a text may have several labels, accuracy is that of all its labels together, NLL and ECE are
means over its C decisions, and F1 counts the labels that are given.

Everywhere labels are int64 `[N]`, the index of the true class, or of several labels `[N, C]`, and
probabilities float64 `[N, C]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse, stats

from llmembed.train.measures import Floats, Labels, Sets, wilson_interval
from llmembed.train.measures.metrics import ECE_BINS, Z_95
from llmembed.train.measures.sets import losses_of_rows

FIGURES = {"accuracy": "accuracy", "macro_f1": "macro F1", "nll": "NLL", "ece": "ECE"}
N_SAMPLES, N_SWAPS, SEED = 1_000, 9_999, 0
_BATCH_NUMBERS = 1 << 22
_ROUNDING = 1e-12  # differences nearer than this are the same

Interval = tuple[float, float] | None
Figure = Callable[[Floats, int], Floats]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a classifier says about N rows, as what its figures are made of."""

    of_rows: dict[str, Floats]
    """float64 `[N]` of each figure that is a mean over rows."""
    summands: dict[str, sparse.csr_array]
    """float64 `[N, K]` of each figure that is a function of the K sums over rows."""

    @classmethod
    def of(cls, labels: Labels, proba: Floats) -> Answers:
        """Take the answers apart; a probability of 0 counts as the smallest number above it."""
        n, n_classes = proba.shape
        rows, predicted, confidence = np.arange(n), proba.argmax(axis=1), proba.max(axis=1)
        right = (predicted == labels).astype(np.float64)
        true = np.maximum(proba[rows, labels], np.finfo(np.float64).smallest_subnormal)
        bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        ones = np.ones(n)
        return cls(
            of_rows={"accuracy": right, "nll": 0.0 - np.log(true)},
            summands={
                "macro_f1": sparse.csr_array(
                    (
                        np.concatenate([right, ones, ones]),
                        (
                            np.tile(rows, 3),
                            np.concatenate([labels, n_classes + labels, n_classes + predicted]),
                        ),
                    ),
                    shape=(n, 2 * n_classes),
                ),
                "ece": sparse.csr_array((right - confidence, (rows, bins)), shape=(n, ECE_BINS)),
            },
        )

    @classmethod
    def of_sets(cls, sets: Labels, proba: Floats, given: Sets) -> Answers:
        """Take answers of several labels a text apart; `given` are the `[N, C]` predicted ones."""
        n, n_classes = proba.shape
        confidence, is_yes = np.maximum(proba, 1 - proba), proba > 0.5
        bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        gaps = ((is_yes == (sets > 0)) - confidence) / n_classes
        rows = np.repeat(np.arange(n), n_classes)
        both = np.concatenate([sets * given, sets + given], axis=1).astype(np.float64)
        return cls(
            of_rows={
                "accuracy": (sets == given).all(axis=1).astype(np.float64),
                "nll": losses_of_rows(proba, sets),
            },
            summands={
                "macro_f1": sparse.csr_array(both),
                "ece": sparse.csr_array((gaps.ravel(), (rows, bins.ravel())), shape=(n, ECE_BINS)),
            },
        )


def _macro_f1(sums: Floats, _n: int) -> Floats:
    """From sums `[..., 2 C]`: hits, and rows of the class plus rows that are called it."""
    hits, counts = np.split(sums, 2, axis=-1)
    occurs = counts > 0.5
    f1 = np.where(occurs, 2 * hits / np.where(occurs, counts, 1), 0)
    of_all: Floats = f1.sum(axis=-1) / occurs.sum(axis=-1)
    return of_all


def _ece(sums: Floats, n: int) -> Floats:
    """From sums `[..., 15]`: what each bin is more often right than it says."""
    of_all: Floats = np.abs(sums).sum(axis=-1) / n
    return of_all


_OF_SUMS: dict[str, Figure] = {"macro_f1": _macro_f1, "ece": _ece}


def judge(
    labels: Labels, probas: Sequence[Floats], given: Sequence[Sets] | None = None
) -> list[dict[str, Any]]:
    """Give each classifier's figures with 95 % intervals, and its differences from the first.

    Args:
        labels: of the rows.
        probas: of each classifier.
        given: of several labels a text those that each classifier gives, `[N, C]`.

    Returns:
        For each classifier `{figure: value, figure_ci95: (low, high), ..., "against_first":
        {figure: {"difference", "ci95", "p", "p_holm"}}}`, the last None for the first. An interval
        of a single row is None, and its t-test has p = 1.
    """
    if given is None:
        answers = [Answers.of(labels, proba) for proba in probas]
    else:
        pairs = zip(probas, given, strict=True)
        answers = [Answers.of_sets(labels, proba, own) for proba, own in pairs]
    n = len(labels)
    drawn = {
        name: _bootstrapped([one.summands[name] for one in answers], figure)
        for name, figure in _OF_SUMS.items()
    }
    judged: list[dict[str, Any]] = []
    for k, one in enumerate(answers):
        found: dict[str, Any] = {}
        for name in FIGURES:
            if name in _OF_SUMS:
                value = float(_OF_SUMS[name](one.summands[name].sum(axis=0), n))
                low, high = _normal_interval(value, drawn[name][k])
                interval: Interval = max(0.0, low), min(1.0, high)
            else:
                value = float(one.of_rows[name].mean())
                interval = mean_interval(one.of_rows[name])
                interval = interval and (max(0.0, interval[0]), interval[1])
            found |= {name: value, f"{name}_ci95": interval}
        n_right = int(one.of_rows["accuracy"].sum())
        judged.append({**found, "accuracy_ci95": wilson_interval(n_right, n)})
    first = answers[0]
    for k, (one, found) in enumerate(zip(answers, judged, strict=True)):
        found["against_first"] = {} if k else None
        for name in FIGURES if k else ():
            difference = found[name] - judged[0][name]
            if name in _OF_SUMS:
                interval = _normal_interval(difference, drawn[name][k] - drawn[name][0])
                pair = first.summands[name], one.summands[name]
                p = randomisation_p(*pair, _OF_SUMS[name])
            else:
                interval = mean_interval(one.of_rows[name] - first.of_rows[name])
                test = mcnemar_p if name == "accuracy" else paired_t_p
                p = test(first.of_rows[name], one.of_rows[name])
            found["against_first"][name] = {"difference": difference, "ci95": interval, "p": p}
    for name in FIGURES:
        tests = [found["against_first"][name] for found in judged[1:]]
        for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
            test["p_holm"] = corrected
    return judged


def mcnemar_p(one: Floats, other: Floats) -> float:
    """Test two classifiers that are right or not, 1.0 or 0.0, about each of N rows.

    >>> mcnemar_p(np.array([1.0, 1, 1, 1, 0]), np.array([1.0, 0, 0, 0, 0]))
    0.25
    """
    n_one, n_other = int((one > other).sum()), int((other > one).sum())
    if not n_one + n_other:
        return 1.0
    return float(stats.binomtest(n_one, n_one + n_other).pvalue)


def paired_t_p(one: Floats, other: Floats) -> float:
    """Test whether the mean difference of N pairs is 0; alike in all rows, p is 1.

    >>> round(paired_t_p(np.array([1.0, 2, 4]), np.array([2.0, 4, 5])), 4)
    0.0572
    """
    difference = other - one
    mean, n = float(difference.mean()), len(difference)
    error = _standard_error(difference)
    if not error:
        return 1.0 if n == 1 or not mean else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, n - 1))


def randomisation_p(
    one: sparse.csr_array, other: sparse.csr_array, figure: Figure, *, n_swaps: int = N_SWAPS
) -> float:
    """Test whether a figure of sums differs, by changing rows `[N, K]` between the two at random.

    The observed arrangement counts as one of them, so p is never 0.
    """
    n, change = one.shape[0], other - one
    change = change[np.flatnonzero(np.diff(change.indptr))]  # rows that differ
    sums = one.sum(axis=0), other.sum(axis=0)
    observed = abs(figure(sums[1], n) - figure(sums[0], n)) - _ROUNDING
    generator, n_extreme = np.random.default_rng(SEED), 0
    for size in _batches(n_swaps, change.shape[0]):
        swaps = generator.integers(0, 2, (change.shape[0], size)).astype(np.float64)
        moved = (change.T @ swaps).T  # [size, K]
        differences = figure(sums[1] - moved, n) - figure(sums[0] + moved, n)
        n_extreme += int((np.abs(differences) >= observed).sum())
    return (n_extreme + 1) / (n_swaps + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of several tests, so that one false alarm among all is as rare.

    >>> holm([0.5, 0.01, 0.02])
    [0.5, 0.03, 0.04]
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    ascending = np.asarray(p_values, dtype=np.float64)[order]
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * ascending))
    return [float(value) for value in corrected]


def mean_interval(values: Floats) -> Interval:
    """Give the 95 % interval of a mean, after Student; of one value there is none.

    >>> [round(bound, 3) for bound in mean_interval(np.array([1.0, 2, 3]))]
    [-0.484, 4.484]
    """
    if len(values) < 2:
        return None
    mean, error = float(values.mean()), _standard_error(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def _standard_error(values: Floats) -> float:
    n = len(values)
    return float(values.std(ddof=1)) / n**0.5 if n > 1 else 0.0


def _normal_interval(value: float, drawn: Floats) -> tuple[float, float]:
    half = Z_95 * float(drawn.std(ddof=1))
    return value - half, value + half


def _bootstrapped(summands: Sequence[sparse.csr_array], figure: Figure) -> list[Floats]:
    """Give a figure of each classifier, `[samples]`, on the same samples of the rows."""
    n = summands[0].shape[0]
    generator = np.random.default_rng(SEED)
    drawn: list[list[Floats]] = [[] for _ in summands]
    for size in _batches(N_SAMPLES, n):
        # [n, size]: how often each row is in each sample
        places = generator.integers(0, n, (n, size)) * size + np.arange(size)
        counts = np.bincount(places.ravel(), minlength=n * size).reshape(n, size)
        for one, values in zip(summands, drawn, strict=True):
            values.append(figure((one.T @ counts.astype(np.float64)).T, n))
    return [np.concatenate(values) for values in drawn]


def _batches(total: int, n_rows: int) -> Iterator[int]:
    """Divide repetitions into batches that memory bears."""
    most = max(1, _BATCH_NUMBERS // max(1, n_rows))
    for start in range(0, total, most):
        yield min(most, total - start)
