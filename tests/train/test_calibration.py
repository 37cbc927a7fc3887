from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax

from llmembed.train.measures import calibration
from llmembed.train.measures.calibration import (
    calibrate,
    calibrate_labels,
    calibrate_trained,
    fit_temperature,
)
from llmembed.train.measures.metrics import ece


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Mean over the rows and one more, the mean of all, whose label is drawn from all labels."""
    log_proba = log_softmax(logits / temperature, axis=1)
    counted = [*log_proba[np.arange(len(labels)), labels], log_proba[:, labels].mean()]
    return -float(np.mean(counted))


@given(st.integers(2, 5), st.integers(0, 1000), st.floats(0.1, 10))
def test_no_other_temperature_is_better(n_classes: int, seed: int, scale: float) -> None:
    """The temperature is the minimum that a general optimiser finds."""
    generator = np.random.default_rng(seed)
    logits = scale * generator.normal(size=(60, n_classes))
    labels = np.where(generator.random(60) < 0.6, logits.argmax(axis=1), 0)
    ours = nll(logits, labels, fit_temperature(logits, labels))
    theirs = minimize_scalar(
        lambda log_t: nll(logits, labels, np.exp(log_t)), bounds=(-6, 6), method="bounded"
    )
    assert ours <= theirs.fun + 1e-7


def test_scores_that_are_always_right_are_not_taken_for_certain() -> None:
    """Of 3 rows all right, one in 4 counts as chance: 10/12 for the class, 1/12 for the others."""
    for find in (fit_temperature, calibrate):
        temperature = find(np.eye(3), np.arange(3))
        assert softmax(np.eye(3)[0] / temperature) == pytest.approx([10 / 12, 1 / 12, 1 / 12])


def test_scores_that_are_always_wrong_keep_a_finite_temperature() -> None:
    """Where the optimum lies at infinity the temperature stays at its bound."""
    assert fit_temperature(-np.eye(3), np.arange(3)) == pytest.approx(1e3)


def test_large_scores_that_are_always_wrong_become_modest() -> None:
    """The bound of the temperature grows with the scores: a million times as large, as modest."""
    logits = -1e6 * np.eye(3)
    proba = softmax(logits / fit_temperature(logits, np.arange(3)), axis=1)
    assert proba == pytest.approx(np.full((3, 3), 1 / 3), abs=1e-3)


@pytest.mark.parametrize("weigh", [True, False])
@pytest.mark.parametrize("find", [calibrate, calibrate_trained, fit_temperature])
def test_of_very_many_scores_some_rows_tell_the_temperature(
    find: Callable[..., float], weigh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With thousands of classes each k-th row is taken, as many as there is room for."""
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(100, 5)), generator.integers(0, 5, 100)
    weights = generator.random(100) if weigh else None
    some = find(logits[::3], labels[::3], None if weights is None else weights[::3])
    assert find(logits, labels, weights) != some
    monkeypatch.setattr(calibration, "_MOST_LOGITS", 200)
    assert find(logits, labels, weights) == some


def test_equal_scores_have_no_temperature() -> None:
    """Where all temperatures give the same probabilities it is 1."""
    assert fit_temperature(np.ones((4, 2)), np.array([0, 0, 1, 1])) == 1


def test_a_few_confident_errors_do_not_make_all_else_modest() -> None:
    """Beside 2 % of hopeless rows the likeliest temperature doubles the error; Brier's does not."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(5000, 20)) * 3
    labels = np.array([generator.choice(20, p=p) for p in softmax(logits, axis=1)])
    logits[:100, 0], labels[:100] = 40, 1
    found = [ece(softmax(logits / t, axis=1), labels) for t in (calibrate(logits, labels), 1.0)]
    likeliest = ece(softmax(logits / fit_temperature(logits, labels), axis=1), labels)
    assert found[0] < found[1] + 0.01
    assert likeliest > 2 * found[0]


@pytest.mark.parametrize("scale", [0.5, 1.8])
def test_trained_scores_move_from_one_as_far_as_the_rows_know(scale: float) -> None:
    """Twenty rows hardly, 300 part of the way, 30,000 to the temperature that made them."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(30_000, 5)) * 2
    labels = np.array([generator.choice(5, p=p) for p in softmax(logits, axis=1)])
    found = [calibrate_trained(scale * logits[:n], labels[:n]) for n in (20, 300, 30_000)]
    moved = np.abs(np.log(found)) / abs(np.log(scale))
    assert moved[0] < 0.35 < moved[1] < 0.95
    assert found[2] == pytest.approx(scale, rel=0.03)


