"""Few rows: what trains on them, and what is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clustered import LABELS, MakeCache, clustered
from toy_model import save_toy_model

from llmembed.common.errors import ConfigError, LLMEmbedWarning
from llmembed.train import FitConfig, LLMEmbedClassifier, fit, load_run
from llmembed.train.reports.report import metrics_table

CLOSED = [("concat", "ridge"), ("concat", "lda"), ("mean", "auto"), ("auto", "auto")]
BY_GRADIENT = [("concat", "mlp"), ("auto", "mlp"), ("cooc", "auto"), ("gated", "auto")]
NO_SHARE = "a validation share of 0.1 of {} examples is empty, so all of them train, for 60 epochs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_toy_model(tmp_path_factory.mktemp("few") / "toy"))


def check_told(caught: list[warnings.WarningMessage], *beginnings: str) -> None:
    told = [str(one.message) for one in caught if one.category is LLMEmbedWarning]
    assert len(told) == len(beginnings)
    assert all(map(str.startswith, told, beginnings))


@pytest.mark.parametrize("n", [2, 3, 4, 10])
@pytest.mark.parametrize(("fusion", "head"), CLOSED + BY_GRADIENT)
def test_a_few_texts_a_class(model: str, fusion: str, head: str, n: int) -> None:
    """From a text a class on every head learns; what lacks a validation share says so once."""
    texts = [f"w{1 + row % 2} w{1 + row % 2} w{1 + row % 2} w{20 + row}" for row in range(n)]
    y = np.array((["a", "b"] * n)[:n])
    classifier = LLMEmbedClassifier(
        model, "1,2", fusion=fusion, head=head, max_length=64, device="cpu", accelerator="cpu"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        proba = classifier.fit(texts, y).predict_proba(texts)
    assert np.isfinite(proba).all()
    assert classifier.predict(texts).tolist() == y.tolist()
    lacks_share = n < 10 and (fusion, head) in BY_GRADIENT
    check_told(caught, *([NO_SHARE.format(n)] if lacks_share else []))


@pytest.mark.parametrize(("fusion", "head"), [("concat", "lda"), ("cooc", "auto")])
def test_the_command_takes_a_few_rows(
    make_cache: MakeCache, tmp_path: Path, fusion: str, head: str
) -> None:
    """Without a test split, of rows too few to hold any out all train, and no figure is given."""
    cache = make_cache({"train": clustered(4, 0, n_classes=2)}, labels=LABELS[:2])
    config = FitConfig(cache=str(cache), fusion=fusion, head=head, output=str(tmp_path / "r"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = fit(config).metrics
    no_figures = "10% of the 4 training rows is no row that can be held out, so all of them train"
    check_told(caught, *([NO_SHARE.format(4)] if fusion == "cooc" else []), no_figures)
    assert (metrics["n_eval"], metrics["accuracy"], metrics["nll"]) == (0, None, None)
    assert metrics["over_seeds"]["accuracy"] == {"mean": None, "std": None}
    assert metrics["splits"]["train"]["n"] == 4
    assert metrics_table(metrics).endswith("evaluated on     nothing, since all rows train")
    assert "nothing, since all rows train" in (tmp_path / "r" / "report.html").read_text()
    assert load_run(tmp_path / "r").metrics == metrics


def test_few_rows_are_evaluated_on_a_test_split(make_cache: MakeCache, tmp_path: Path) -> None:
    """With a test split a fit on four rows has its figures."""
    splits = {name: clustered(n, seed, n_classes=2) for seed, (name, n) in enumerate(SIZES.items())}
    cache = make_cache(splits, labels=LABELS[:2])
    config = FitConfig(cache=str(cache), fusion="mean", output=str(tmp_path / "r"))
    assert fit(config).metrics["accuracy"] > 0.8


@pytest.mark.parametrize("fusion", ["auto", "cooc"])
def test_few_rows_choose_nothing(make_cache: MakeCache, tmp_path: Path, fusion: str) -> None:
    """Of fewer rows than columns deep features are one LDA, half shrunk in the space of rows."""
    splits = {"train": clustered(40, 0, n_layers=5), "test": clustered(60, 1, n_layers=5)}
    run = fit(FitConfig(cache=str(make_cache(splits)), fusion=fusion, output=str(tmp_path / "r")))
    (x, y), (new, _) = splits.values()
    x, deep = (np.concatenate(one[2:], axis=1, dtype=np.float64) for one in (x, new))
    expected = half_shrunk_lda(x, y, deep)
    taken = deep if fusion == "auto" else np.concatenate(new, axis=1)  # auto takes no others
    scores = run.classifier(torch.from_numpy(taken).float()).detach().double().numpy()
    scores -= scores.mean(axis=1, keepdims=True)
    # cooc takes the scale of the columns from the rows that it does not watch.
    least = 0.99999 if fusion == "auto" else 0.999
    assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > least
    if fusion == "auto":
        (member,) = run.metrics["chosen"]["members"]
        assert (member["fusion"], member["features"]) == ("concat", (0, 1, 2))
        assert [one["layer"] for one in run.config["features"]] == [3, 4, 5]


def half_shrunk_lda(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Score `[n, K]` by the definition, with matrices of the size of the columns."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    x, new = (x - mean) / scale, (new - mean) / scale
    means = np.stack([x[y == label].mean(axis=0) for label in np.unique(y)])
    within = np.cov((x - means[y]).T, bias=True)
    of_dimension = np.trace(within) / np.linalg.matrix_rank(x)
    covariance = (within + of_dimension * np.eye(len(within))) / 2
    weights = np.linalg.solve(covariance, means.T)
    prior = np.log(np.bincount(y) / len(y))
    scores = new @ weights - (means.T * weights).sum(axis=0) / 2 + prior
    return scores - scores.mean(axis=1, keepdims=True)


def test_few_rows_need_proof_that_cooc_adds_to_its_base(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """Without proof what was trained is taken back, and the record says so; of more rows never."""
    taken_back = {}
    for n in (40, 90):
        splits = {"train": clustered(n, 0, n_layers=5), "test": clustered(60, 1, n_layers=5)}
        cache = make_cache(splits, name=f"{n}.zarr")
        run = fit(FitConfig(cache=str(cache), output=str(tmp_path / f"r{n}")))
        (record,) = run.metrics["per_seed"]
        taken_back[n] = record.get("taken_back", False)
        assert 0 <= record["val_loss"] < 2
        if taken_back[n]:
            assert not run.classifier.state_dict()["head.logits.weight"].any()
    assert taken_back == {40: True, 90: False}


SIZES = {"train": 4, "test": 40}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.1}, "a validation share of 0.1 of 4 examples is empty. Pass a larger"),
        ({"preset": "paper"}, "a validation share of 0.1 of 4 examples is empty. Pass a larger"),
        ({"fusion": "mean", "folds": 5}, "4 training rows can't be divided into 5 folds"),
    ],
)
def test_shares_that_are_asked_for_are_not_left_out(
    make_cache: MakeCache, options: dict[str, Any], message: str
) -> None:
    """A share or folds that an option asks for, or the preset needs, are never silently dropped."""
    splits = {name: clustered(n, 0, n_classes=2, n_layers=5) for name, n in SIZES.items()}
    cache = make_cache(splits, labels=LABELS[:2])
    with pytest.raises(ConfigError, match=message):
        fit(FitConfig(cache=str(cache), **options))


def test_a_class_with_one_row_is_no_matter_to_folds(make_cache: MakeCache, tmp_path: Path) -> None:
    """Only a validation share warns of classes that it can't watch: a solved head has none."""
    features, labels = clustered(20, 0, n_classes=2)
    labels[3] = 2
    cache = make_cache({"train": (features, labels), "test": clustered(30, 1)})
    config = FitConfig(cache=str(cache), fusion="mean", head="lda", output=str(tmp_path / "r"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(config)
