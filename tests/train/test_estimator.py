from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks
from toy_model import save_toy_model, toy_texts

from llmembed.cache_format import open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.writing.lock import WriterLock
from llmembed.common.errors import (
    CacheMismatchError,
    ConfigError,
    DataError,
    LLMEmbedWarning,
    ModelError,
)
from llmembed.extract import ExtractConfig, Extractor, extract
from llmembed.train import (
    AuditConfig,
    FitConfig,
    LLMEmbedClassifier,
    SweepConfig,
    fit,
    run_audit,
    run_sweep,
)

TEXTS = [f"w{1 + row % 2} " * 6 + text for row, text in enumerate(toy_texts(60, longest=4))]
CLASSES = np.array(["cocoa", "trade"] * 30)
OPTIONS: dict[str, Any] = {"max_length": 64, "device": "cpu", "accelerator": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_toy_model(tmp_path_factory.mktemp("estimator") / "toy"))


@pytest.fixture
def classifier(model: str) -> LLMEmbedClassifier:
    return LLMEmbedClassifier(model, "1,2", fusion="concat", head="ridge", **OPTIONS)


@pytest.fixture
def n_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of texts that the backbone was run on, call by call."""
    counts: list[int] = []
    launch = Extractor.launch

    def counted(self: Extractor, planned: Any, *args: Any, **options: Any) -> Any:
        counts.append(len(planned.texts.ids))
        return launch(self, planned, *args, **options)

    monkeypatch.setattr(Extractor, "launch", counted)
    return counts


def test_texts_in_classes_out(classifier: LLMEmbedClassifier) -> None:
    """It learns from a list of texts, and gives classes, probabilities and a score."""
    fitted = classifier.fit(TEXTS[:40], CLASSES[:40])
    assert fitted is classifier
    assert classifier.classes_.tolist() == ["cocoa", "trade"]
    proba = classifier.predict_proba(TEXTS[40:])
    assert proba.shape == (20, 2)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    predicted = classifier.predict(np.array(TEXTS[40:], dtype=object))
    assert predicted.tolist() == classifier.classes_[proba.argmax(axis=1)].tolist()
    assert classifier.score(TEXTS[40:], CLASSES[40:]) > 0.9


@pytest.mark.parametrize("classes", [[3, 7], [False, True], ["b", "a"]])
def test_classes_of_any_kind(classifier: LLMEmbedClassifier, classes: list[Any]) -> None:
    """Classes come back as they were given: numbers, booleans or strings, sorted."""
    y = np.array(classes * 30)
    predicted = classifier.fit(TEXTS, y).predict(TEXTS)
    assert predicted.dtype == y.dtype
    assert classifier.classes_.tolist() == sorted(classes)


def test_several_labels_a_text_are_a_classifier_each(
    model: str, tmp_path: Path, n_computed: list[int]
) -> None:
    """scikit-learn's MultiOutputClassifier fits one for each column; features are computed once."""
    cache = str(tmp_path / "texts.zarr")
    one = LLMEmbedClassifier(model, "1,2", fusion="concat", head="ridge", cache=cache, **OPTIONS)
    labels = np.stack([CLASSES == "cocoa", CLASSES != "cocoa", np.arange(60) % 4 == 0], axis=1)
    fitted = MultiOutputClassifier(one).fit(TEXTS, labels.astype(int))
    assert sum(n_computed) == len(set(TEXTS))
    predicted = fitted.predict(TEXTS)
    assert predicted.shape == (60, 3)
    assert (predicted[:, 0] == labels[:, 0]).mean() > 0.9
    assert (predicted[:, 0] == 1 - predicted[:, 1]).all()


LABELS = np.stack([CLASSES == "cocoa", np.arange(60) % 4 == 0], axis=1).astype(int)
"""The second is no matter of the texts."""


@pytest.mark.parametrize("options", [{}, {"head": "linear"}, {"fusion": "cooc", "head": "auto"}])
def test_several_labels_a_text(classifier: LLMEmbedClassifier, options: dict[str, Any]) -> None:
    """Of an indicator matrix such matrices are predicted, of probabilities from thresholds on."""
    fitted = classifier.set_params(**options).fit(TEXTS, LABELS)
    assert fitted.classes_.tolist() == [0, 1]
    proba, predicted = fitted.predict_proba(TEXTS), fitted.predict(TEXTS)
    assert proba.shape == predicted.shape == (60, 2)
    assert not np.allclose(proba.sum(axis=1), 1)
    assert (predicted[:, 0] == LABELS[:, 0]).mean() > 0.9
    np.testing.assert_array_equal(fitted.decision_function(TEXTS) >= 0, predicted)
    assert fitted.score(TEXTS, LABELS) == (predicted == LABELS).all(axis=1).mean()
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301 - our own
    np.testing.assert_array_equal(again.predict_proba(TEXTS), proba)


