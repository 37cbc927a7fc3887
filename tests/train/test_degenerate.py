"""Training sets that leave a classifier little to go by: what comes out is finite and sensible."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clustered import MakeCache
from degenerate import TinySet, any_sets, identical, one_row_a_class, separable_sets, two_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmembed.common.errors import ConfigError, DataError, LLMEmbedWarning
from llmembed.train import FitConfig, fit
from llmembed.train.config import SweepConfig
from llmembed.train.fusions import AUTO, FUSIONS, choices
from llmembed.train.fusions.classifier import Standardiser
from llmembed.train.inputs.data import data_in_memory
from llmembed.train.inputs.select import Feature
from llmembed.train.inputs.shares import draw_stratified
from llmembed.train.linear.closed import ABSENT_BIAS, LDA, factorise
from llmembed.train.linear.domain import Domain
from llmembed.train.linear.moments import Moments
from llmembed.train.verbs.fitting import Outcome, train
from llmembed.train.verbs.sweeping import run_sweep

LEARNED_FUSIONS = [name for name in choices(FUSIONS) if FUSIONS[name].learns]
FIXED_FUSIONS = [*(name for name in choices(FUSIONS) if not FUSIONS[name].learns), AUTO]
HEADS = ("ridge", "lda", "linear", "auto")
BY_GRADIENT = [
    *((fusion, head) for fusion in LEARNED_FUSIONS for head in ("linear", "mlp")),
    *((fusion, "mlp") for fusion in FIXED_FUSIONS),
]
TINY = st.one_of(separable_sets(), any_sets())
OPTIONS = st.fixed_dictionaries(
    {
        "class_weight": st.sampled_from(["none", "balanced"]),
        "calibrate": st.sampled_from(["temperature", "none"]),
        "n_seeds": st.sampled_from([1, 2]),
        "seed": st.integers(0, 3),
    }
)
# A few in the suite, and all that another profile asks for: --hypothesis-profile=thousand.
FEW = settings(
    deadline=None, max_examples=8 if settings().max_examples == 100 else settings().max_examples
)


def fit_tiny(tiny: TinySet, **options: Any) -> tuple[Outcome, list[Tensor]]:
    """Fit, and give the probabilities of the training rows by each seed's classifier."""
    n_layers = 1 if options["fusion"] == "single" else tiny.x.shape[1]
    x = torch.from_numpy(tiny.x[:, :n_layers].reshape(len(tiny.y), -1).copy())
    features = [Feature("toy", "mean", layer, tiny.x.shape[2]) for layer in range(n_layers)]
    names = [f"class {k}" for k in range(tiny.n_classes)]
    config = FitConfig(cache="memory", accelerator="cpu", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LLMEmbedWarning)
        plan = config.plan()
        data = data_in_memory(plan.reading, x.clone(), tiny.y, names, features)
        outcome = train(plan, data)
    layers = [feature.layer for feature in outcome.data.features]
    stored = torch.unflatten(x, 1, (n_layers, -1))[:, layers].flatten(1)
    with torch.inference_mode():
        logits = [one.classifier(stored).double() for one in outcome.trained]
    return outcome, [one.softmax(dim=1) for one in logits]


def check(tiny: TinySet, **options: Any) -> None:
    """Probabilities are finite and sum to 1, and those of separable rows are right.

    How far each row lies is told, as a share.
    """
    outcome, probas = fit_tiny(tiny, **options)
    shares = Domain.of(outcome.data, 0).shares_as_far(outcome.data.x)
    assert ((shares > 0) & (shares <= 1)).all()
    for trained, proba in zip(outcome.trained, probas, strict=True):
        assert proba.isfinite().all()
        torch.testing.assert_close(proba.sum(dim=1), torch.ones(len(proba), dtype=torch.float64))
        assert trained.val_loss is None or np.isfinite(trained.val_loss)
        if tiny.is_separable:
            assert proba.argmax(dim=1).tolist() == tiny.y.tolist()


def _can_watch(tiny: TinySet, fraction: float) -> bool:
    rows, generator = np.arange(len(tiny.y)), np.random.default_rng(0)
    return len(draw_stratified(tiny.y, rows, fraction, generator)[1]) > 0


