"""Runs beside each other: on the same rows or refused, and the figures of the runs themselves."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from clustered import HIDDEN_SIZE, LABELS, clustered, source_info, write_cache, write_split

from llmembed.cache_format import CacheWriter, DatasetInfo
from llmembed.common.errors import ConfigError, RunFormatError, RunNotFoundError
from llmembed.train import FitConfig, Run, fit
from llmembed.train.cli.report import report_main
from llmembed.train.reports.compare import compare_runs, comparison_page
from llmembed.train.reports.significance import FIGURES, judge

GOLDEN = Path(__file__).parent.parent / "golden/run_format_1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of three heads on hard features of the same texts, the last of another source."""
    folder = tmp_path_factory.mktemp("runs")
    splits = {}
    for split, n, seed in (("train", 90, 0), ("test", 60, 1)):
        features, labels = clustered(n, seed)
        noise = np.random.default_rng(seed + 7).normal(size=features.shape) * 2
        splits[split] = ((features + noise).astype(np.float16), labels)
    caches = [write_cache(folder / f"{name}.zarr", splits) for name in ("one", "other")]
    with CacheWriter(
        caches[1], dataset=DatasetInfo(name="tiny", labels=LABELS, provenance={})
    ) as writer:
        writer.add_source(source_info("second", HIDDEN_SIZE))
        for split, (features, labels) in splits.items():
            write_split(writer, split, "second", features[:1], labels)
    made = []
    for name, cache, options in (
        ("mean", caches[0], {"fusion": "mean", "head": "lda"}),
        ("concat", caches[0], {"fusion": "concat", "head": "ridge"}),
        ("second", caches[1], {"fusion": "single", "source": ("second",), "head": "lda"}),
    ):
        fit(FitConfig(cache=str(cache), output=str(folder / name), **options))
        made.append(folder / name)
    return made


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(report_main, [str(one) for one in arguments])


def test_the_figures_are_those_of_the_runs(runs: list[Path]) -> None:
    """Values and sizes are those of metrics.json, tests those of the stored probabilities."""
    document = compare_runs(runs)
    tables = [pq.read_table(path / "predictions.parquet") for path in runs]
    probas = [np.stack([table[f"p_{name}"] for name in LABELS], axis=1) for table in tables]
    labels = np.array([LABELS.index(name) for name in tables[0]["label"].to_pylist()])
    for row, path, judged in zip(document["runs"], runs, judge(labels, probas), strict=True):
        metrics = json.loads((path / "metrics.json").read_text())
        assert judged.items() <= row.items()
        for figure in FIGURES:
            assert row[figure] == pytest.approx(metrics[figure], abs=1e-9)
        assert row["n_parameters"] == metrics["n_parameters"]
        assert row["seconds"] == metrics["seconds"]["total"]
    assert (document["eval_split"], document["n_eval"]) == ("test", 60)
    assert [row["name"] for row in document["runs"]] == ["mean", "concat", "second"]


def test_the_command_says_the_same_as_table_document_and_page(
    runs: list[Path], tmp_path: Path
) -> None:
    """Each value, difference and p of the document stands in the table and on the page."""
    page = tmp_path / "all.html"
    result, again = (invoke(*runs, "--output", page, *more) for more in ([], ["--json"]))
    assert (result.exit_code, again.exit_code, result.stderr) == (0, 0, "")
    document = json.loads(again.stdout)
    assert document["page"] == str(page)
    assert result.stdout.endswith(f"page: {page}\n")
    html = page.read_text("utf-8")
    for row in document["runs"]:
        for figure in FIGURES:
            assert re.search(rf"^{row['name']} +{row[figure]:.4f}  ", result.stdout, re.MULTILINE)
            assert f">{row[figure]:.4f}<" in html
            test = (row["against_first"] or {}).get(figure)
            if test is not None:
                assert f"{test['difference']:+.4f}  " in result.stdout
                assert f"{test['p']:.2g}  " in result.stdout
    assert not re.search(r"(src|href)=\"(?!#)|@import|url\(", html)


