"""Is this run worse than another on the same rows? Exact, and honest about many comparisons.

Each row of the evaluation split was right or wrong before and is right or wrong now. If nothing
changed, a row that differs is as likely to have become right as wrong, so the sign of each row's
difference is a fair coin: with one seed that is McNemar's exact test (McNemar, 1947), and with
several seeds, where a row differs by up to that many, the exact sign-flip test of Fisher (1935).
The distribution of the sum is a convolution of binomials, so nothing is simulated.

Holm's step-down correction (1979) bounds the chance of one false alarm over all comparisons of a
suite, however they depend on each other. Intervals are percentiles of a seeded bootstrap over rows
(Efron, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

N_RESAMPLES = 10_000
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One fit now and in the baseline, on the same rows and with as many seeds."""

    before: float
    """Accuracy in the baseline, in [0, 1]."""
    now: float
    """Accuracy in this run, in [0, 1]."""
    interval: tuple[float, float]
    """95 % bootstrap interval of `now - before`."""
    p: float
    """Two-sided p-value of the exact sign-flip test, before Holm's correction."""


def compare(before: Ints, now: Ints, n_seeds: int) -> Comparison:
    """Compare the number of seeds that were right, row by row.

    Args:
        before: int64 `[n]`, how many seeds had the row right in the baseline.
        now: int64 `[n]`, how many have it right in this run.
        n_seeds: how many seeds there are.
    """
    differences = now - before
    n = len(before) * n_seeds
    return Comparison(
        before=float(before.sum() / n),
        now=float(now.sum() / n),
        interval=bootstrap_interval(differences, n_seeds),
        p=sign_flip_p(differences),
    )


def sign_flip_p(differences: Ints) -> float:
    """Give the chance that fair coins as signs bring the sum this far from 0, on either side.

    Five rows lost and none gained: 2 * (1/2)^5; one lost and one gained says nothing.

    >>> sign_flip_p(np.array([-1, -1, -1, -1, -1, 0]))
    0.0625
    >>> sign_flip_p(np.array([-1, 1, 0]))
    1.0
    >>> sign_flip_p(np.array([-2, -1]))  # sums -3, -1, 1, 3, each 1/4
    0.5
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    distribution, reach = np.ones(1), 0
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        spread = np.zeros(2 * size * count + 1)
        spread[:: 2 * size] = _binomial_halves(count)
        distribution = np.convolve(distribution, spread)
        reach += size * count
    sums = np.arange(-reach, reach + 1)
    observed = abs(int(differences.sum()))
    return float(min(1.0, distribution[np.abs(sums) >= observed].sum()))


def bootstrap_interval(differences: Ints, n_seeds: int) -> tuple[float, float]:
    """Give the 95 % percentile interval of the mean difference over resampled rows, seeded.

    A resample of rows is a multinomial draw of how often each value of the difference occurs.

    >>> bootstrap_interval(np.zeros(10, dtype=np.int64), 1)
    (0.0, 0.0)
    """
    values, counts = np.unique(differences, return_counts=True)
    n = len(differences)
    draws = np.random.default_rng(0).multinomial(n, counts / n, size=N_RESAMPLES)
    low, high = np.quantile(draws @ values / (n * n_seeds), [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values so that the chance of any false one below alpha is at most alpha.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected, worst = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = worst
    return corrected


def _binomial_halves(n: int) -> npt.NDArray[np.float64]:
    """Give the probabilities of 0..n heads in n throws of a fair coin."""
    return np.array([math.comb(n, k) / 2**n for k in range(n + 1)])
