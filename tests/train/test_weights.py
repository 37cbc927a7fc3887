"""What weights of rows and of classes do to heads, choices, temperatures and the classifier."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from clustered import MakeCache, load
from hypothesis import given, settings
from hypothesis import strategies as st
from number_classifier import NumberClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from torch import Tensor

from llmembed.common.errors import ConfigError, DataError
from llmembed.train import FitConfig
from llmembed.train.config import Training
from llmembed.train.fusions.classifier import Architecture, Classifier, Standardiser
from llmembed.train.gradient.module import ClassifierModule
from llmembed.train.gradient.workspace import checkpoint_folder
from llmembed.train.inputs.data import Batch, proportions
from llmembed.train.inputs.weighing import mean_loss
from llmembed.train.linear.choice import SOLVERS, choose_head
from llmembed.train.linear.closed import Ridge
from llmembed.train.linear.moments import Problem
from llmembed.train.linear.softmax import SoftmaxSolver
from llmembed.train.linear.sweep import Grid, sweep
from llmembed.train.measures.calibration import calibrate, calibrate_trained, fit_temperature

N, WIDTH, N_CLASSES = 60, 6, 3
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5])
COMBINATIONS = [
    ("concat", "ridge"),
    ("concat", "lda"),
    ("concat", "linear"),
    ("concat", "auto"),
    ("concat", "mlp"),
    ("auto", "auto"),
    ("cooc", "auto"),
    ("gated", "auto"),
]
integer_weights = st.lists(st.integers(1, 4), min_size=N, max_size=N).map(
    lambda weights: torch.tensor(weights, dtype=torch.float32)
)


def rows() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Standardised features, classes and three folds of them."""
    generator = np.random.default_rng(0)
    y = np.arange(N) % N_CLASSES
    x = generator.normal(size=(N_CLASSES, WIDTH))[y] + 1.5 * generator.normal(size=(N, WIDTH))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    order = torch.from_numpy(generator.permutation(N))
    folds = [order[first::3] for first in range(3)]
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), folds