def test_a_trained_classifier_is_as_likely_as_the_grid_allows() -> None:
    """The temperature has the highest posterior of all that are tried."""
    generator = np.random.default_rng(1)
    logits = 3 * generator.normal(size=(400, 3))
    labels = np.array([generator.choice(3, p=p) for p in softmax(logits / 2, axis=1)])
    grid = np.exp(np.linspace(-1, 1, 81))
    posterior = [400 * nll(logits, labels, t) + (np.log(t) / 0.1) ** 2 / 2 for t in grid]
    assert calibrate_trained(logits, labels) == pytest.approx(grid[np.argmin(posterior)])


def surprise(
    of: np.ndarray, z: np.ndarray, has: np.ndarray, weights: np.ndarray, inverse: float
) -> float:
    """Platt's loss of `scale, offset`, his smoothed labels, and the prior of the scale."""
    scale, offset = of
    each = weights / weights.mean()
    n_yes, n = each @ has, each.sum()
    smoothed = np.where(has, (n_yes + 1) / (n_yes + 2), 1 / (n - n_yes + 2))
    logits = scale * z + offset
    losses = np.logaddexp(0, logits) - smoothed * logits
    return float(each @ losses + (scale / inverse - 1) ** 2 / 2)


@given(st.integers(0, 1000), st.floats(0.1, 10), st.sampled_from([0.0, 0.01, 0.3, 1.0]))
def test_no_other_scale_and_offset_of_a_label_are_better(
    seed: int, scale: float, share: float
) -> None:
    """They are the minimum that a general optimiser finds, rare labels and weights included."""
    generator = np.random.default_rng(seed)
    labels = (generator.random((200, 2)) < [share, 0.5]).astype(np.int64)
    logits = scale * (labels + generator.normal(size=(200, 2)) - 1)
    weights = generator.uniform(0.5, 2, 200)
    inverse = 1 / fit_temperature(logits, labels, weights)
    found = np.stack(calibrate_labels(logits, labels, weights), axis=1)
    for ours, z, has in zip(found, logits.T, labels.T, strict=True):
        given = (z, has, weights, inverse)
        bounds = [(0.1 * inverse, None), (None, None)]
        theirs = minimize(surprise, [inverse, 0.0], given, method="L-BFGS-B", bounds=bounds)
        assert surprise(ours, *given) <= theirs.fun + 1e-4


def test_rare_labels_are_as_probable_as_they_are() -> None:
    """Of scores that all labels share, each label's mean probability becomes its own share."""
    generator = np.random.default_rng(0)
    shares = np.array([0.01, 0.1, 0.5])
    labels = (generator.random((4000, 3)) < shares).astype(np.int64)
    logits = labels + generator.normal(size=(4000, 3))
    scale, offset = calibrate_labels(logits, labels)
    proba = 1 / (1 + np.exp(-(scale * logits + offset)))
    assert proba.mean(axis=0) == pytest.approx(labels.mean(axis=0), rel=0.02)


def test_a_label_keeps_the_order_of_its_texts() -> None:
    """However wrong its held-out scores are, a label's scale stays above 0."""
    labels = np.array([[1], [0]] * 50)
    scale, _ = calibrate_labels(1.0 - 2.0 * labels, labels)
    assert scale > 0
