"""Runs beside each other, judged on the same rows: as a document, as lines, and as one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmembed.common.errors import ConfigError, shown
from llmembed.common.replace import standing
from llmembed.train.measures import Floats, Labels, Sets
from llmembed.train.reports.baselines import NAMES as BASELINES
from llmembed.train.reports.page import render
from llmembed.train.reports.significance import FIGURES, N_SAMPLES, N_SWAPS, SEED, judge
from llmembed.train.runs.predictions import PREDICTIONS_FILE, read_predictions
from llmembed.train.runs.record import (
    CONFIG_FILE,
    METRICS_FILE,
    check_config,
    damage_told,
    no_run,
    read_json,
)

METHOD = (
    "Intervals hold 95 %. Differences are those from the first run, on the same rows. p: exact "
    "McNemar test (accuracy), paired t-test (NLL), paired randomisation with "
    f"{N_SWAPS:,} draws of seed {SEED} (macro F1, ECE, whose intervals are from {N_SAMPLES:,} "
    "bootstrap samples of the rows); corrected: after Holm, over the runs. A p above 0.05 is no "
    "proof that two are alike."
)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A run's record, and what it said about the evaluation rows, in their order."""

    path: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    eval_split: str
    described: Mapping[str, Any]  # what `--json` says of it besides name and figures
    rows: Labels  # int64 `[N]`, row in the evaluation split
    labels: Labels  # int64 `[N]`, index of the true class, or of several labels a text `[N, C]`
    proba: Floats  # float64 `[N, C]`
    predicted: Sets | None  # `[N, C]`, labels that are given, where a text may have several


def compare_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Compare runs that were evaluated on the same rows with the first of them.

    Returns:
        What `--json` prints: `eval_split`, `n_eval`, `runs` and `baselines`, each with its figures,
        intervals, and for runs the differences (`llmembed.train.reports.significance.judge`).

    Raises:
        ConfigError: a run is named twice, or two were not evaluated on the same rows.
        RunNotFoundError: there is no such folder.
        RunFormatError: a file is missing or is not what it should be.
    """
    _check_once(paths)
    runs = [read_run(path) for path in paths]
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    given = [run.predicted for run in runs if run.predicted is not None]
    judged = judge(runs[0].labels, [run.proba for run in runs], given or None)
    return {
        "eval_split": runs[0].eval_split,
        "n_eval": len(runs[0].rows),
        "runs": [
            {"name": name, **run.described, **found}
            for run, name, found in zip(runs, _names(paths), judged, strict=True)
        ],
        "baselines": {
            BASELINES.get(name, name): figures
            for name, figures in runs[0].metrics.get("baselines", {}).items()
            if "missing" not in figures
        },
        "method": METHOD,
    }


def read_run(path: Path) -> Evaluated:
    """Read what a run said about its evaluation rows; its weights stay where they are.

    Raises:
        ConfigError: it was evaluated on no row.
        RunNotFoundError: there is no such folder.
        RunFormatError: a file is missing or is not what it should be.
    """
    folder = folder_of(path)
    config = read_json(folder / CONFIG_FILE)
    check_config(config, folder / CONFIG_FILE)
    metrics = read_json(folder / METRICS_FILE)
    found = read_predictions(folder / PREDICTIONS_FILE, config["labels"])
    order = np.argsort(found.rows, kind="stable")
    rows, labels, proba = found.rows[order], found.labels[order], np.exp(found.log_proba[order])
    if not len(rows):
        raise ConfigError(
            f"{path} was evaluated on no row, since all rows train, so it has no figures. Extract "
            "a test split, and fit again."
        )
    with damage_told(folder / METRICS_FILE):
        return Evaluated(
            path=path,
            config=config,
            metrics=metrics,
            eval_split=str(metrics["eval_split"]),
            described=_described(path, config, metrics),
            rows=rows,
            labels=labels,
            proba=proba,
            predicted=None if found.predicted is None else found.predicted[order],
        )


def folder_of(path: Path) -> Path:
    """Find the folder of a run, also of one whose fit was killed while it replaced it.

    Raises:
        RunNotFoundError: there is no such folder.
    """
    folder = standing(path)
    if not folder.is_dir():
        raise no_run(path)
    return folder


def _check_once(paths: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise ConfigError(
                f"{seen[path.resolve()]} and {path} are one run, which does not differ from "
                "itself. Name each run once."
            )
        seen[path.resolve()] = path


def _check_comparable(one: Evaluated, other: Evaluated) -> None:
    """Refuse runs that were not evaluated on the same rows of the same texts."""
    caches = [run.config.get("cache", {}) for run in (one, other)]
    splits = [run.eval_split for run in (one, other)]
    texts = [cache.get("eval_fingerprint") for cache in caches]
    found = ""
    if splits[0] != splits[1]:
        found = f"the one on {splits[0]}, the other on {splits[1]}"
    elif one.config["labels"] != other.config["labels"]:
        found = "their classes differ"
    elif (one.predicted is None) != (other.predicted is None):
        found = "in one of them a text may have several labels"
    elif caches[0].get("fingerprint") != caches[1].get("fingerprint"):
        if None in texts:
            found = "at least one, of an earlier version, does not say on which texts"
        elif texts[0] != texts[1]:
            found = f"their data sets have fingerprints {texts[0]!s:.8} and {texts[1]!s:.8}"
    if not found and not np.array_equal(one.rows, other.rows):
        found = f"{len(one.rows)} and {len(other.rows)} rows are not the same ones"
    if not found and not np.array_equal(one.labels, other.labels):
        differ = (one.labels != other.labels).reshape(len(one.rows), -1).any(axis=1)
        row = int(one.rows[np.argmax(differ)])
        found = f"the label of row {row} differs"
    if found:
        raise ConfigError(
            f"{one.path} and {other.path} were not evaluated on the same rows: {found}. Fit both "
            "on caches of the same texts, with the same --eval-split and --seed."
        )


def _names(paths: Sequence[Path]) -> list[str]:
    """Name runs by their folders, or by their paths where these are not all different."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _described(path: Path, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": str(path),
        "fusion": config["architecture"]["fusion"],
        "head": config["architecture"]["head"],
        "features": config["features"],
        "n_parameters": int(metrics["n_parameters"]),
        "seconds": float(metrics["seconds"]["total"]),
    }


