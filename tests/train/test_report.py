from __future__ import annotations

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clustered import LABELS, MakeCache, clustered, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape

from llmembed.common.errors import ConfigError, RunFormatError
from llmembed.extract.cli import main as extract_main
from llmembed.train import FitConfig, Run, SweepConfig, fit, load_run, run_sweep
from llmembed.train.cli.fit import fit_main
from llmembed.train.measures import metrics
from llmembed.train.measures.metrics import summarise
from llmembed.train.reports.charts import Line, line_chart
from llmembed.train.reports.page import render
from llmembed.train.reports.report import metrics_table
from llmembed.train.reports.run_page import find_sweep, parts_of, report_page
from llmembed.train.runs.predictions import Predictions

VOID = {"meta", "br", "img", "link", "input"}


class _Balanced(HTMLParser):
    """Refuses a tag that closes another one than the last opened; keeps tables by their caption."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in {"caption", "th", "td"}:
            self._text = ""

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Of SVG: opens nothing."""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "caption":
            self.tables[self._text] = self._rows
        if tag in {"th", "td"}:
            self._rows[-1].append(self._text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    cache = write_cache(folder / "tiny.zarr")
    return fit(
        FitConfig(
            cache=str(cache), fusion="concat", head="lda", n_seeds=2, output=str(folder / "run")
        )
    )


def tables_of(page: str) -> dict[str, list[list[str]]]:
    return _Balanced(page).tables


def table(page: str, caption: str) -> list[list[str]]:
    found = [rows for name, rows in tables_of(page).items() if name.startswith(caption)]
    assert len(found) == 1, caption
    return found[0]


def test_a_run_holds_its_page(run: Run) -> None:
    """The page has the figures of metrics.json, and is the one that its folder gives again."""
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert page == report_page(run.path)
    ours, majority = table(page, "On 60 examples of test")[1:]
    low, high = run.metrics["accuracy_ci95"]
    names = ("macro_f1", "nll", "ece")
    figures = (run.metrics["accuracy"], low, high, *(run.metrics[name] for name in names))
    assert ours == ["this run", *(f"{figure:.4f}" for figure in figures)]
    assert majority[:2] == ["majority class", "0.3333"]
    classes = {row[0]: row[1:] for row in table(page, "Each class")[1:]}
    for name, row in run.metrics["per_class"].items():
        figures = [f"{row[key]:.4f}" for key in ("precision", "recall", "f1")]
        assert classes[name] == [*figures, str(row["n"]), str(row["n_predicted"])]
    assert [row[0] for row in table(page, "Of all seeds")[1:]] == ["0", "1"]
    assert "the cache does not say where its texts came from" in page


def test_a_page_loads_nothing(run: Run) -> None:
    """No address stands in it where a browser would ask for it, and a policy forbids asking."""
    page = report_page(run.path)
    outside = re.sub(r'(xlink:)?href="#[^"]*"|url\(#[^)]*\)', "", page)
    assert not re.search(r"(src|href)=|@import|url\(", outside)
    assert "default-src 'none'" in page


def test_the_matrix_has_every_count_beside_those_it_is_confused_with(run: Run) -> None:
    """Whatever the order of the classes, cell (true, predicted) has the count of metrics.json."""
    counts = np.diag([9, 9, 9, 9])
    counts[0, 3], counts[3, 0], counts[1, 2] = 4, 2, 1
    labels = ["a", "b", "c", "d"]
    rows = table(page_with(run, labels, counts), "Confusion matrix")
    order = rows[0][1:]
    assert order == ["a", "d", "b", "c"]
    for true, *cells in rows[1:]:
        found = [int(cell or 0) for cell in cells]
        assert found == [counts[labels.index(true), labels.index(other)] for other in order]


def test_of_very_many_classes_those_with_most_errors_are_in_the_matrix(run: Run) -> None:
    """Beyond 100 classes the matrix is of 100, which it says; the commonest errors are listed."""
    counts = np.eye(120, dtype=int) * 50
    counts[110, 111], counts[5, 6] = 2, 7
    page = page_with(run, [f"c{k}" for k in range(120)], counts)
    order = table(page, "Confusion matrix")[0][1:]
    assert len(order) == 100
    assert {*order[:4]} == {"c5", "c6", "c110", "c111"}
    assert "of 120 classes these are the 100 with the most errors" in page
    errors = table(page, "The commonest confusions")[1:]
    assert errors == [["c5", "c6", "7", f"{7 / 57:.4f}"], ["c110", "c111", "2", f"{2 / 52:.4f}"]]


def page_with(run: Run, labels: list[str], counts: np.ndarray, **changed: Any) -> str:
    """Lay out the run as if it had these classes and confusions."""
    parts = parts_of(run.path)
    row = next(iter(run.metrics["per_class"].values()))
    figures = {
        **run.metrics,
        "confusion": counts.tolist(),
        "per_class": dict.fromkeys(labels, row),
        **changed,
    }
    config = {**run.config, "labels": labels}
    pairs = np.argwhere(counts).repeat(counts[counts > 0], axis=0)
    predictions = Predictions(
        rows=np.arange(len(pairs)),
        labels=pairs[:, 0],
        log_proba=np.log(0.9 * np.eye(len(labels))[pairs[:, 1]] + 0.1 / len(labels)),
    )
    return report_page(type(parts)(config=config, metrics=figures, predictions=predictions))


def test_a_run_of_too_many_classes_has_no_matrix_but_its_errors(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond 2,000 classes classes by classes are not written; here the bound is two."""
    counts = np.array([[9, 4, 0], [0, 9, 0], [0, 0, 9]])
    predicted = np.log(np.eye(3)[[0, 1, 2, 1]] * 0.9 + 0.03)
    figures = summarise(predicted, np.array([0, 1, 2, 0]), ["a", "b", "c"])
    monkeypatch.setattr(metrics, "MOST_CONFUSED", 2)
    without = summarise(predicted, np.array([0, 1, 2, 0]), ["a", "b", "c"])
    assert figures == without | {"confusion": [[1, 1, 0], [0, 1, 0], [0, 0, 1]]}
    assert without["confusion"] is None
    page = page_with(run, ["a", "b", "c"], counts, confusion=None)
    assert "Confusion matrix" not in page
    assert table(page, "The commonest confusions")[1:] == [["a", "b", "4", f"{4 / 13:.4f}"]]


def test_the_numbers_of_a_curve_are_those_of_the_predictions(run: Run) -> None:
    """Coverage 1 has the accuracy of all rows, 0.5 that of the surer half; the bins hold all."""
    page, predictions = report_page(run.path), parts_of(run.path).predictions
    proba = np.exp(predictions.log_proba)
    right = proba.argmax(axis=1) == predictions.labels
    surest = np.argsort(-proba.max(axis=1), kind="stable")
    covered = {float(row[0]): row[1] for row in table(page, "Accuracy against coverage")[1:]}
    assert covered[1.0] == f"{right.mean():.4f}"
    assert covered[0.5] == f"{right[surest[:30]].mean():.4f}"
    bins = table(page, "Reliability")[1:]
    assert sum(int(row[4]) for row in bins) == 60
    gaps = [int(row[4]) / 60 * abs(float(row[0]) - float(row[1])) for row in bins]
    assert sum(gaps) == pytest.approx(run.metrics["ece"], abs=2e-4)


def test_the_rows_to_look_at_are_the_surest_mistakes_and_the_least_sure(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """They come in that order, with the class that is true, and a text only where it is given."""
    noisy = clustered(200, 1)
    splits = {"train": clustered(90, 0), "test": (noisy[0], np.roll(noisy[1], 3)[::-1].copy())}
    config = FitConfig(cache=str(make_cache(splits)), fusion="mean", output=str(tmp_path / "r"))
    path = fit(config).path
    predictions = parts_of(path).predictions
    proba = np.exp(predictions.log_proba)
    wrong = proba.argmax(axis=1) != predictions.labels
    page = report_page(path, [f"text {row}" for row in range(200)])
    mistakes = table(page, "Mistakes it is most sure of")[1:]
    assert [row[1] for row in mistakes] == [f"text {row[0]}" for row in mistakes]
    assert mistakes[0][4] == f"{proba[wrong].max():.4f}"
    assert all(LABELS[predictions.labels[int(row[0])]] == row[2] != row[3] for row in mistakes)
    doubtful = [float(row[4]) for row in table(page, "Rows it is least sure of")[1:]]
    assert doubtful == sorted(doubtful)
    assert doubtful[0] == pytest.approx(proba.max(axis=1).min(), abs=1e-4)
    assert "text 1" not in (path / "report.html").read_text(encoding="utf-8")


@settings(max_examples=10)
@given(st.text(), st.text())
def test_any_name_is_text_in_a_page_and_in_a_picture(name: str, title: str) -> None:
    """A table and an SVG of whatever names stay what they are, and no control gets through."""
    chart = line_chart(title, name, [Line(name=name, x=[1, 2], y=[0, 1])] * 2, x=name, y="y")
    drawn = ET.fromstring(chart.alone())  # noqa: S314 - our own
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert not set(chart.svg) & {*map(chr, range(32)), "\u202e"} - {"\n", "\t"}


def test_the_shares_of_a_stack_and_of_weights_add_up(make_cache: MakeCache, tmp_path: Path) -> None:
    """Of auto they are the members', of concat those of the squared weights of each feature."""
    cache = str(make_cache())
    of_stack = fit(FitConfig(cache=cache, fusion="auto", output=str(tmp_path / "a"))).metrics
    shares = of_stack["feature_shares"]["shares"]
    expected = [0.0] * len(shares)
    for member in of_stack["chosen"]["members"]:
        for feature in member["features"]:
            expected[feature] += member["weight"] / len(member["features"])
    assert shares == pytest.approx(expected)
    assert sum(shares) == pytest.approx(1)
    run = fit(FitConfig(cache=cache, fusion="concat", head="ridge", output=str(tmp_path / "c")))
    squares = run.classifier.state_dict()["head.logits.weight"].double().square()
    halves = torch.stack([one.sum() for one in squares.split(16, dim=1)])
    shares = run.metrics["feature_shares"]["shares"]
    assert shares == pytest.approx((halves / halves.sum()).tolist())
    assert [row[1] for row in table(report_page(run.path), "Share of each layer")[1:]] == [
        f"{share:.4f}" for share in shares
    ]


def test_a_fit_by_gradient_shows_its_losses_and_a_sweep_its_layers(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """Each epoch is a row of the learning curve; only a sweep of the same cache is shown."""
    cache, other = str(make_cache()), str(make_cache(name="other.zarr"))
    options: dict[str, Any] = {"fusion": "gated", "epochs": 3, "output": str(tmp_path / "run")}
    run = fit(FitConfig(cache=cache, **options))
    page = report_page(run.path)
    (row,) = run.metrics["per_seed"]
    curve = table(page, "Learning curves")[1:]
    losses = [*row["losses"]["train_loss"], *row["losses"]["val_loss"]]
    assert [line[2] for line in curve] == [f"{loss:.4f}" for loss in losses]
    assert min(row["losses"]["val_loss"]) <= row["val_loss"] + 2e-3
    assert "Accuracy over depth" not in page
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text('{"cache": 3}')
    swept = run_sweep(SweepConfig(cache=cache, output=str(tmp_path / "sweep")))
    depths = table(report_page(run.path), "Accuracy over depth")[1:]
    singles = [one for one in swept["candidates"] if one["fusion"] == "single"]
    assert [line[1] for line in depths] == [f"{one['accuracy']:.4f}" for one in singles]
    assert find_sweep(run.path, "another") is None
    del other


def options_of(command: Any, line: str) -> dict[str, Any]:
    """Parse a command line as the command itself does."""
    import shlex

    name, *words = shlex.split(line)
    assert name in {"llmembed-extract", "llmembed-fit"}
    return dict(command.make_context(name, words).params)


def test_the_commands_of_a_page_make_the_run_again(texts_run: Run) -> None:
    """Their options, read by the commands themselves, are those of the run and of its sources."""
    page = report_page(texts_run.path)
    lines = re.findall(r"<pre><code>(.*?)</code></pre>", page)
    *extractions, fitted = [line.replace("&#39;", "'") for line in lines]
    options = options_of(fit_main, fitted)
    again = FitConfig(**{name: options[name] for name in texts_run.config["fit"]})
    assert json.loads(json.dumps(vars(again))) == json.loads(json.dumps(texts_run.config["fit"]))
    by_source = {one["source"]: one for one in (options_of(extract_main, x) for x in extractions)}
    assert by_source["toy-llama"]["layers"] == "1,3"
    assert set(by_source["toy-llama"]["pooling"]) == {"mean", "last"}
    assert by_source["toy-bert"]["layers"] == "2"
    assert all(one["max_length"] == 64 for one in by_source.values())
    assert all(one["dataset"].endswith("toy.csv") for one in by_source.values())
    parts = parts_of(texts_run.path)
    known = {**parts.config["cache"]["provenance"], "origin": "me/fruit", "config": "pear"}
    config = {**parts.config, "cache": {**parts.config["cache"], "provenance": known}}
    page = report_page(dataclasses.replace(parts, config=config))
    assert page.count("--dataset me/fruit") == page.count("--config pear") == 2


def test_what_is_said_of_a_text_run_stands_on_its_page(texts_run: Run) -> None:
    """Both baselines have a row, and the terminal has a line of each."""
    page = report_page(texts_run.path)
    names = [row[0] for row in table(page, "On ")[1:]]
    assert names == ["this run", "TF-IDF + logistic regression", "majority class"]
    lines = metrics_table(texts_run.metrics).splitlines()
    for name, key in (("majority class", "majority"), ("TF-IDF + LR", "tfidf")):
        (line,) = (one for one in lines if one.startswith(name))
        assert f"{texts_run.metrics['baselines'][key]['accuracy']:.4f}" in line
    assert f"{texts_run.metrics['size']['n_tokens']:,} tokens" in page


def test_texts_are_stored_only_when_asked(texts_run: Run, tmp_path: Path) -> None:
    """With --store-texts the run holds those of its evaluation rows, and its page shows some."""
    plain = (texts_run.path / "predictions.parquet").read_bytes()
    with Path(texts_run.config["cache"]["provenance"]["origin"]).open() as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert not any(text.encode() in plain for text in texts if len(text) > 20)
    cache = texts_run.config["fit"]["cache"]
    config = FitConfig(cache=cache, fusion="mean", source=("toy-bert",), store_texts=True)
    stored = fit(FitConfig(**{**vars(config), "output": str(tmp_path / "run")}))
    predictions = parts_of(stored.path).predictions
    assert predictions.texts == [texts[row] for row in predictions.rows]
    page = (stored.path / "report.html").read_text(encoding="utf-8")
    assert table(page, "Rows it is least sure of")[0][1] == "text"
    assert str(escape(texts[int(table(page, "Rows it is least sure of")[1][0])][:100])) in page


def test_texts_that_are_not_there_cannot_be_stored(make_cache: MakeCache, tmp_path: Path) -> None:
    """It is one sentence, before anything is trained."""
    config = FitConfig(cache=str(make_cache()), store_texts=True, output=str(tmp_path / "run"))
    with pytest.raises(
        ConfigError, match=r"--store-texts finds no texts .* the cache does not say"
    ):
        fit(config)
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_earlier_version_still_has_a_page(run: Run, tmp_path: Path) -> None:
    """What older records lack is left out."""
    folder = tmp_path / "old"
    folder.mkdir()
    config = {**run.config, "cache": {"fingerprint": "x", "text_column": None}}
    new = ("baselines", "size", "feature_shares")
    metrics = {name: value for name, value in run.metrics.items() if name not in new}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "predictions.parquet").write_bytes((run.path / "predictions.parquet").read_bytes())
    page = report_page(folder)
    assert [row[0] for row in table(page, "On 60")[1:]] == ["this run"]
    assert "llmembed-extract" not in page


def test_predictions_that_are_no_parquet_are_told(run: Run, tmp_path: Path) -> None:
    """A damaged file is one sentence with its path."""
    for name in ("config.json", "metrics.json"):
        (tmp_path / name).write_bytes((run.path / name).read_bytes())
    (tmp_path / "predictions.parquet").write_bytes(b"no parquet")
    with pytest.raises(RunFormatError, match=r"predictions.parquet is damaged"):
        report_page(tmp_path)


def test_a_run_without_evaluation_has_a_page(make_cache: MakeCache, tmp_path: Path) -> None:
    """It says that nothing was evaluated, and shows no figures."""
    cache = str(make_cache({"train": clustered(5, 0)}))
    config = FitConfig(cache=cache, fusion="mean", output=str(tmp_path / "r"))
    with pytest.warns(UserWarning, match="all of them train"):
        path = fit(config).path
    page = report_page(path)
    assert "nothing, since all rows train" in page
    assert "Confusion" not in page
    assert load_run(path).metrics["baselines"] == {}


def test_help_names_the_options() -> None:
    """`llmembed-fit --help` has the options of pages."""
    said = CliRunner().invoke(fit_main, ["--help"]).output
    assert "--baseline" in said
    assert "--store-texts" in said


def test_a_template_lacking_a_value_is_refused() -> None:
    """A forgotten value is an error, not an empty place."""
    with pytest.raises(Exception, match="undefined"):
        render("run.html.j2")
