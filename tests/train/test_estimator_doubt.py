"""What a fitted `LLMEmbedClassifier` may be trusted with: as a run of the same texts tells it."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from toy_model import save_toy_model, toy_texts

from llmembed.common.errors import ConfigError, LLMEmbedWarning
from llmembed.extract import ExtractConfig, extract
from llmembed.train import FitConfig, LLMEmbedClassifier, fit
from llmembed.train.measures import HeldOutRows

N_TRAINED = 150
NAMES = np.array(["cocoa", "grain", "trade"])
CODES = np.arange(N_TRAINED + 60) % 3
TEXTS = [f"w{1 + code} {text}" for code, text in zip(CODES, toy_texts(len(CODES)), strict=True)]
CLASSES = NAMES[np.where(np.arange(len(CODES)) % 9 == 0, (CODES + 1) % 3, CODES)]
"""Every ninth is wrong."""
TRAINED, NEW = TEXTS[:N_TRAINED], TEXTS[N_TRAINED:]
OPTIONS: dict[str, Any] = {"max_length": 64, "device": "cpu", "accelerator": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_toy_model(tmp_path_factory.mktemp("doubt") / "toy"))


def unfitted(model: str, **options: Any) -> LLMEmbedClassifier:
    return LLMEmbedClassifier(
        model, "1,2", **{"fusion": "concat", "head": "lda"} | options, **OPTIONS
    )


@pytest.fixture(scope="module")
def once(model: str) -> LLMEmbedClassifier:
    return unfitted(model).fit(TRAINED, CLASSES[:N_TRAINED])


@pytest.fixture
def fitted(once: LLMEmbedClassifier) -> LLMEmbedClassifier:
    """A fitted classifier that a test may change."""
    again: LLMEmbedClassifier = pickle.loads(pickle.dumps(once))  # noqa: S301 - our own
    return again


@pytest.mark.parametrize(
    "options", [{}, {"fusion": "auto"}, {"fusion": "cooc", "val_fraction": 0.5, "epochs": 2}]
)
def test_doubts_are_those_of_a_run(model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    """Thresholds, sets, answers and how far texts lie: from the same texts, what `Run` gives."""
    (tmp_path / "texts").mkdir()
    for split, rows in (("train", slice(N_TRAINED)), ("test", slice(N_TRAINED, None))):
        with (tmp_path / f"texts/{split}.csv").open("w", newline="", encoding="utf-8") as file:
            pairs = zip(TEXTS[rows], CLASSES[rows], strict=True)
            csv.writer(file).writerows([("text", "label"), *pairs])
    options = {"fusion": "concat", "head": "lda"} | options
    if options["fusion"] != "concat":
        options["head"] = "auto"
    config = ExtractConfig(
        model=model,
        layers="1,2",
        dataset=str(tmp_path / "texts"),
        cache=str(tmp_path / "texts.zarr"),
        max_length=64,
        device="cpu",
    )
    extract(config)
    where = {"cache": config.cache, "output": str(tmp_path / "run"), "accelerator": "cpu"}
    run = fit(FitConfig(**where, baseline="none", **options))  # type: ignore[arg-type]
    ours = unfitted(model, **options).fit(TRAINED, CLASSES[:N_TRAINED])
    proba = run.predict_proba(NEW, "cpu")
    np.testing.assert_allclose(ours.predict_proba(NEW), proba, atol=1e-3)
    for by_class in (False, True):
        sets = ours.label_sets(NEW, 0.8, by_class=by_class)
        assert (sets.dtype, sets.shape) == (np.dtype(bool), (60, 3))
        named = [set(ours.classes_[row]) for row in sets]
        assert named == [set(one) for one in run.label_sets(proba, 0.8, by_class=by_class)]
    assert ours.abstain_below(0.6) == pytest.approx(run.abstain_below(0.6), abs=1e-3)
    answers = ours.predict(NEW, abstain=0.6, unknown="other").tolist()
    assert answers == run.predict(NEW, "cpu", abstain=0.6, unknown="other")
    far, one_row = ours.out_of_domain(NEW), 1 / (N_TRAINED + 1)
    assert (far.dtype, far.shape) == (np.dtype(np.float64), (60,))
    np.testing.assert_allclose(far, run.out_of_domain(NEW, "cpu"), atol=2.5 * one_row)


@pytest.mark.parametrize("share", [np.float32(0.5), np.float64(0.5), np.float16(0.5)])
def test_shares_may_be_numbers_of_numpy(fitted: LLMEmbedClassifier, share: Any) -> None:
    """They promise what a plain number does."""
    sets = fitted.label_sets(NEW, share)
    np.testing.assert_array_equal(sets, fitted.label_sets(NEW, 0.5))
    assert fitted.abstain_below(share) == fitted.abstain_below(0.5)


@pytest.mark.parametrize(
    ("share", "told"), [("0.95", "'0.95'"), ([0.9], r"\[0\.9\]"), (1, "1"), (float("nan"), "nan")]
)
def test_what_is_no_share_is_refused(fitted: LLMEmbedClassifier, share: Any, told: str) -> None:
    """With the value, by predictions and sets alike."""
    with pytest.raises(
        ConfigError, match=rf"^abstain is {told}, and the share of .* between 0 and"
    ):
        fitted.predict(NEW, abstain=share)
    with pytest.raises(
        ConfigError, match=rf"^coverage is {told}, and the share of .* between 0 an"
    ):
        fitted.label_sets(NEW, share)


def test_most_texts_of_another_kind_lie_far(fitted: LLMEmbedClassifier) -> None:
    """Of texts like those of the training few do."""
    assert np.median(fitted.out_of_domain(NEW)) > 0.2
    assert np.median(fitted.out_of_domain(["w30 w31 w32 w33 w34 w35"] * 2)) < 0.1


def known(fitted: LLMEmbedClassifier) -> LLMEmbedClassifier:
    """Give it held-out rows by which half of the new texts are answered."""
    middle = float(np.median(fitted.predict_proba(NEW).max(axis=1)))
    sure, unsure = np.array([[middle, 1 - middle, 0]] * 50), np.array([[0.5, 0.4, 0.1]] * 50)
    labels = np.repeat([0, 1], 50)
    fitted.held_out_ = HeldOutRows.of(np.concatenate([sure, unsure]), labels)
    return fitted


@pytest.mark.parametrize(
    ("classes", "unknown", "kind"),
    [
        (NAMES, "a long name of what is unknown", "U"),
        (NAMES, None, "O"),
        (np.array([30, 40, 50]), -1, "i"),
        (np.array([30, 40, 50]), "other", "O"),
        (np.array([30, 40, 50], dtype=np.int8), -1000, "i"),
    ],
)
def test_what_is_not_answered_is_unknown(
    fitted: LLMEmbedClassifier, classes: Any, unknown: Any, kind: str
) -> None:
    """Others keep their class, and its type where what is unknown is of that kind."""
    known(fitted).classes_ = classes
    named = fitted.predict(NEW)
    refused = fitted.predict_proba(NEW).max(axis=1) < fitted.abstain_below(0.9)
    assert 0 < refused.sum() < len(NEW)
    found = fitted.predict(NEW, abstain=0.9, unknown=unknown)
    assert found.dtype.kind == kind
    assert found[refused].tolist() == [unknown] * int(refused.sum())
    assert found[~refused].tolist() == named[~refused].tolist()


def test_a_pipeline_passes_it_on(fitted: LLMEmbedClassifier) -> None:
    """As scikit-learn's own `predict(X, return_std=True)`, in a pipeline too."""
    pipeline = make_pipeline(FunctionTransformer(), known(fitted))
    options = {"abstain": 0.9, "unknown": "other"}
    expected = fitted.predict(NEW, **options)
    assert "other" in expected
    np.testing.assert_array_equal(pipeline.predict(NEW, **options), expected)