def test_labels_may_be_named(classifier: LLMEmbedClassifier) -> None:
    """Lists of labels and a table with a column a label give the same classifier as a matrix."""
    expected = classifier.fit(TEXTS, LABELS).predict_proba(TEXTS)
    names = [[name for name, has in zip(("a", "b"), row, strict=True) if has] for row in LABELS]
    for given in (names, pd.DataFrame(LABELS, columns=["a", "b"])):
        fitted = clone(classifier).fit(TEXTS, given)
        assert fitted.classes_.tolist() == ["a", "b"]
        np.testing.assert_array_equal(fitted.predict_proba(TEXTS), expected)


def test_a_threshold_of_several_labels(classifier: LLMEmbedClassifier) -> None:
    """It is that of every label; weights of classes are refused, and a threshold of one label."""
    fitted = classifier.set_params(threshold=0.3).fit(TEXTS, LABELS)
    proba = fitted.predict_proba(TEXTS)
    np.testing.assert_array_equal(fitted.predict(TEXTS), proba >= np.float32(0.3))
    with pytest.raises(ConfigError, match=r"--threshold 0\.3 would do nothing"):
        clone(classifier).fit(TEXTS, CLASSES)
    with pytest.raises(ConfigError, match="class_weight 'balanced' would weigh texts by their one"):
        clone(classifier).set_params(class_weight="balanced").fit(TEXTS, LABELS)


def test_several_classes_a_text_are_refused_by_one_classifier(
    classifier: LLMEmbedClassifier,
) -> None:
    """A matrix of classes is named with its shape, and the wrapper that takes it."""
    with pytest.raises(DataError, match=r"y has the shape \(60, 3\), several .*MultiOutputClass"):
        classifier.fit(TEXTS, np.arange(180).reshape(60, 3) % 4)


def test_a_fit_by_gradient(model: str) -> None:
    """The default fusion trains by gradient, and the same seed gives the same probabilities."""
    options: dict[str, Any] = {"epochs": 5, "class_weight": "balanced", **OPTIONS}
    probas = [
        LLMEmbedClassifier(model, "1,2", **options).fit(TEXTS, CLASSES).predict_proba(TEXTS)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*probas)


def test_the_fusion_may_narrow_the_features(model: str) -> None:
    """With fusion auto it predicts from the features that were chosen."""
    options = {"fusion": "auto", "head": "linear", **OPTIONS}  # of equals, the fewest features
    classifier = LLMEmbedClassifier(model, "1:4", **options).fit(TEXTS, CLASSES)
    assert len(classifier.features_) < 3
    assert classifier.score(TEXTS, CLASSES) > 0.9


def test_parameters_are_those_of_the_configs() -> None:
    """Names and defaults are those of ExtractConfig and FitConfig."""
    ours = {
        **LLMEmbedClassifier().get_params(),
        "class_weight": "none",
        "pooling": ("mean", "last"),
    }
    renamed = {"random_state": "seed"}
    fields = {
        field.name: field.default
        for config in (FitConfig, ExtractConfig)
        for field in dataclasses.fields(config)
    }
    for name, default in ours.items():
        if name not in {"model", "layers"}:
            assert fields[renamed.get(name, name)] == default, name


def test_every_parameter_is_described() -> None:
    """Each parameter of the constructor has its line in the docstring."""
    described = inspect.getdoc(LLMEmbedClassifier) or ""
    for name in LLMEmbedClassifier().get_params():
        assert f"\n    {name}: " in described


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
        estimator_checks.check_mixin_order,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_estimator_tags_renamed,
    ],
)
def test_the_checks_of_scikit_learn_that_need_no_numbers(check: Any) -> None:
    """Of scikit-learn's checks, those that don't fit on arrays of numbers pass."""
    check("LLMEmbedClassifier", LLMEmbedClassifier())


def test_an_unfitted_classifier_says_so(classifier: LLMEmbedClassifier) -> None:
    """Predicting before fitting, or with a clone of a fitted one, is scikit-learn's own error."""
    classifier.fit(TEXTS, CLASSES)
    with pytest.raises(NotFittedError):
        clone(classifier).predict(TEXTS)


def test_pickling_leaves_the_backbone_behind(classifier: LLMEmbedClassifier) -> None:
    """A pickled classifier is its weights and doubts, and predicts the same once it is loaded."""
    classifier.fit(TEXTS, CLASSES)
    pickled = pickle.dumps(classifier)
    of_domain = sum(one.nbytes for one in vars(classifier.domain_).values())
    assert len(pickled) < 30_000 + of_domain
    loaded = pickle.loads(pickled)  # noqa: S301 - our own bytes
    np.testing.assert_array_equal(loaded.predict_proba(TEXTS), classifier.predict_proba(TEXTS))


