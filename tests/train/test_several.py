"""Fits of several labels a text: what is solved, what is written, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clustered import LABELS, MakeCache, load, of_sets
from sklearn.linear_model import LogisticRegression, Ridge

from llmembed.common.errors import ConfigError, DataError, LLMEmbedWarning
from llmembed.train import AuditConfig, FitConfig, SweepConfig, fit, load_run, run_audit, run_sweep
from llmembed.train.inputs import draw_folds, strata_of
from llmembed.train.linear.closed import ClosedSolver, OneVsRestRidge
from llmembed.train.linear.moments import Problem
from llmembed.train.linear.sigmoid import SigmoidSolver
from llmembed.train.reports.compare import compare_runs
from llmembed.train.reports.report import metrics_table
from llmembed.train.runs.predictions import read_predictions

N, WIDTH, C = 200, 6, 4


def make_problem(*, never: bool = False, shift: float = 0) -> Problem:
    """Labels of shares from a half to a tenth, some texts without any; the last one may be none."""
    generator = np.random.default_rng(3)
    sets = (generator.random((N, C)) < (0.5, 0.3, 0.2, 0.1)).astype(np.int64)
    if never:
        sets[:, -1] = 0
    x = sets @ generator.normal(size=(C, WIDTH)) + 1.5 * generator.normal(size=(N, WIDTH)) + shift
    folds = draw_folds(strata_of(sets), np.arange(N), 5, generator)
    return Problem(
        torch.from_numpy(x.astype(np.float32)),
        torch.from_numpy(sets),
        [torch.from_numpy(rows) for rows in folds],
        torch.ones(C),
    )


def unit(problem: Problem) -> float:
    return problem.x.double().var(dim=0, correction=0).mean().item()


@pytest.mark.parametrize("strength", [0.001, 0.1])
@pytest.mark.parametrize("shift", [0, 5])
def test_logistic_heads_are_scikit_learns(strength: float, shift: float) -> None:
    """Each label's probabilities are those of LogisticRegression on it against the rest."""
    problem = make_problem(shift=shift)
    ours = SigmoidSolver(problem).solve(strength).scores(problem.x.double()).sigmoid()
    penalty = strength * unit(problem)
    for k in range(C):
        model = LogisticRegression(C=1 / (penalty * N), max_iter=10_000, tol=1e-8)
        model.fit(problem.x.double().numpy(), problem.y[:, k].numpy())
        theirs = model.predict_proba(problem.x.double().numpy())[:, 1]
        np.testing.assert_allclose(ours[:, k], theirs, atol=5e-3)


def test_ridge_heads_are_scikit_learns() -> None:
    """Each label's scores are those of Ridge on +1 and -1."""
    problem = make_problem(shift=2)
    ours = ClosedSolver(OneVsRestRidge, problem).solve(0.1).scores(problem.x.double())
    model = Ridge(alpha=0.1 * N * unit(problem))
    x = problem.x.double().numpy()
    theirs = model.fit(x, 2 * problem.y.numpy() - 1).predict(x)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("make", [SigmoidSolver, lambda one: ClosedSolver(OneVsRestRidge, one)])
def test_folds_are_fitted_at_once_as_alone(make: Any) -> None:
    """Held-out scores are those of a fit on the other rows alone."""
    problem = make_problem()
    path = make(problem).held_out()
    # Strengths count from the variance of the rows that are fitted to.
    solver = make(problem)
    for index in (0, len(path.strengths) - 1):
        for fold, rows in enumerate(problem.folds):
            others = [one for k, one in enumerate(problem.folds) if k != fold]
            alone = make(dataclasses.replace(problem, folds=others))
            if isinstance(solver, SigmoidSolver):
                alone._unit = solver._unit
            scores = alone.solve(path.strengths[index]).scores(problem.x[rows].double())
            found = path.scores[index, rows].double()
            np.testing.assert_allclose(found.sigmoid(), scores.sigmoid(), atol=5e-3)


@pytest.mark.parametrize("make", [SigmoidSolver, lambda one: ClosedSolver(OneVsRestRidge, one)])
def test_a_label_that_no_row_has_is_improbable(make: Any) -> None:
    """Its score is low for every text, and finite."""
    problem = make_problem(never=True)
    scores = make(problem).solve(0.1).scores(problem.x.double())
    assert scores.isfinite().all()
    assert (scores[:, -1] <= -0.99).all()


