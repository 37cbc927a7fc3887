"""Figures and thresholds of several labels a text, against scikit-learn and the definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    label_ranking_average_precision_score,
    log_loss,
    precision_recall_fscore_support,
)

from llmembed.train.measures import (
    calibrate,
    calibrate_trained,
    decided,
    find_thresholds,
    fit_temperature,
    summarise_sets,
)
from llmembed.train.measures.sets import share_right

NAMES = ("joy", "love", "fear")


def drawn(seed: int, n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something, of a few values so that there are ties, and labels."""
    generator = np.random.default_rng(seed)
    sets = (generator.random((n, 3)) < (0.5, 0.3, 0.1)).astype(np.int8)
    proba = np.clip(0.3 * sets + 0.7 * generator.random((n, 3)), 0.01, 0.99).round(2)
    return proba, sets


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_figures_are_scikit_learns(seed: int) -> None:
    """F1 of all kinds, subset accuracy, ranking precision and loss are scikit-learn's."""
    proba, sets = drawn(seed)
    thresholds = np.array([0.5, 0.4, 0.6])
    found, predicted = summarise_sets(np.log(proba), sets, NAMES, thresholds), proba >= thresholds
    options = {"zero_division": 1.0}
    assert found["accuracy"] == pytest.approx(accuracy_score(sets, predicted))
    for kind in ("micro", "macro", "samples"):
        theirs = f1_score(sets, predicted, average=kind, **options)
        assert found[f"{kind}_f1"] == pytest.approx(theirs)
    theirs = label_ranking_average_precision_score(sets, proba)
    assert found["ranking_precision"] == pytest.approx(theirs)
    losses = [log_loss(sets[:, k], proba[:, k], labels=[0, 1]) for k in range(3)]
    assert found["nll"] == pytest.approx(np.mean(losses))
    rows = precision_recall_fscore_support(sets, predicted, zero_division=0.0)
    for name, *theirs in zip(NAMES, *rows, strict=True):
        own = found["per_class"][name]
        keys = ("precision", "recall", "f1", "n")
        assert [own[key] for key in keys] == pytest.approx(theirs)


def test_a_text_without_labels_of_which_none_is_given_is_right() -> None:
    """Its F1 is 1, and it counts as right."""
    found = summarise_sets(
        np.log(np.full((2, 3), 0.1)), np.zeros((2, 3), int), NAMES, np.full(3, 0.5)
    )
    assert (found["accuracy"], found["samples_f1"], found["micro_f1"]) == (1, 1, 1)
    assert found["classes_without_rows"] == list(NAMES)


def test_without_rows_there_are_no_figures() -> None:
    """Of no rows every figure is None."""
    found = summarise_sets(np.empty((0, 3)), np.empty((0, 3), int), NAMES, np.full(3, 0.5))
    assert found["n_eval"] == 0
    assert found["samples_f1"] is found["accuracy"] is None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_threshold_has_the_best_f1(seed: int) -> None:
    """No other threshold above the label's share of the rows has a better F1 on these rows."""
    proba, sets = drawn(seed)
    thresholds = find_thresholds(proba, sets)
    for k in range(3):
        if sets[:, k].sum() < 10:
            continue
        tried = [one for one in np.unique(proba[:, k]) if one > sets[:, k].mean()]
        given = proba[:, k] >= np.array([*tried, thresholds[k]])[:, None]
        f1 = 2 * (given & (sets[:, k] > 0)).sum(axis=1) / (given.sum(axis=1) + sets[:, k].sum())
        assert f1[-1] >= f1.max() - 1e-9


def test_a_label_of_few_rows_has_the_threshold_of_all() -> None:
    """With nine rows the best threshold is noise: that of all decisions together is taken."""
    proba = np.array([[0.9, 0.3]] * 9 + [[0.2, 0.1]] * 91)
    sets = np.array([[1, 1]] * 9 + [[0, 0]] * 91)
    assert find_thresholds(proba, sets).tolist() == pytest.approx([0.25, 0.25])


def test_a_label_that_features_say_nothing_of_is_not_given_to_all() -> None:
    """The best F1 would give it to every text; its share of the rows is the least threshold."""
    proba, sets = np.full((100, 1), 0.1), np.zeros((100, 1), int)
    sets[:10] = 1
    assert find_thresholds(proba - 0.01, sets).tolist() == [0.1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_weights_of_thresholds_are_copies(seed: int) -> None:
    """A row of weight two counts as two rows."""
    proba, sets = drawn(seed, 60)
    weights = np.random.default_rng(seed).integers(1, 3, 60)
    copied = np.repeat(np.arange(60), weights)
    if (sets.sum(axis=0) < 10).any():
        return
    weighed = find_thresholds(proba, sets, weights.astype(float))
    np.testing.assert_allclose(weighed, find_thresholds(proba[copied], sets[copied]))


@pytest.mark.parametrize("find", [calibrate, calibrate_trained, fit_temperature])
def test_the_temperature_is_that_of_all_decisions(find: object) -> None:
    """Logits that are twice too sure are divided by two, whatever the labels have in common."""
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(4000, 3)) - 1
    sets = (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    assert find(2 * logits, sets) == pytest.approx(2, rel=0.1)  # type: ignore[operator]


def test_shares_of_right_texts() -> None:
    """A text is right where all its decisions are."""
    proba, sets = np.array([[0.6, 0.1], [0.6, 0.6]]), np.array([[1, 0], [1, 0]])
    assert decided(proba, np.full(2, 0.5)).tolist() == [[1, 0], [1, 1]]
    assert share_right(proba, sets, np.full(2, 0.5)) == 0.5