@pytest.mark.parametrize("fusion", FIXED_FUSIONS)
@FEW
@given(tiny=TINY, options=OPTIONS, folds=st.sampled_from([0, 2, 3]), data=st.data())
def test_solved_heads_on_tiny_sets(
    fusion: str, tiny: TinySet, options: dict[str, Any], folds: int, data: st.DataObject
) -> None:
    """Whatever the rows, probabilities are finite and sum to 1; separable rows are right."""
    options |= {"fusion": fusion, "head": data.draw(st.sampled_from(HEADS))}
    if folds > len(tiny.y):
        with pytest.raises(ConfigError, match=f"can't be divided into {folds} folds"):
            fit_tiny(tiny, folds=folds, **options)
    else:
        check(tiny, folds=folds, **options)


@FEW
@given(tiny=TINY, options=OPTIONS, case=st.sampled_from(BY_GRADIENT), data=st.data())
def test_heads_by_gradient_on_tiny_sets(
    tiny: TinySet, options: dict[str, Any], case: tuple[str, str], data: st.DataObject
) -> None:
    """Probabilities are finite and sum to 1; separable rows are right if all are trained on."""
    fusion, head = case
    options |= {"fusion": fusion, "head": head, "epochs": 40, "lr": 0.01}
    options["val_fraction"] = data.draw(st.sampled_from([0, None, 0.4]))
    # One feature has no pairs, and an MLP on nothing adds what dropout leaves of its first weights.
    adds_noise = fusion.startswith("cooc") and head == "mlp" and tiny.x.shape[1] == 1
    if options["val_fraction"] != 0 or adds_noise:
        tiny = dataclasses.replace(tiny, is_separable=False)
    if options["val_fraction"] == 0.4 and not _can_watch(tiny, 0.4):
        with pytest.raises(ConfigError, match=r"a validation share of 0\.4 of \d+ examples is"):
            fit_tiny(tiny, **options)
    else:
        check(tiny, **options)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fusion", FIXED_FUSIONS)
def test_one_text_a_class_is_told_apart(fusion: str, head: str) -> None:
    """Two classes of ten equal texts each: no scatter within them, and all rows are right."""
    outcome, (proba,) = fit_tiny(two_texts(), fusion=fusion, head=head)
    assert proba.argmax(dim=1).tolist() == two_texts().y.tolist()
    assert proba.amax(dim=1).min() > 0.9  # of 20 rows that are right one in 21 may not be
    assert outcome.best.details["held_out_accuracy"] == 1


@pytest.mark.parametrize("counts", [(10, 10), (15, 5), (20, 1), (9, 6, 3)])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fusion", ["concat", "auto"])
def test_equal_texts_have_the_shares_of_their_classes(
    fusion: str, head: str, counts: tuple[int, ...]
) -> None:
    """Where nothing tells the classes apart, the probabilities are about their frequencies."""
    _, (proba,) = fit_tiny(identical(counts), fusion=fusion, head=head)
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    torch.testing.assert_close(proba, shares.expand_as(proba), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("fusion", "head", "n_classes"),
    [
        *((fusion, head, 5) for fusion in FIXED_FUSIONS for head in HEADS),
        ("concat", "lda", 100),
        ("concat", "ridge", 100),
        ("concat", "linear", 2),
    ],
)
def test_one_row_a_class_is_remembered(fusion: str, head: str, n_classes: int) -> None:
    """As many classes as rows: each row is its class, and no accuracy is claimed."""
    tiny = one_row_a_class(n_classes)
    outcome, (proba,) = fit_tiny(tiny, fusion=fusion, head=head)
    assert proba.isfinite().all()
    assert proba.argmax(dim=1).tolist() == tiny.y.tolist()
    assert outcome.best.val_loss is None
    assert outcome.best.details["held_out_accuracy"] is None


def test_a_class_of_one_row_is_not_given_up_for_a_strong_penalty() -> None:
    """Of strengths equal on held-out rows one is taken that knows the row that never is one."""
    x = [
        [1, 0, 0, -0.09918213, 0.8413086],
        [1, 0, 0, 0.54541016, 0.18798828],
        [0, 1, 0, -0.6074219, 0.3305664],
        [0, 0, 1, 0.12683105, 0.4104004],
        [0, 0, 1, -0.89208984, -1.0107422],
    ]
    tiny = TinySet(np.array(x, np.float32)[:, None], np.array([0, 0, 1, 2, 2]), 3, True)
    check(tiny, fusion="concat", head="ridge", folds=2)


def test_a_tie_between_classes_is_not_taken_for_knowing_them() -> None:
    """A strength that leaves a class at a tie, which rounding decides, does not win over others."""
    y = np.repeat([0, 1], [6, 4])
    tiny = TinySet(np.eye(2, dtype=np.float32)[y][:, None], y, 2, True)
    check(tiny, fusion="auto", head="ridge", folds=2)