def comparison_table(document: Mapping[str, Any]) -> str:
    """Lay out a comparison for a terminal: a block a figure, a line a run."""
    runs = [{**run, "name": shown(run["name"])} for run in document["runs"]]
    baselines = {shown(name): figures for name, figures in document["baselines"].items()}
    width = max(len(name) for name in [*(run["name"] for run in runs), *baselines])
    lines = [f"evaluated on {shown(document['eval_split'])}, {document['n_eval']:,} rows"]
    for name, heading in FIGURES.items():
        titles = "  95 % interval     difference  95 % interval            p  corrected"
        lines += [
            "",
            f"{heading:<{width}}   {'value':>6}{titles if len(runs) > 1 else titles[:15]}",
        ]
        lines += [
            f"{run['name']:<{width}}  {run[name]:7.4f}  {_range(run[f'{name}_ci95'])}"
            + _difference(run, name)
            for run in runs
        ]
        lines += [
            f"{of:<{width}}  {figures[name]:7.4f}  {_range(figures.get(f'{name}_ci95'))}  baseline"
            for of, figures in baselines.items()
            if name in figures
        ]
    lines += ["", f"{'':<{width}}  {'parameters':>13}  {'seconds':>9}"]
    lines += [
        f"{run['name']:<{width}}  {run['n_parameters']:13,}  {run['seconds']:9.1f}" for run in runs
    ]
    return "\n".join([*lines, *(["", document["method"]] if len(runs) > 1 else [])])


def _difference(run: Mapping[str, Any], figure: str) -> str:
    if run["against_first"] is None:
        return ""
    test = run["against_first"][figure]
    return (
        f"  {test['difference']:+11.4f}  {_range(test['ci95'], '+'):<17}  "
        f"{test['p']:8.2g}  {test['p_holm']:9.2g}"
    )


def _range(interval: Sequence[float] | None, sign: str = "") -> str:
    text = "-" if interval is None else f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"
    return f"{text:<16}"


def comparison_page(document: Mapping[str, Any]) -> str:
    """Lay out a comparison as a page."""
    runs = document["runs"]
    tables = [(heading, [*_figure_rows(document, name)]) for name, heading in FIGURES.items()]
    sizes = [
        (run["name"], run["fusion"], run["head"], _layers(run), run["n_parameters"], run["seconds"])
        for run in runs
    ]
    return render("compare.html.j2", document=document, tables=tables, sizes=sizes)


def _figure_rows(document: Mapping[str, Any], figure: str) -> Iterator[tuple[Any, ...]]:
    for run in document["runs"]:
        test = (run["against_first"] or {}).get(figure, {})
        ends = *(run[f"{figure}_ci95"] or (None, None)), *(test.get("ci95") or (None, None))
        yield (
            run["name"],
            run[figure],
            *ends[:2],
            test.get("difference"),
            *ends[2:],
            test.get("p"),
            test.get("p_holm"),
        )
    for name, found in document["baselines"].items():
        if figure in found:
            ends = found.get(f"{figure}_ci95") or (None, None)
            yield (f"{name} (baseline)", found[figure], *ends, *[None] * 5)


def _layers(run: Mapping[str, Any]) -> str:
    named = (f"{f['source']}/{f['pooling']} {f['layer']}" for f in run["features"])
    return ", ".join(named)