def test_no_text_gets_no_doubt(fitted: LLMEmbedClassifier) -> None:
    """Of no texts there are no sets, no shares and no answers."""
    assert fitted.label_sets([]).shape == (0, 3)
    assert fitted.out_of_domain([]).shape == fitted.predict([], abstain=0.5).shape == (0,)


def test_doubts_are_kept(fitted: LLMEmbedClassifier, tmp_path: Path) -> None:
    """Pickled, or written by skops, a classifier doubts as before."""
    skops.io.dump(fitted, tmp_path / "file.skops")
    trusted = skops.io.get_untrusted_types(file=tmp_path / "file.skops")
    assert len(trusted) == 2
    for again in (
        pickle.loads(pickle.dumps(fitted)),  # noqa: S301 - our own
        skops.io.load(tmp_path / "file.skops", trusted=trusted),
    ):
        np.testing.assert_array_equal(again.label_sets(NEW, 0.7), fitted.label_sets(NEW, 0.7))
        np.testing.assert_array_equal(again.out_of_domain(NEW), fitted.out_of_domain(NEW))
        assert again.abstain_below(0.5) == fitted.abstain_below(0.5)


ASKED: dict[str, Any] = {
    "abstain": lambda one: one.predict(NEW, abstain=0.9),
    "accuracy": lambda one: one.abstain_below(0.9),
    "coverage": lambda one: one.label_sets(NEW),
    "out_of_domain": lambda one: one.out_of_domain(NEW),
}