def test_the_page_shows_names_as_text(runs: list[Path]) -> None:
    """A run that is called like a tag is shown, not obeyed."""
    document = compare_runs(runs)
    document["runs"][1]["name"] = "<script>alert(1)</script>"
    page = comparison_page(document)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_runs_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    """Runs whose folders are called alike are named by their paths."""
    copy = tmp_path / "mean"
    shutil.copytree(runs[0], copy)
    document = compare_runs([runs[0], copy])
    assert [row["name"] for row in document["runs"]] == [str(runs[0]), str(copy)]


def test_baselines_stand_beside_without_tests(runs: list[Path], tmp_path: Path) -> None:
    """What metrics.json calls a baseline has its figures in the table, and no p."""
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    path = copy / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["baselines"] = {"majority": {"accuracy": 0.3333, "accuracy_ci95": [0.22, 0.46]}}
    path.write_text(json.dumps(metrics))
    result = invoke(copy, runs[1], "--output", tmp_path / "p.html")
    assert re.search(
        r"^majority class +0\.3333  0\.2200 to 0\.4600  baseline$", result.stdout, re.MULTILINE
    )
    assert "majority class (baseline)" in (tmp_path / "p.html").read_text("utf-8")


def other_texts(config: dict[str, Any], _metrics: dict[str, Any], _path: Path) -> None:
    config["cache"] |= {"fingerprint": "f" * 64, "eval_fingerprint": "e" * 64}


def unsaid_texts(config: dict[str, Any], _metrics: dict[str, Any], _path: Path) -> None:
    config["cache"] = {"fingerprint": "f" * 64, "text_column": None}


def other_classes(config: dict[str, Any], _metrics: dict[str, Any], path: Path) -> None:
    config["labels"] = config["labels"][::-1]


def other_split(_config: dict[str, Any], metrics: dict[str, Any], _path: Path) -> None:
    metrics["eval_split"] = "validation"