def test_a_backbone_that_changed_is_refused(classifier: LLMEmbedClassifier, tmp_path: Path) -> None:
    """A pickled classifier refuses a backbone whose weights are others."""
    model = save_toy_model(tmp_path / "toy")
    pickled = pickle.dumps(classifier.set_params(model=str(model)).fit(TEXTS, CLASSES))
    save_toy_model(tmp_path / "other", "bert")
    (model / "tokenizer.json").write_bytes((tmp_path / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match=r"has tokenizer .* but the features were made with"):
        pickle.loads(pickled).predict(TEXTS)  # noqa: S301


def test_grid_search_in_a_pipeline(classifier: LLMEmbedClassifier) -> None:
    """A grid over its parameters inside a pipeline finds one, refits and scores."""
    pipeline = make_pipeline(FunctionTransformer(list), classifier)
    grid = {
        "llmembedclassifier__head": ["ridge", "lda"],
        "llmembedclassifier__layers": ["1", "1,2"],
    }
    search = GridSearchCV(pipeline, grid, cv=2).fit(TEXTS, CLASSES)
    assert search.score(TEXTS, CLASSES) > 0.9
    assert set(search.best_params_) == set(grid)


def test_a_step_before_it_may_give_a_frame(classifier: LLMEmbedClassifier) -> None:
    """In a pipeline whose output is set to pandas, a frame of one column arrives, and is taken."""
    step = FunctionTransformer(validate=False, feature_names_out="one-to-one")
    pipeline = make_pipeline(step, classifier).set_output(transform="pandas")
    frame = pd.DataFrame({"text": TEXTS})
    assert pipeline.fit(frame, CLASSES).score(frame, CLASSES) > 0.9


def test_weights_are_routed(classifier: LLMEmbedClassifier) -> None:
    """Sample weights reach the classifier in a search over folds, if it asks for them."""
    weights = np.where(CLASSES == "cocoa", 1.0, 2.0)
    with config_context(enable_metadata_routing=True):
        asking = clone(classifier).set_fit_request(sample_weight=True)
        search = GridSearchCV(asking.set_score_request(sample_weight=True), {"layers": [1]}, cv=2)
        routed = search.fit(TEXTS, CLASSES, sample_weight=weights).best_estimator_
    alone = clone(classifier).set_params(layers=1).fit(TEXTS, CLASSES, sample_weight=weights)
    np.testing.assert_array_equal(routed.predict_proba(TEXTS), alone.predict_proba(TEXTS))


def test_scikit_learn_calibrates_it(classifier: LLMEmbedClassifier) -> None:
    """CalibratedClassifierCV takes its decisions, with weights or without."""
    calibrated = CalibratedClassifierCV(classifier, cv=2).fit(TEXTS, CLASSES, np.ones(60))
    proba = calibrated.predict_proba(TEXTS)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    assert (calibrated.predict(TEXTS) == CLASSES).mean() > 0.9


def test_a_second_fit_forgets_the_first(classifier: LLMEmbedClassifier) -> None:
    """Fitted again, on other classes and layers, it is what a new one would be."""
    classifier.fit(TEXTS, CLASSES).set_params(layers=3)
    y = np.arange(60) % 3
    again = classifier.fit(TEXTS, y).predict_proba(TEXTS)
    np.testing.assert_array_equal(again, clone(classifier).fit(TEXTS, y).predict_proba(TEXTS))


def test_a_cache_computes_no_text_twice(
    classifier: LLMEmbedClassifier, tmp_path: Path, n_computed: list[int]
) -> None:
    """With a cache, folds, scores and a second object run the backbone on each text once."""
    cache = str(tmp_path / "texts.zarr")
    plain = classifier.fit(TEXTS, CLASSES).predict_proba(TEXTS)
    n_computed.clear()
    classifier.set_params(cache=cache)
    cross_val_score(classifier, TEXTS, CLASSES, cv=3)
    assert sum(n_computed) == len(set(TEXTS))
    again = clone(classifier).fit(TEXTS, CLASSES)
    assert sum(n_computed) == len(set(TEXTS))
    np.testing.assert_allclose(again.predict_proba(TEXTS[::-1]), plain[::-1], atol=1e-3)


def test_a_cache_of_a_data_set_is_refused(
    classifier: LLMEmbedClassifier, tmp_path: Path, n_computed: list[int]
) -> None:
    """With what it holds, what was wanted and what to do, before a text is computed."""
    rows = [f"{text},{name}" for text, name in zip(TEXTS, CLASSES, strict=True)]
    data = tmp_path / "texts.csv"  # a data set may be called like a cache of texts
    data.write_text("\n".join(["text,label", *rows]))
    cache = str(tmp_path / "texts.zarr")
    options = {"model": classifier.model, "layers": "1,2", "max_length": 64}
    extract(ExtractConfig(**options, dataset=str(data), cache=cache))
    before, n_passes = open_cache(cache), len(n_computed)
    told = (
        rf"^the cache {cache} holds the data set 'texts' \(2 classes, splits: train\), which "
        r"llmembed-extract made, and cache= wants one of texts alone, which LLMEmbedClassifier "
        r"makes\. Pass a path where there is no cache yet, or fit on this one: "
        rf"llmembed-fit --cache {cache}, in Python fit\(FitConfig\(cache='{cache}'\)\)\.$"
    )
    with pytest.raises(CacheMismatchError, match=told):
        classifier.set_params(cache=cache).fit(TEXTS, CLASSES)
    assert len(n_computed) == n_passes
    assert open_cache(cache).fingerprint == before.fingerprint


@pytest.mark.parametrize("verb", [fit, run_sweep, run_audit])
def test_its_cache_is_none_of_a_data_set(
    classifier: LLMEmbedClassifier, tmp_path: Path, verb: Any
) -> None:
    """What reads a data set says that there are no classes, not that a split is missing."""
    cache = str(tmp_path / "texts.zarr")
    classifier.set_params(cache=cache).fit(TEXTS, CLASSES)
    config = {fit: FitConfig, run_sweep: SweepConfig, run_audit: AuditConfig}[verb](cache=cache)
    told = (
        f"^{cache} holds texts without classes, as a cache of LLMEmbedClassifier does, and here "
        f"each text needs one. Fit in Python, LLMEmbedClassifier\\(cache='{cache}'\\).fit"
    )
    with pytest.raises(DataError, match=told):
        verb(config)


def test_other_settings_share_a_cache(
    classifier: LLMEmbedClassifier, tmp_path: Path, n_computed: list[int]
) -> None:
    """Other settings are another source of the same cache, and more layers are added to it."""
    classifier.set_params(cache=str(tmp_path / "texts.zarr"))
    for options in ({"max_length": 3}, {"max_length": 4}, {"layers": "1,2,3"}, {"layers": "2,3"}):
        classifier.set_params(**options).fit(TEXTS, CLASSES)
    assert len(open_cache(tmp_path / "texts.zarr").sources) == 2
    assert n_computed == [len(set(TEXTS))] * 3


def test_a_cache_that_another_process_writes_to(
    classifier: LLMEmbedClassifier, tmp_path: Path
) -> None:
    """Where another writer holds the cache, features are computed without it, with a warning."""
    cache = tmp_path / "texts.zarr"
    classifier.set_params(cache=str(cache)).fit(TEXTS[:40], CLASSES[:40])
    lock = WriterLock(open_store(cache))
    with pytest.warns(LLMEmbedWarning, match="Computed without it"):
        classifier.fit(TEXTS, CLASSES)
    lock.release()
    assert open_cache(cache).splits != ()


@pytest.mark.parametrize(
    ("texts", "classes", "message"),
    [
        ("one text", ["a"], "X must be a list of strings"),
        ([], [], "X must be a list of strings"),
        ([1, 2], ["a", "b"], "X must be a list of strings"),
        (["a", "b", "\ud800"], ["a", "b", "a"], "text 2 holds a lone surrogate"),
        (["a", "b"], ["a"], "inconsistent numbers of samples"),
        (["a", "b"], [0.5, 0.7], "Unknown label type"),
        (["w1", "w2"], ["a", "a"], "y has 1 class, 'a', in the 2 texts"),
    ],
)
def test_what_cannot_be_fitted(
    classifier: LLMEmbedClassifier, texts: Any, classes: list[Any], message: str
) -> None:
    """Texts and classes that can't be used are refused with the reason, all as ValueError."""
    with pytest.raises(ValueError, match=message):
        classifier.fit(texts, classes)


def test_a_parameter_that_is_not_allowed(classifier: LLMEmbedClassifier) -> None:
    """A wrong name is refused when it is fitted, as scikit-learn wants, in our words."""
    with pytest.raises(ConfigError, match="did you mean 'cooc'"):
        classifier.set_params(fusion="cooq").fit(TEXTS, CLASSES)
    with pytest.raises(DataError, match="X must be"):
        classifier.set_params(fusion="mean").fit(TEXTS, CLASSES).predict("w1")


def test_scikit_learn_is_optional() -> None:
    """The trainer imports without scikit-learn; the classifier then says what to install."""
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import llmembed.train\n"
        "from llmembed.train import fit, load_run\n"
        "try: llmembed.train.LLMEmbedClassifier\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-Pc", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "LLMEmbedClassifier needs scikit-learn, which is not installed. "
        "Run pip install 'llmembed-cache[sklearn]'.\n"
    )