def test_the_paper_takes_the_extremes_of_float16() -> None:
    """Raw features of 65,504 leave the published recipe finite."""
    x = np.random.default_rng(0).choice([-65_504, 65_504, 6e-8], (20, 5, 4)).astype(np.float32)
    tiny = TinySet(x, np.arange(20) % 2, 2)
    check(tiny, fusion="cooc", preset="paper", sigma=1.0, epochs=2)


def cache_of(make_cache: MakeCache, n_each: int, n_classes: int) -> str:
    """Write a cache of one text a class, each so many times, without a test split."""
    texts = np.random.default_rng(0).normal(size=(2, n_classes, 16))
    classes = np.repeat(np.arange(n_classes), n_each).astype(np.int32)
    split = (texts[:, classes].astype(np.float16), classes)
    return str(make_cache({"train": split}, labels=[f"class {k}" for k in range(n_classes)]))


@pytest.mark.parametrize("head", ["lda", "ridge"])
def test_a_sweep_tells_one_text_a_class_apart(make_cache: MakeCache, head: str) -> None:
    """Every candidate of a sweep over a separable task without scatter has the accuracy 1."""
    cache = cache_of(make_cache, 10, 2)
    table = run_sweep(SweepConfig(cache=cache, head=head, output=f"{cache}-sweep"))
    assert [row["accuracy"] for row in table["candidates"]] == [1.0] * 4


@pytest.mark.filterwarnings("ignore:100 classes have one training example")
@pytest.mark.filterwarnings("ignore:10% of 100 labelled rows is no row")
def test_one_row_a_class_cannot_be_measured(make_cache: MakeCache, tmp_path: Path) -> None:
    """Without a row to hold out a sweep is refused, and a fit says that it has no figures."""
    cache = cache_of(make_cache, 1, 100)
    with pytest.raises(DataError, match="each of the 100 training rows is the only one of its"):
        run_sweep(SweepConfig(cache=cache))
    config = FitConfig(cache=cache, fusion="concat", head="lda", output=str(tmp_path / "r"))
    with pytest.warns(LLMEmbedWarning, match="10% of the 100 training rows is no row that can be"):
        metrics = fit(config).metrics
    assert (metrics["n_eval"], metrics["splits"]["train"]["n"]) == (0, 100)


def test_a_class_without_examples_stays_below_classes_far_apart() -> None:
    """Halfway between two distant classes LDA prefers each to a class that has no example."""
    x = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]])
    moments = Moments(
        gram=x.T @ x,
        class_sums=torch.tensor([[-2.0], [2.0], [0.0]], dtype=torch.float64),
        counts=torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64),
        n=torch.tensor(4.0, dtype=torch.float64),
        row_sums=torch.zeros(1, dtype=torch.float64),
    )
    scores = LDA(moments).solve(0.001).scores(torch.tensor([[0.0], [1.0]]))
    assert (scores.argmax(dim=1) < 2).all()
    assert (scores[:, 2] == ABSENT_BIAS).all()


def test_a_matrix_that_rounding_made_indefinite_is_factorised() -> None:
    """A shift below the error of a Gram matrix is raised to it, and no further."""
    matrix = torch.tensor([[1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]])
    factor = factorise(matrix, torch.tensor(1e-9), matrix.trace())
    expected = matrix.double() + (1e-9 + 2**-19) * torch.eye(2)
    torch.testing.assert_close(factor @ factor.T, expected, rtol=0, atol=1e-12)


def test_a_column_that_was_constant_says_nothing_of_other_rows() -> None:
    """Whatever its value at prediction, a column without spread is 0; so is one of 1e-45."""
    x = torch.tensor([[3.0, 0.0, 0.0], [3.0, 2.0, 1e-45]])
    standardise = Standardiser.of(x, torch.arange(2))
    assert standardise(torch.tensor([[12_860.0, 4.0, 1.0]])).tolist() == [[0.0, 3.0, 0.0]]


@pytest.mark.parametrize("n_each", [1, 15])
@pytest.mark.parametrize("n_texts", [2, 12])
def test_texts_that_repeat_or_are_alone_in_their_class(n_texts: int, n_each: int) -> None:
    """Where no text of a class differs from another, rounding is all that the covariance holds."""
    texts = 50 * np.random.default_rng(0).normal(size=(n_texts, 3, 384)).astype(np.float32)
    y = np.repeat(np.arange(n_texts), n_each)
    tiny = TinySet(texts[y].astype(np.float16).astype(np.float32), y, n_texts)
    check(tiny, fusion="concat", head="lda")