def repeated(weights: Tensor, folds: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """List the row that each copy is of, and the copies of each fold."""
    of = torch.arange(N).repeat_interleave(weights.long())
    return of, [torch.flatten(torch.nonzero(torch.isin(of, fold))) for fold in folds]


@pytest.mark.parametrize("head", list(SOLVERS))
@settings(max_examples=6, deadline=None)
@given(weights=integer_weights)
def test_integer_weights_are_copies(head: str, weights: Tensor) -> None:
    """A row of weight w is w copies of it: to the head, to what is held out, to the choice."""
    x, y, folds = rows()
    of, copies = repeated(weights, folds)
    weighed = Problem(x, y, folds, CLASS_WEIGHTS, sample_weights=weights)
    copied = Problem(x[of], y[of], copies, CLASS_WEIGHTS)
    for strength in (0.01, 0.4):
        one, other = (SOLVERS[head](problem).solve(strength) for problem in (weighed, copied))
        # Both softmax regressions end within 1e-6 nats of the same optimum.
        tolerance = 3e-3 if head == "linear" else 1e-5
        torch.testing.assert_close(one.scores(x), other.scores(x), rtol=1e-5, atol=tolerance)
    one_choice, other_choice = (choose_head(problem, [head]) for problem in (weighed, copied))
    assert one_choice.strength == other_choice.strength
    assert one_choice.merit == pytest.approx(other_choice.merit)


@settings(max_examples=4, deadline=None)
@given(weights=integer_weights)
def test_a_sweep_with_integer_weights_is_one_over_copies(weights: Tensor) -> None:
    """Every candidate of fusion auto has the strength and accuracy that copies give it."""
    x, y, folds = rows()
    of, copies = repeated(weights, folds)
    options: dict[str, Any] = {
        "widths": (3, 3),
        "deep": (0, 1),
        "class_weights": torch.ones(N_CLASSES),
        "head": "lda",
    }
    one = sweep(Grid(x=x, y=y, folds=folds, sample_weights=weights, **options))
    other = sweep(Grid(x=x[of], y=y[of], folds=copies, **options))
    assert [c.features for c in one] == [c.features for c in other]
    assert [c.strength for c in one] == [c.strength for c in other]
    assert [c.merit for c in one] == pytest.approx([c.merit for c in other])


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_ridge_is_scikit_learns_with_weights(strength: float) -> None:
    """With weights of rows and classes the scores are those of scikit-learn's Ridge."""
    x, y, folds = rows()
    weights = torch.rand(N, generator=torch.Generator().manual_seed(0)) + 0.1
    problem = Problem(x, y, folds, CLASS_WEIGHTS, sample_weights=weights)
    system = Ridge(problem.moments.total())
    total = (weights * CLASS_WEIGHTS[y]).double().numpy()
    centred = x.double().numpy() - np.average(x.double().numpy(), axis=0, weights=total)
    alpha = strength * np.diag(centred.T @ (total[:, None] * centred)).mean()
    theirs = SklearnRidge(alpha=alpha).fit(x, 2.0 * np.eye(N_CLASSES)[y] - 1, sample_weight=total)
    np.testing.assert_allclose(system.solve(strength).scores(x), theirs.predict(x), atol=1e-4)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_softmax_regression_is_scikit_learns_with_weights(strength: float) -> None:
    """With weights of rows and classes the probabilities are LogisticRegression's."""
    x, y, folds = rows()
    weights = torch.rand(N, generator=torch.Generator().manual_seed(0)) + 0.1
    problem = Problem(x, y, folds, CLASS_WEIGHTS, sample_weights=weights)
    total = (weights * CLASS_WEIGHTS[y]).double().numpy()
    centred = x.double().numpy() - np.average(x.double().numpy(), axis=0, weights=total)
    penalty = strength * np.average(centred**2, axis=0, weights=total).mean()
    theirs = LogisticRegression(C=1 / (penalty * total.sum()), tol=1e-8, max_iter=1000)
    theirs.fit(x.double().numpy(), y.numpy(), sample_weight=total)
    ours = SoftmaxSolver(problem).solve(strength).scores(x).softmax(dim=1)
    np.testing.assert_allclose(ours, theirs.predict_proba(x.double().numpy()), atol=2e-3)


@settings(max_examples=6, deadline=None)
@given(weights=integer_weights)
def test_the_standardisation_counts_weights(weights: Tensor) -> None:
    """Mean and deviation are those of copies."""
    x = rows()[0]
    of, _ = repeated(weights, [])
    one, other = Standardiser.of(x, torch.arange(N), weights), Standardiser.of(x[of], of.argsort())
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.scale, other.scale)


def test_the_loss_of_a_batch_counts_weights() -> None:
    """Loss and gradients of a weighted batch are those of copies, class weights included."""
    x, y, _ = rows()
    weights = torch.arange(N) % 4 + 1.0
    of, _ = repeated(weights, [])
    losses, gradients, logged = [], [], []
    for batch in (Batch(x, y, weights), Batch(x[of], y[of])):
        torch.manual_seed(0)
        architecture = Architecture(
            fusion="concat", head="mlp", widths=(WIDTH,), n_classes=N_CLASSES, dropout=0.0
        )
        module = ClassifierModule(Classifier(architecture), Training(), CLASS_WEIGHTS, 0)
        module.log = lambda name, value, **_: logged.append(value)  # type: ignore[assignment]
        loss = module.loss_of(batch)
        loss.backward()
        losses.append(loss)
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))  # type: ignore[union-attr]
        module.validation_step(batch, 0)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(logged, losses)
    torch.testing.assert_close(*gradients)


def test_a_batch_whose_weights_vanish_has_no_loss() -> None:
    """Weights of zero in a whole batch give a loss of zero, not NaN."""
    assert mean_loss(torch.eye(2), torch.tensor([1, 0]), None, torch.zeros(2)).item() == 0