@pytest.mark.parametrize("what", ASKED)
def test_only_what_is_fitted_doubts(model: str, what: str) -> None:
    """Before it is scikit-learn's own error."""
    with pytest.raises(NotFittedError):
        ASKED[what](unfitted(model))


def test_doubts_are_for_one_label_a_text(model: str) -> None:
    """Fitted on several, it says so, and what tells how sure it is."""
    several = unfitted(model, head="ridge").fit(TRAINED, np.eye(3, dtype=int)[CODES[:N_TRAINED]])
    for what, ask in ASKED.items():
        option = "abstain" if what == "accuracy" else what
        with pytest.raises(
            ConfigError, match=f"^{option} is for classifiers of texts with one lab"
        ):
            ask(several)
    assert several.held_out_ is several.domain_ is None
    pickle.loads(pickle.dumps(several)).predict(NEW)  # noqa: S301 - our own


def test_without_held_out_texts_nothing_is_promised(model: str) -> None:
    """With no share to watch there are none; how far a text lies is told all the same."""
    options = {"fusion": "cooc", "head": "auto", "val_fraction": 0, "epochs": 1}
    bare = unfitted(model, **options).fit(TRAINED, CLASSES[:N_TRAINED])
    for option in ("abstain", "coverage"):
        with pytest.raises(
            ConfigError, match=f"no held-out rows, which {option} needs: it was fit"
        ):
            ASKED[option](bare)
    assert (bare.out_of_domain(NEW) > 0).all()


def test_a_classifier_of_an_earlier_version_says_so(fitted: LLMEmbedClassifier) -> None:
    """What it did not keep is missed in a sentence; all else is as it was."""
    state = fitted.__getstate__()
    for name in ("held_out_", "domain_", "_watches"):
        del state[name]
    old = LLMEmbedClassifier.__new__(LLMEmbedClassifier)
    old.__setstate__(state)
    np.testing.assert_array_equal(old.predict_proba(NEW), fitted.predict_proba(NEW))
    with pytest.raises(ConfigError, match="fitted by an earlier version and does not keep what"):
        old.out_of_domain(NEW)
    with pytest.raises(ConfigError, match=r"or by an earlier version\. Fit again"):
        old.label_sets(NEW)


def test_a_share_that_is_out_of_reach_is_refused(fitted: LLMEmbedClassifier) -> None:
    """With what is reached, and of a classifier that held a part out, what holds out all."""
    fitted.held_out_ = HeldOutRows.of(np.array([[0.9, 0.1, 0]] * 40), np.zeros(40, dtype=int))
    more = "Pass a smaller share, or fit on more texts"
    for watches, way in ((False, r"\."), (True, ", or with fusion='auto', which holds every text")):
        fitted._watches = watches
        told = (
            rf"abstain 0\.96 is more than this classifier reaches: .* show 0\.95 at most.* {more}"
        )
        with pytest.raises(ConfigError, match=told + way):
            fitted.predict(NEW, abstain=0.96)
        told = rf"coverage 0\.98 takes 49 held-out rows, and this classifier keeps fewer.* {more}"
        with pytest.raises(ConfigError, match=told + way):
            fitted.label_sets(NEW, 0.98)
    for share in (0, 1, float("nan")):
        with pytest.raises(ConfigError, match=f"abstain is {share}, and the share of answers"):
            fitted.abstain_below(share)
        with pytest.raises(ConfigError, match=f"coverage is {share}, and the share of sets"):
            fitted.label_sets(NEW, share)
    with pytest.raises(ConfigError, match="unknown 'x' is for texts that abstain leaves"):
        fitted.predict(NEW, unknown="x")
    with pytest.warns(LLMEmbedWarning, match=r"2 of 3 .* for coverage 0\.9 by class"):
        assert fitted.label_sets(NEW, 0.9, by_class=True)[:, 1:].all()


def test_what_a_fit_keeps_is_its_own(fitted: LLMEmbedClassifier) -> None:
    """A second fit, of other texts, forgets what the first held out."""
    before, n = fitted.held_out_, 90
    fitted.fit(TRAINED[:n], CLASSES[:n])
    assert (len(before.label), len(fitted.held_out_.label)) == (N_TRAINED, n)
    assert len(fitted.domain_.distances) == n