def test_folds_are_stratified_by_the_rarest_label() -> None:
    """Rows of the rarest label divide evenly among the folds."""
    problem = make_problem()
    counts = [int(problem.y[rows, -1].sum()) for rows in problem.folds]
    assert max(counts) - min(counts) <= 1


@pytest.fixture
def cache(make_cache: MakeCache) -> Path:
    return make_cache({"train": of_sets(150, 0), "test": of_sets(80, 1)})


def options(tmp_path: Path, **given: Any) -> dict[str, Any]:
    return {"cache": str(tmp_path / "tiny.zarr"), "output": str(tmp_path / "run"), **given}


WAYS: dict[str, dict[str, Any]] = {
    "concat": {"fusion": "concat"},
    "ridge": {"fusion": "concat", "head": "ridge"},
    "linear": {"fusion": "mean", "head": "linear"},
    "max": {"fusion": "max"},
    "single": {"fusion": "single", "layers": "2"},
    "auto": {"fusion": "auto"},
    "auto-linear": {"fusion": "auto", "head": "linear"},
    "cooc": {"fusion": "cooc", "epochs": 3},
    "scalar-mix": {"fusion": "scalar-mix", "epochs": 30, "lr": 0.01},
    "mlp": {"fusion": "gated", "head": "mlp", "epochs": 20, "n_seeds": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_written_and_read(cache: Path, tmp_path: Path, way: str) -> None:
    """Figures, thresholds, predictions and page agree, and it is better than chance."""
    run = fit(FitConfig(**options(tmp_path, **WAYS[way])))
    again = load_run(tmp_path / "run")
    assert again.thresholds is not None
    assert again.thresholds.tolist() == run.classifier.thresholds.tolist()  # type: ignore[union-attr]
    metrics, sets = run.metrics, of_sets(80, 1)[1]
    found = read_predictions(tmp_path / "run" / "predictions.parquet", LABELS)
    np.testing.assert_array_equal(found.labels, sets)
    np.testing.assert_array_equal(found.predicted, np.exp(found.log_proba) >= again.thresholds)
    assert metrics["accuracy"] == (found.predicted == sets).all(axis=1).mean()
    assert metrics["macro_f1"] > metrics["baselines"]["majority"]["macro_f1"] + 0.2
    assert "confusion" not in metrics
    assert metrics["abstain"] is None
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Samples F1" in page
    assert "Confusion matrix" not in page


def test_parquet_holds_lists(cache: Path, tmp_path: Path) -> None:
    """Labels and what is predicted are lists of names, which may be empty."""
    fit(FitConfig(**options(tmp_path, fusion="concat")))
    table = pq.read_table(tmp_path / "run" / "predictions.parquet")
    expected = [[LABELS[k] for k in np.flatnonzero(row)] for row in of_sets(80, 1)[1]]
    assert table["label"].to_pylist() == expected
    assert [] in expected


def test_a_threshold_of_ones_own(cache: Path, tmp_path: Path) -> None:
    """`threshold` is that of every label."""
    for fusion in ("concat", "scalar-mix"):
        given = options(tmp_path, fusion=fusion, threshold=0.25, overwrite=True)
        run = fit(FitConfig(**given))
        assert run.thresholds is not None
        assert run.thresholds.tolist() == [0.25] * 3


def test_labels_that_say_nothing_are_named(make_cache: MakeCache, tmp_path: Path) -> None:
    """One that no row has is never given, one that all have always; a warning names each."""
    features, sets = of_sets(150, 0)
    sets[:, 0], sets[:, 2] = 1, 0
    make_cache({"train": (features, sets), "test": of_sets(80, 1)})
    with pytest.warns(LLMEmbedWarning) as warned:
        run = fit(FitConfig(**options(tmp_path, fusion="concat")))
    said = " ".join(str(one.message) for one in warned)
    assert "1 of 3 labels: trade; each stands at no training row and is never given" in said
    assert "1 of 3 labels: earn; each stands at every training row" in said
    n_given = {name: row["n_predicted"] for name, row in run.metrics["per_class"].items()}
    assert (n_given["earn"], n_given["trade"]) == (80, 0)


def test_rows_without_any_label_are_refused(make_cache: MakeCache, tmp_path: Path) -> None:
    """Nothing can be learned where no row has a label."""
    features, sets = of_sets(150, 0)
    make_cache({"train": (features, 0 * sets), "test": of_sets(80, 1)})
    said = "none of the 150 training rows has any of the 3 labels"
    with pytest.raises(DataError, match=said):
        fit(FitConfig(**options(tmp_path, fusion="concat")))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lda": ({"fusion": "concat", "head": "lda"}, "head 'lda' tells which one of all labels"),
    "paper": ({"preset": "paper"}, "head 'paper' tells which one .* and no --preset"),
    "balanced": (
        {"fusion": "concat", "class_weight": "balanced"},
        "class_weight 'balanced' would weigh texts by their one class",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_for_one_label_is_refused(make_cache: MakeCache, tmp_path: Path, what: str) -> None:
    """Heads, recipes and weights that know one class a text say so."""
    make_cache({"train": of_sets(150, 0, n_layers=5), "test": of_sets(80, 1, n_layers=5)})
    given, said = REFUSED[what]
    with pytest.raises(ConfigError, match=said):
        fit(FitConfig(**options(tmp_path, **given)))


def test_a_threshold_is_for_several_labels(make_cache: MakeCache, tmp_path: Path) -> None:
    """Where each text has one label, it would do nothing."""
    make_cache()
    with pytest.raises(ConfigError, match=r"--threshold 0\.3 would do nothing"):
        fit(FitConfig(**options(tmp_path, fusion="concat", threshold=0.3)))


def test_an_audit_is_for_one_label(cache: Path) -> None:
    """It says so before it reads features."""
    with pytest.raises(ConfigError, match=r"split 'train' of .* has several labels a text"):
        run_audit(AuditConfig(cache=str(cache)))


def test_doubts_are_for_one_label(cache: Path, tmp_path: Path) -> None:
    """Abstaining, sets that cover, and what is out of the domain are refused."""
    run = fit(FitConfig(**options(tmp_path, fusion="concat")))
    for option, ask in (
        ("--abstain", lambda: run.abstain_below(0.9)),
        ("--conformal", lambda: run.check_sets(0.9, by_class=False)),
        ("--ood", run.require_domain),
    ):
        with pytest.raises(ConfigError, match=f"{option} is for runs in which each text has one"):
            ask()


def test_a_sweep_tells_losses(cache: Path, tmp_path: Path) -> None:
    """Features are judged by their loss on held-out rows, the lowest being the best."""
    table = run_sweep(SweepConfig(cache=str(cache), output=str(tmp_path / "sweep")))
    losses = [row["nll"] for row in table["candidates"]]
    assert table["best"]["nll"] == min(losses)
    assert "Loss over depth" in (tmp_path / "sweep" / "sweep.svg").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="head 'lda' tells which one"):
        run_sweep(SweepConfig(cache=str(cache), output=str(tmp_path / "sweep"), head="lda"))


def test_runs_are_compared(cache: Path, make_cache: MakeCache, tmp_path: Path) -> None:
    """Figures are those of the runs; a run of one label a text is not compared with them."""
    places = [tmp_path / name for name in ("one", "other")]
    runs = [
        fit(FitConfig(**options(tmp_path, fusion="concat", head=head, output=str(place))))
        for head, place in zip(("ridge", "linear"), places, strict=True)
    ]
    document = compare_runs(places)
    for run, row in zip(runs, document["runs"], strict=True):
        for figure in ("accuracy", "macro_f1", "nll", "ece"):
            assert row[figure] == pytest.approx(run.metrics[figure])
    assert document["runs"][1]["against_first"]["accuracy"]["p"] <= 1
    single = make_cache(name="single.zarr")
    fit(FitConfig(cache=str(single), fusion="concat", output=str(tmp_path / "single")))
    with pytest.raises(ConfigError, match="in one of them a text may have several labels"):
        compare_runs([places[0], tmp_path / "single"])


def test_the_report_of_a_run(cache: Path, tmp_path: Path) -> None:
    """Lines for a terminal tell the figures of several labels, and what accuracy means there."""
    lines = metrics_table(fit(FitConfig(**options(tmp_path, fusion="concat"))).metrics)
    for told in ("(all labels of a text right; 95 % interval", "micro F1", "samples F1", "LRAP"):
        assert told in lines


def test_a_part_that_is_held_out_is_stratified(make_cache: MakeCache, tmp_path: Path) -> None:
    """Without a test split a tenth of each rarest label is held out, and has figures."""
    make_cache({"train": of_sets(150, 0)})
    data = load(FitConfig(**options(tmp_path, fusion="concat")))
    assert data.y_eval.shape == (len(data.shares.eval), 3)
    assert 8 <= len(data.shares.eval) <= 20
    assert (data.y_eval.sum(dim=0) > 0).all()