@pytest.mark.parametrize("find", [calibrate, calibrate_trained, fit_temperature])
def test_temperatures_count_weights(find: Any) -> None:
    """Weights that are alike change nothing, and others count as shares of as many rows."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 400)
    logits = 3 * (np.eye(3)[labels] + generator.normal(size=(400, 3)))
    weights = generator.integers(1, 4, 400).astype(float)
    assert find(logits, labels, np.ones(400)) == find(logits, labels)
    of = np.arange(400).repeat(weights.astype(int))
    weighed, copied = find(logits, labels, weights), find(logits[of], labels[of])
    assert weighed == pytest.approx(copied, rel=0.15)  # twice as many rows are twice as sure
    assert find(logits, labels, 8 * weights) == pytest.approx(weighed, rel=1e-9)
    wrong = logits.argmax(axis=1) != labels
    assert find(logits, labels, np.where(wrong, 9.0, 1.0)) > find(logits, labels)


def test_only_proportions_matter() -> None:
    """Weights are scaled to a mean of 1, and those that are alike are none."""
    scaled = proportions(np.array([2.0, 4.0, 6.0]))
    assert scaled is not None
    assert scaled.tolist() == pytest.approx([0.5, 1.0, 1.5])
    assert proportions(np.full(3, 0.1)) is None


def test_a_checkpoint_belongs_to_its_weights(make_cache: MakeCache) -> None:
    """A fit with other weights does not go on from the checkpoint of one without."""
    config = FitConfig(cache=str(make_cache()))
    data, plan = load(config), config.plan()
    weighed = dataclasses.replace(data, sample_weights=torch.arange(len(data.y)) + 1.0)
    assert checkpoint_folder(plan, weighed, 0, None) != checkpoint_folder(plan, data, 0, None)


def blobs(n: int = 40, n_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    y = np.arange(n) % n_classes
    return generator.normal(size=(n_classes, 8))[y] + generator.normal(size=(n, 8)), y


def make(fusion: str, head: str, **options: Any) -> NumberClassifier:
    if fusion in {"cooc", "gated"} or head == "mlp":
        options |= {"epochs": 3}
    return NumberClassifier("none", 1, fusion=fusion, head=head, accelerator="cpu", **options)


@pytest.mark.parametrize(("fusion", "head"), COMBINATIONS)
def test_equal_weights_change_nothing(fusion: str, head: str) -> None:
    """Equal weights of rows, of any size, or of classes give the same bits as none."""
    x, y = blobs()
    plain = make(fusion, head).fit(x, y).predict_proba(x)
    for weight in (np.ones(40), np.full(40, 0.3), 7):
        weighed = make(fusion, head).fit(x, y, sample_weight=weight).predict_proba(x)
        np.testing.assert_array_equal(plain, weighed)
    by_class = make(fusion, head, class_weight=dict.fromkeys(range(3), 0.3)).fit(x, y)
    np.testing.assert_array_equal(plain, by_class.predict_proba(x))


@pytest.mark.parametrize(("fusion", "head"), COMBINATIONS)
def test_a_weight_of_zero_leaves_a_row_out(fusion: str, head: str) -> None:
    """Rows of weight 0 are as if they were not there, bit for bit; the others may be weighed."""
    x, y = blobs()
    weights = np.where(np.arange(40) % 5 == 0, 0.0, 1.0 + np.arange(40) % 3)
    kept = weights > 0
    one = make(fusion, head).fit(x, y, sample_weight=weights)
    other = make(fusion, head).fit(x[kept], y[kept], sample_weight=weights[kept])
    np.testing.assert_array_equal(one.predict_proba(x), other.predict_proba(x))
    doubled = make(fusion, head).fit(x, y, sample_weight=8 * weights)
    np.testing.assert_array_equal(one.predict_proba(x), doubled.predict_proba(x))


@pytest.mark.parametrize(("fusion", "head"), COMBINATIONS)
def test_heavier_rows_decide(fusion: str, head: str) -> None:
    """Where the features tell nothing, the heavier class is predicted, by rows or by classes."""
    x = np.random.default_rng(0).normal(size=(120, 4))
    y = np.arange(120) % 2
    options: dict[str, Any] = {"lr": 0.01} if fusion in {"cooc", "gated"} or head == "mlp" else {}
    by_row = make(fusion, head, **options).fit(x, y, sample_weight=1 + 19 * y)
    assert by_row.predict(x).mean() > 0.9
    assert by_row.predict_proba(x)[:, 1].mean() > 0.6
    by_class = make(fusion, head, class_weight={1: 20}, **options).fit(x, y)
    assert by_class.predict(x).mean() > 0.9


@pytest.mark.parametrize(
    ("fusion", "head"), [("concat", "lda"), ("auto", "auto"), ("gated", "auto")]
)
def test_balanced_weights_are_a_dict(fusion: str, head: str) -> None:
    """`balanced` is the dict with `n / (C n_c)`, n_c being a sum of sample weights."""
    x, y = blobs()
    y, weights = np.minimum(y, 1), 1.0 + np.arange(40) % 3
    counts = np.bincount(y, weights)
    given = dict(enumerate((counts.sum() / (2 * counts)).tolist()))
    options = {"val_fraction": 0.0} if fusion == "gated" else {}  # else of the training share
    one, other = (
        make(fusion, head, class_weight=class_weight, **options).fit(x, y, sample_weight=weights)
        for class_weight in ("balanced", given)
    )
    np.testing.assert_allclose(one.predict_proba(x), other.predict_proba(x), atol=1e-5)


def test_a_class_without_weight_is_left_out() -> None:
    """A class of weight 0, or whose rows all weigh 0, is no class of the fit."""
    x, y = blobs()
    by_class = make("concat", "lda", class_weight={2: 0}).fit(x, y)
    by_row = make("concat", "lda").fit(x, y, sample_weight=(y != 2).astype(int))
    assert by_class.classes_.tolist() == by_row.classes_.tolist() == [0, 1]
    np.testing.assert_array_equal(by_class.predict_proba(x), by_row.predict_proba(x))
    with pytest.raises(
        DataError, match="y has 1 class, 0, in the 14 texts whose weight is above 0"
    ):
        make("concat", "lda").fit(x, y, sample_weight=(y == 0).astype(int))
    with pytest.raises(DataError, match="y has no class in the 0 texts whose weight is above 0"):
        make("concat", "lda", class_weight=dict.fromkeys(range(3), 0)).fit(x, y)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0] * 3, r"sample_weight has the shape \(3,\), and there are 40 texts"),
        (np.ones((40, 2)), r"sample_weight has the shape \(40, 2\), and there are 40 texts"),
        ([1.0] * 39 + [-2.0], r"sample_weight is -2\.0 in row 39; a weight is a number of 0 or"),
        ([float("nan")] + [1.0] * 39, "sample_weight is nan in row 0"),
        ([1.0, float("inf")] + [1.0] * 38, "sample_weight is inf in row 1"),
        ([0] * 40, "all 40 values of sample_weight are zero, which leaves no row to train on"),
        (["much"] * 40, "sample_weight must be numbers, one a text"),
    ],
)
def test_weights_that_are_refused(weights: Any, message: str) -> None:
    """Weights that are none are refused with the row or the number."""
    with pytest.raises(DataError, match=message):
        make("concat", "lda").fit(*blobs(), sample_weight=weights)


@pytest.mark.parametrize(
    ("class_weight", "message"),
    [
        ("balancd", "class_weight 'balancd' does not exist; did you mean 'balanced'"),
        ([1, 2], r"class_weight \[1, 2\] is neither None, 'balanced', nor a dict"),
        ({"0": 2}, "class_weight has '0', which is no class of y; its classes are 0, 1, 2. Name"),
        ({0: -1}, r"class_weight\[0\] is -1; a weight is a number of 0 or more"),
        ({0: float("nan")}, r"class_weight\[0\] is nan"),
        ({0: float("inf")}, r"class_weight\[0\] is inf"),
        ({0: "much"}, r"class_weight\[0\] is 'much'"),
    ],
)
def test_class_weights_that_are_refused(class_weight: Any, message: str) -> None:
    """Weights of classes that are none, or of no class, are refused."""
    with pytest.raises(ConfigError, match=message):
        make("concat", "lda", class_weight=class_weight).fit(*blobs())


def test_weights_of_more_classes_than_there_are() -> None:
    """A dict that names every class may name others, as in a fold that lacks one."""
    x, y = blobs()
    few = make("concat", "lda", class_weight={0: 1, 1: 2, 2: 3, 9: 4}).fit(x, y)
    exact = make("concat", "lda", class_weight={0: 1, 1: 2, 2: 3}).fit(x, y)
    np.testing.assert_array_equal(few.predict_proba(x), exact.predict_proba(x))
