from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)

from llmembed.train.measures.metrics import ece, summarise, wilson_interval
from llmembed.train.reports.report import note_of_absent


@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 1000))
def test_figures_equal_scikit_learn(n_classes: int, n: int, seed: int) -> None:
    """Accuracy, F1, NLL, per-class figures and confusion are scikit-learn's."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, n_classes, n)
    proba = generator.dirichlet(np.ones(n_classes), n)
    predicted = proba.argmax(axis=1)
    names = [f"c{k}" for k in range(n_classes)]
    figures = summarise(np.log(proba), labels, names)
    assert figures["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert figures["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert figures["micro_f1"] == pytest.approx(f1_score(labels, predicted, average="micro"))
    expected_nll = log_loss(labels, proba, labels=range(n_classes))
    assert figures["nll"] == pytest.approx(expected_nll)
    assert (
        figures["confusion"]
        == confusion_matrix(labels, predicted, labels=range(n_classes)).tolist()
    )
    reference = precision_recall_fscore_support(
        labels, predicted, labels=range(n_classes), zero_division=0
    )
    for k, name in enumerate(names):
        row = figures["per_class"][name]
        assert (row["precision"], row["recall"], row["f1"], row["n"]) == pytest.approx(
            tuple(column[k] for column in reference)
        )


@given(st.integers(1, 500), st.data())
def test_the_interval_holds_the_share(n: int, data: st.DataObject) -> None:
    """Wilson's interval lies in [0, 1] and holds the observed share."""
    n_correct = data.draw(st.integers(0, n))
    low, high = wilson_interval(n_correct, n)
    assert 0 <= low <= n_correct / n + 1e-12
    assert n_correct / n - 1e-12 <= high <= 1


def test_a_calibrated_classifier_has_no_calibration_error() -> None:
    """Right in 3 of 4 cases at a confidence of 0.75 is an ECE of 0."""
    proba = np.tile([0.75, 0.25], (4, 1))
    assert ece(proba, np.array([0, 0, 0, 1])) == pytest.approx(0.0)


def test_a_class_without_an_evaluation_row_is_named() -> None:
    """Macro F1 is over the classes that occur, as scikit-learn's; the others are listed."""
    proba = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]])
    labels = np.array([0, 1, 1])
    figures = summarise(np.log(proba), labels, ["no", "yes", "maybe"])
    assert figures["macro_f1"] == 1 == f1_score(labels, proba.argmax(axis=1), average="macro")
    assert figures["classes_without_rows"] == ["maybe"]
    assert note_of_absent(figures) == "1 of 3 classes has no evaluation row: maybe"
    everything = summarise(np.log(proba), np.array([0, 1, 2]), ["no", "yes", "maybe"])
    assert everything["classes_without_rows"] == []
    assert note_of_absent(everything) == ""
    many = {"classes_without_rows": list("abcdefg"), "per_class": dict.fromkeys("abcdefghi")}
    assert note_of_absent(many) == (
        "7 of 9 classes have no evaluation row: a, b, c, d, e, and 2 more"
    )


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    """One wrong prediction of a class without a row lowers macro F1, as scikit-learn's."""
    proba = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    labels = np.array([0, 1, 1])
    figures = summarise(np.log(proba), labels, ["no", "yes", "maybe"])
    assert figures["macro_f1"] == pytest.approx(5 / 9)
    assert figures["macro_f1"] == pytest.approx(
        f1_score(labels, proba.argmax(axis=1), average="macro", zero_division=0)
    )
