"""Intervals and tests against scipy, statsmodels, and arithmetic."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from llmembed.train.measures import Floats, Labels, summarise
from llmembed.train.reports.significance import (
    FIGURES,
    Answers,
    _ece,
    _macro_f1,
    holm,
    judge,
    mcnemar_p,
    mean_interval,
    paired_t_p,
    randomisation_p,
)

FEW = settings(deadline=None, max_examples=20)


@st.composite
def answers(draw: st.DrawFn, n_runs: int = 2) -> tuple[Labels, list[Floats]]:
    """Labels of 2 to 40 rows, 2 to 5 classes, and probabilities of some classifiers."""
    n, n_classes = draw(st.integers(2, 40)), draw(st.integers(2, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = generator.integers(0, n_classes, n)
    lean = draw(st.floats(0, 3)) * np.eye(n_classes)[labels]
    logits = [generator.normal(size=(n, n_classes)) + lean for _ in range(n_runs)]
    return labels, [np.exp(one) / np.exp(one).sum(axis=1, keepdims=True) for one in logits]


@FEW
@given(answers())
def test_figures_are_those_of_a_run(given_: tuple[Labels, list[Floats]]) -> None:
    """Accuracy with its interval, macro F1, NLL and ECE are what metrics.json says."""
    labels, probas = given_
    names = [str(k) for k in range(probas[0].shape[1])]
    for proba, found in zip(probas, judge(labels, probas), strict=True):
        expected = summarise(np.log(proba), labels, names)
        for figure in FIGURES:
            assert found[figure] == pytest.approx(expected[figure], abs=1e-12)
            low, high = found[f"{figure}_ci95"]
            assert low - 1e-12 <= found[figure] <= high + 1e-12
        assert list(found["accuracy_ci95"]) == expected["accuracy_ci95"]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_the_test_of_accuracies_is_statsmodels_exact_mcnemar(pairs: list[Any]) -> None:
    """The p-value is that of statsmodels' exact test; without a row that differs it is 1."""
    one, other = np.array(pairs).T
    table = [[(a & b).sum() for b in (other, ~other)] for a in (one, ~one)]
    differ = bool((one != other).any())
    expected = mcnemar(table, exact=True).pvalue if differ else 1.0
    assert mcnemar_p(one.astype(float), other.astype(float)) == pytest.approx(expected, rel=1e-9)


@given(
    st.lists(
        st.tuples(st.floats(0, 100, width=32), st.floats(0, 100, width=32)), min_size=2, max_size=60
    )
)
def test_the_test_of_losses_is_scipys_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    """The p-value and the interval are those of scipy.stats.ttest_rel."""
    one, other = np.array(pairs, dtype=np.float64).T
    difference = other - one
    if np.ptp(difference) <= 1e-9 * np.abs(difference).max():
        assert paired_t_p(one, other) in (0.0, pytest.approx(1.0), pytest.approx(0.0, abs=1e-6))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, of little variance
        expected = stats.ttest_rel(other, one)
    assert paired_t_p(one, other) == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-300)
    interval = expected.confidence_interval()
    assert mean_interval(difference) == pytest.approx((interval.low, interval.high), rel=1e-6)


@settings(deadline=None, max_examples=4)  # statsmodels collects garbage each time
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_correction_is_statsmodels_holm(p_values: list[float]) -> None:
    """Corrected p-values are those of statsmodels' multipletests, in the order given."""
    expected = multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(expected.tolist(), rel=1e-9)


@FEW
@given(answers())
def test_the_randomisation_test_is_scipys_permutation_test(
    given_: tuple[Labels, list[Floats]],
) -> None:
    """Of 6 rows or fewer scipy tries every exchange: the drawn p-value agrees within 5 errors."""
    labels, probas = given_
    labels, probas = labels[:6], [proba[:6] for proba in probas]
    names = [str(k) for k in range(probas[0].shape[1])]
    pair = [Answers.of(labels, proba) for proba in probas]
    for figure, function in (("macro_f1", _macro_f1), ("ece", _ece)):

        def difference(rows: Any, others: Any, figure: str = figure) -> float:
            chosen = [
                np.array([probas[int(run)][k] for k, run in enumerate(of)]) for of in (rows, others)
            ]
            one, other = (summarise(np.log(proba), labels, names)[figure] for proba in chosen)
            return round(float(other - one), 10)

        runs = [np.full(len(labels), float(k)) for k in (0, 1)]
        exact = stats.permutation_test(
            runs, difference, permutation_type="samples", n_resamples=np.inf
        ).pvalue
        drawn = randomisation_p(*(one.summands[figure] for one in pair), function)
        deviation = (exact * (1 - exact) / 10_000) ** 0.5
        assert abs(drawn - exact) <= 5 * deviation + 2e-4


def test_an_interval_by_bootstrap_is_scipys() -> None:
    """The deviation over samples is that of scipy.stats.bootstrap, within its own error."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    proba = generator.dirichlet(np.ones(3), 300) / 2 + np.eye(3)[labels] / 2
    (found,) = judge(labels, [proba])

    def of_rows(figure: str) -> Any:
        return lambda rows: summarise(np.log(proba[rows]), labels[rows], "abc")[figure]

    for figure in ("macro_f1", "ece"):
        expected = stats.bootstrap(
            (np.arange(300),),
            of_rows(figure),
            n_resamples=1_000,
            vectorized=False,
            rng=1,
            method="basic",
        ).standard_error
        low, high = found[f"{figure}_ci95"]
        assert (high - low) / 2 / 1.96 == pytest.approx(expected, rel=0.15)


def test_a_run_does_not_differ_from_itself() -> None:
    """Every difference is 0, every interval of it empty, every p 1; of one row, too."""
    generator = np.random.default_rng(0)
    for n in (1, 50):
        proba = generator.dirichlet(np.ones(3), n)
        first, second = judge(generator.integers(0, 3, n), [proba, proba.copy()])
        assert first.pop("against_first") is None
        for test in second.pop("against_first").values():
            assert (test["difference"], test["p"], test["p_holm"]) == (0, 1, 1)
            assert test["ci95"] in (None, (0, 0))
        assert first == second


def test_a_clear_difference_is_found_and_chance_is_not() -> None:
    """Every p of a classifier that knows the labels is small; under the null, few are."""
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 4, 200)
    guesses = [generator.dirichlet(np.ones(4), 200) for _ in range(2)]
    knows = 0.9 * np.eye(4)[labels] + 0.1 * guesses[0]
    _, chance, better = judge(labels, [*guesses, knows])
    for figure in FIGURES:
        assert better["against_first"][figure]["p_holm"] < 0.01
        assert chance["against_first"][figure]["p"] > 0.05


def test_a_certain_error_has_a_finite_loss() -> None:
    """A probability that float64 rounds to 0 gives the largest loss there is, not infinity."""
    (found,) = judge(np.array([0, 1]), [np.array([[1.0, 0.0], [1.0, 0.0]])])
    assert found["nll"] == pytest.approx(744.44 / 2, abs=0.01)