def change_predictions(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    columns = pq.read_table(path / "predictions.parquet").to_pydict()
    columns[name] = change(columns[name])
    pq.write_table(pa.table(columns), path / "predictions.parquet")


def other_rows(_config: dict[str, Any], _metrics: dict[str, Any], path: Path) -> None:
    change_predictions(path, "row", lambda rows: [row + 1 for row in rows])


def other_labels(_config: dict[str, Any], _metrics: dict[str, Any], path: Path) -> None:
    change_predictions(path, "label", lambda labels: [*labels[:7], "trade", *labels[8:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_texts, "their data sets have fingerprints .{8} and eeeeeeee"),
        (unsaid_texts, "at least one, of an earlier version, does not say on which texts"),
        (other_classes, "their classes differ"),
        (other_split, "the one on test, the other on validation"),
        (other_rows, "60 and 60 rows are not the same ones"),
        (other_labels, "the label of row 7 differs"),
    ],
)
def test_runs_on_other_rows_are_refused(
    runs: list[Path], tmp_path: Path, change: Any, message: str
) -> None:
    """Runs of other texts, classes, splits, rows or labels are not compared; both are named."""
    copy = tmp_path / "edited"
    shutil.copytree(runs[0], copy)
    files = [copy / "config.json", copy / "metrics.json"]
    documents = [json.loads(file.read_text()) for file in files]
    change(*documents, copy)
    for file, document in zip(files, documents, strict=True):
        file.write_text(json.dumps(document))
    with pytest.raises(
        ConfigError,
        match=rf"mean and .*edited were not evaluated on the same rows: {message}\. Fit both",
    ):
        compare_runs([runs[0], copy])


def test_runs_of_an_earlier_version_on_one_cache_are_compared() -> None:
    """Without the fingerprint of the evaluated texts that of the whole cache decides."""
    names = [row["fusion"] for row in compare_runs([GOLDEN / "cooc", GOLDEN / "auto"])["runs"]]
    assert names[0] == "cooc"


def test_rows_in_another_order_are_the_same_rows(runs: list[Path], tmp_path: Path) -> None:
    """Rows are matched by their numbers, whatever their order in the file."""
    copy = tmp_path / "copy"
    shutil.copytree(runs[1], copy)
    table = pq.read_table(copy / "predictions.parquet")
    pq.write_table(
        table.take(np.random.default_rng(0).permutation(60)), copy / "predictions.parquet"
    )
    expected, found = (compare_runs([runs[0], one])["runs"][1] for one in (runs[1], copy))
    assert found["against_first"] == expected["against_first"]


def test_a_run_is_compared_once(runs: list[Path], tmp_path: Path) -> None:
    """A run that is named twice, by whatever path, is refused."""
    link = tmp_path / "link"
    link.symlink_to(runs[0])
    with pytest.raises(ConfigError, match=r"mean and .*link are one run, which does not differ"):
        compare_runs([runs[0], link])


def test_what_is_no_run_is_told(runs: list[Path], tmp_path: Path) -> None:
    """A missing folder, a folder without a run and damaged predictions are told in one sentence."""
    with pytest.raises(RunNotFoundError, match="nowhere is not a folder, so there is no run"):
        compare_runs([runs[0], tmp_path / "nowhere"])
    with pytest.raises(RunFormatError, match=r"is not a run\. Pass the folder that llmembed-fit"):
        compare_runs([runs[0], tmp_path])
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    (copy / "predictions.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunFormatError, match=r"predictions\.parquet is damaged"):
        compare_runs([runs[0], copy])
    (copy / "predictions.parquet").unlink()
    with pytest.raises(RunFormatError, match=r"predictions\.parquet is damaged"):
        compare_runs([runs[0], copy])


def test_a_run_that_evaluated_nothing_is_refused(tmp_path: Path) -> None:
    """A run all of whose rows train has no figures to compare."""
    copy = tmp_path / "copy"
    shutil.copytree(GOLDEN / "cooc", copy)
    table = pq.read_table(copy / "predictions.parquet")
    pq.write_table(table.slice(0, 0), copy / "predictions.parquet")
    with pytest.raises(ConfigError, match="copy was evaluated on no row, since all rows train"):
        compare_runs([copy])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'RUN' or option '--cache'."),
        (["runs/a", "--cache", "a.zarr"], "Pass either runs or --cache."),
        (["runs/a", "--split", "test"], "--split, --source and --pooling are for --cache."),
    ],
)
def test_usage_that_contradicts_itself(arguments: list[str], message: str) -> None:
    """Runs and a cache together, or options of the one with the other, are bad usage."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"Error: {message}")


def test_a_page_that_cannot_be_written_is_told_first(runs: list[Path], tmp_path: Path) -> None:
    """A folder in place of the page, or a folder that is not there, is refused."""
    for place, message in (
        (tmp_path, f"error: --output {tmp_path} is a folder. Pass a file"),
        (tmp_path / "no/p.html", f"error: --output {tmp_path / 'no/p.html'}: the folder"),
    ):
        result = invoke(*runs, "--output", place)
        assert result.exit_code == 1
        assert result.stderr.startswith(message)


def test_the_page_of_one_run_has_its_texts(texts_run: Run, tmp_path: Path) -> None:
    """It lies outside of the run and shows what the run does not hold; figures are the run's."""
    page = tmp_path / "p.html"
    result = invoke(texts_run.path, "--output", page, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        "path": str(texts_run.path),
        "page": str(page),
        **json.loads((texts_run.path / "metrics.json").read_text()),
    }
    table = pq.read_table(texts_run.path / "predictions.parquet").to_pylist()
    doubtful = min(table, key=lambda row: row[f"p_{row['predicted']}"])
    with (texts_run.path.parent / "toy.csv").open(encoding="utf-8") as file:
        text = [*csv.reader(file)][1 + doubtful["row"]][0]
    shown = markupsafe.escape(text[:40])
    assert shown in page.read_text("utf-8")
    assert shown not in (texts_run.path / "report.html").read_text("utf-8")


def test_a_page_without_texts_says_why(runs: list[Path], tmp_path: Path) -> None:
    """Where the texts are not found, one sentence says so and the page has the rows' numbers."""
    result = invoke(runs[0], "--output", tmp_path / "p.html")
    assert result.exit_code == 0
    assert result.stdout.startswith("head ")
    assert re.fullmatch(
        r"warning: the page of .*mean shows rows without texts, since .*\.\n", result.stderr
    )
