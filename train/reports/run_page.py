"""A run as one page: what it gets right and wrong, how sure it is, and how it was made.

The page says nothing that the run's folder doesn't, but for texts, which a run holds only where it
was told to, and the sweep of the same cache beside it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmembed.common.errors import LLMEmbedError
from llmembed.train.config import FitConfig
from llmembed.train.measures import names_of, wilson_interval
from llmembed.train.measures.metrics import ECE_BINS
from llmembed.train.measures.sets import as_decisions, f1_of_rows
from llmembed.train.reports.baselines import NAMES
from llmembed.train.reports.charts import Chart, Line, depth_chart, line_chart, lines_over_depth
from llmembed.train.reports.page import figure, render
from llmembed.train.reports.report import (
    FIGURES_OF_SETS,
    described_head,
    is_of_sets,
    note_of_absent,
    notes_of_rows,
)
from llmembed.train.runs.predictions import PREDICTIONS_FILE, Predictions, read_predictions
from llmembed.train.runs.record import CONFIG_FILE, DAMAGE, METRICS_FILE, read_json

SWEEP_FILE = "sweep.json"
_MOST_ROWS = 15  # of mistakes, and of rows it is least sure of
_MOST_CONFUSIONS = 20
_MOST_CLASSES = 100  # in the matrix: beyond, those with the most errors
_LEVELS = 8  # shades of the matrix
_COVERAGES = np.arange(1, 21) / 20
# Options of extraction that a source's recipe records under the same names.
_OF_RECIPE = (
    *("revision", "template", "max_length", "compute_dtype", "dtype", "quantize"),
    "trust_remote_code",
)
_OF_DATASET = (
    *("config", "text_column", "label_column", "unlabelled", "limit", "seed"),
    *("delimiter", "csv_escape", "csv_quote", "label_separator", "weight_column", "group_column"),
)


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a page is made from."""

    config: Mapping[str, Any]
    """Content of config.json."""
    metrics: Mapping[str, Any]
    """Content of metrics.json."""
    predictions: Predictions
    sweep: Mapping[str, Any] | None = None
    """Content of the sweep.json of the same cache, if there is one."""


def parts_of(run: Path) -> RunParts:
    """Read what a page of a run is made from.

    Raises:
        RunFormatError: a file is missing or is not what it should be.
    """
    config, metrics = read_json(run / CONFIG_FILE), read_json(run / METRICS_FILE)
    return RunParts(
        config=config,
        metrics=metrics,
        predictions=read_predictions(run / PREDICTIONS_FILE, config["labels"]),
        sweep=find_sweep(run, config["cache"]["fingerprint"]),
    )


def find_sweep(run: Path, fingerprint: str | None) -> dict[str, Any] | None:
    """Find the table of the latest sweep of a cache in the folders beside a run."""
    tables = sorted(run.absolute().parent.glob(f"*/{SWEEP_FILE}"), key=_age)
    for path in tables:
        try:
            table = read_json(path)
            if table["cache"]["fingerprint"] == fingerprint:
                depth_chart(table)
                return table
        except (LLMEmbedError, *DAMAGE):
            continue  # no sweep of ours
    return None


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def report_page(run: Path | RunParts, texts: Sequence[str] | None = None) -> str:
    """Lay out a run as a page that stands alone.

    Args:
        run: its folder, or what it is made from.
        texts: of the evaluation split, in the order of its rows; None shows the numbers of rows,
            and the texts that the run holds, if any.

    Raises:
        RunFormatError: a file of the folder is missing or is not what it should be.
    """
    parts = parts_of(run) if isinstance(run, Path) else run
    config, metrics = parts.config, parts.metrics
    architecture = config["architecture"]
    of_sets = is_of_sets(metrics)
    dataset = config["cache"].get("dataset")
    where = f" on {dataset}" if dataset else ""
    fusion = "stack" if "members" in metrics.get("chosen", {}) else architecture["fusion"]
    return render(
        "run.html.j2",
        title=f"{fusion} with head {architecture['head']}{where}",
        features=_features(config),
        metrics=metrics,
        head=described_head(metrics),
        cards=_cards(metrics),
        standings=_standings(metrics),
        baselines=_told_baselines(metrics),
        seeds=_seeds(metrics),
        absent=note_of_absent(metrics),
        notes=notes_of_rows(metrics),
        matrix=_matrix(config["labels"], metrics["confusion"])
        if metrics.get("confusion")
        else None,
        confusions=[] if of_sets else _confusions(config["labels"], parts.predictions),
        classes=[[name, *row.values()] for name, row in metrics["per_class"].items()],
        of_sets=of_sets,
        charts=[*_charts(parts)],
        of_rows=_shown_rows(parts, texts),
        stages=_stages(metrics),
        shares=[[name, share["split"], share["n"]] for name, share in metrics["splits"].items()],
        commands=[*_commands(config)],
        options=[
            [name, figure(one)] for name, one in config["fit"].items() if one not in (None, [], ())
        ],
        versions=[*config["versions"].items(), ("device", config["device"])],
    )


def _features(config: Mapping[str, Any]) -> str:
    groups: dict[str, list[str]] = {}
    for feature in config["features"]:
        groups.setdefault(f"{feature['source']}, {feature['pooling']}", []).append(
            str(feature["layer"])
        )
    return "; ".join(
        f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(layers)} ({name})"
        for name, layers in groups.items()
    )


def _interval(low: float, high: float) -> str:
    return f"95 % interval {low:.4f} to {high:.4f}"


def _cards(metrics: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    if not metrics["n_eval"]:
        return []
    cards = [
        ("Accuracy", metrics["accuracy"], _interval(*metrics["accuracy_ci95"])),
        ("Macro F1", metrics["macro_f1"], "mean over the classes"),
        *_cards_of_sets(metrics),
        ("NLL", metrics["nll"], f"uncalibrated {metrics['nll_uncalibrated']:.4f}"),
        ("ECE", metrics["ece"], f"uncalibrated {metrics['ece_uncalibrated']:.4f}"),
    ]
    for key, row in metrics.get("baselines", {}).items():
        if "accuracy" in row:
            gain = 100 * (metrics["accuracy"] - row["accuracy"])
            note = f"whose accuracy is {row['accuracy']:.4f}"
            cards.append((f"Points over {NAMES[key]}", f"{gain:+.1f}", note))
    return cards


def _cards_of_sets(metrics: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    if not is_of_sets(metrics):
        return []
    notes = ("all labels of all texts together", "mean over the texts", "labels in their order")
    named = zip(FIGURES_OF_SETS.items(), notes, strict=True)
    return [
        (heading[0].upper() + heading[1:], metrics[name], note) for (name, heading), note in named
    ]


def _standings(metrics: Mapping[str, Any]) -> list[list[Any]]:
    """Give the figures of the run, then those of the baselines."""
    known = {NAMES[key]: row for key, row in reversed(metrics.get("baselines", {}).items())}
    return [
        [name, row["accuracy"], *row["accuracy_ci95"], row["macro_f1"], row["nll"], row["ece"]]
        for name, row in {"this run": metrics, **known}.items()
        if row.get("accuracy") is not None
    ]


def _told_baselines(metrics: Mapping[str, Any]) -> list[str]:
    rows = metrics.get("baselines", {})
    told = []
    if "majority" in rows:
        row = rows["majority"]
        told.append(f"The majority class of {row['n_train']:,} training rows is “{row['label']}”.")
    tfidf = rows.get("tfidf", {"missing": "--baseline none"} if rows else {})
    if "missing" in tfidf:
        told.append(f"{NAMES['tfidf']} is missing: {tfidf['missing']}.")
    elif tfidf:
        said = ", ".join(f"{name} {value}" for name, value in tfidf["settings"].items())
        told.append(
            f"{NAMES['tfidf']} was fitted to the texts of {tfidf['n_train']:,} training rows, all "
            f"that are not evaluated, on {tfidf['n_features']:,} features ({said})."
        )
    return told


def _seeds(metrics: Mapping[str, Any]) -> list[list[Any]]:
    rows = metrics["per_seed"]
    if len(rows) == 1 or not metrics["n_eval"]:
        return []
    names = ("kept", "val_loss", "accuracy", "macro_f1", "nll")
    return [[str(row["seed"]), *(row[name] for name in names)] for row in rows]


@dataclass(frozen=True, kw_only=True)
class _Cell:
    count: int
    shade: str  # class of the style: h1 to h8 for hits, e1 to e8 for errors; "" for none
    share: float  # of the row's examples


def _matrix(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Lay out the matrix such that classes that are taken for each other stand side by side."""
    confusion = np.asarray(counts)
    order = _by_confusion(confusion)
    totals = confusion.sum(axis=1)
    rows = []
    for true in order:
        cells = []
        for predicted in order:
            share = confusion[true, predicted] / max(totals[true], 1)
            shade = "" if not share else f"{'eh'[true == predicted]}{int(np.ceil(share * _LEVELS))}"
            cells.append(
                _Cell(count=int(confusion[true, predicted]), shade=shade, share=float(share))
            )
        rows.append((labels[true], int(totals[true]), cells))
    return {"labels": [labels[k] for k in order], "rows": rows, "n_classes": len(labels)}


def _by_confusion(confusion: npt.NDArray[Any]) -> list[int]:
    """Order classes: from the one with the most errors on, each time the likest to the last.

    >>> _by_confusion(np.array([[9, 0, 1], [0, 9, 0], [3, 0, 7]]))
    [0, 2, 1]
    """
    errors = confusion - np.diag(np.diag(confusion))
    errors = errors + errors.T
    rest = np.argsort(-errors.sum(axis=1), kind="stable")[:_MOST_CLASSES].tolist()
    if len(rest) == 2:
        return [0, 1]
    order: list[int] = []
    while rest:
        likest = max(rest, key=lambda k: errors[order[-1], k]) if order else rest[0]
        chosen = likest if order and errors[order[-1], likest] else rest[0]
        order.append(chosen)
        rest.remove(chosen)
    return order


def _confusions(labels: Sequence[str], predictions: Predictions) -> list[list[Any]]:
    """List the commonest errors: true, predicted, examples, their share of the true class."""
    true, predicted = predictions.labels, predictions.log_proba.argmax(axis=1)
    wrong = true != predicted
    pairs, counts = np.unique(np.stack([true, predicted])[:, wrong], axis=1, return_counts=True)
    totals = np.bincount(true, minlength=len(labels))
    return [
        [labels[pairs[0, k]], labels[pairs[1, k]], int(counts[k]), counts[k] / totals[pairs[0, k]]]
        for k in np.argsort(-counts, kind="stable")[:_MOST_CONFUSIONS]
    ]


def _charts(parts: RunParts) -> Iterator[Chart]:
    metrics, predictions = parts.metrics, parts.predictions
    if metrics["n_eval"]:
        proba, labels = np.exp(predictions.log_proba), predictions.labels
        if is_of_sets(metrics):
            proba, labels = as_decisions(proba, labels)
        confidence, is_right = proba.max(axis=1), proba.argmax(axis=1) == labels
        yield _reliability(confidence, is_right)
        if not is_of_sets(metrics):
            yield _coverage(confidence, is_right)
    kept = next(row for row in metrics["per_seed"] if row["kept"])
    if kept.get("losses"):
        yield from _learning(kept["losses"])
    if parts.sweep is not None:
        yield depth_chart(parts.sweep)
    if metrics.get("feature_shares") and len(parts.config["features"]) > 1:
        yield _feature_shares(parts.config["features"], metrics["feature_shares"])


def _reliability(confidence: npt.NDArray[Any], is_right: npt.NDArray[Any]) -> Chart:
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    found = [np.flatnonzero(bins == k) for k in np.unique(bins)]
    shares = [(int(is_right[rows].sum()), len(rows)) for rows in found]
    low, high = zip(*(wilson_interval(*share) for share in shares), strict=True)
    line = Line(
        name="accuracy",
        x=[float(confidence[rows].mean()) for rows in found],
        y=[right / n for right, n in shares],
        low=low,
        high=high,
        n=[n for _, n in shares],
    )
    return line_chart(
        "Reliability",
        f"How often it is right where it is so sure, in up to {ECE_BINS} bins of equal width, with "
        "95 % intervals; on the dashed line the two agree.",
        [line],
        x="confidence",
        y="accuracy",
        diagonal=True,
    )


def _coverage(confidence: npt.NDArray[Any], is_right: npt.NDArray[Any]) -> Chart:
    order = np.argsort(-confidence, kind="stable")
    right = np.cumsum(is_right[order])
    ends = np.unique(np.ceil(_COVERAGES * len(order)).astype(int))
    low, high = zip(*(wilson_interval(int(right[n - 1]), int(n)) for n in ends), strict=True)
    line = Line(
        name="accuracy",
        x=(ends / len(order)).tolist(),
        y=(right[ends - 1] / ends).tolist(),
        low=low,
        high=high,
        n=ends.tolist(),
    )
    return line_chart(
        "Accuracy against coverage",
        "Accuracy on the rows that remain when the least certain are left out, with 95 % "
        "intervals.",
        [line],
        x="share of the rows that is answered",
        y="accuracy",
    )


def _learning(losses: Mapping[str, Sequence[float | None]]) -> Iterator[Chart]:
    lines = []
    for key, name in (("train_loss", "training rows"), ("val_loss", "validation rows")):
        epochs = enumerate(losses.get(key, ()), start=1)
        points = [(epoch, loss) for epoch, loss in epochs if loss is not None]
        if points:
            x, y = zip(*points, strict=True)
            lines.append(Line(name=name, x=x, y=y))
    if lines:
        yield line_chart(
            "Learning curves",
            "Loss after each epoch; on training rows it is the mean over the epoch, with dropout.",
            lines,
            x="epoch",
            y="loss",
        )


def _feature_shares(features: Sequence[Mapping[str, Any]], shares: Mapping[str, Any]) -> Chart:
    return line_chart(
        "Share of each layer",
        f"Measured is {shares['measure']}; all add up to 1.",
        lines_over_depth(zip(features, shares["shares"], strict=True)),
        x="layer",
        y="share",
        bars=True,
    )


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What is told of each evaluation row."""

    true: Sequence[str]
    predicted: Sequence[str]
    confidence: npt.NDArray[Any]
    is_wrong: npt.NDArray[Any]
    figure: npt.NDArray[Any]
    heads: tuple[str, str]  # of the confidence and the figure


def _judged(predictions: Predictions, labels: Sequence[str]) -> _Judged:
    proba = np.exp(predictions.log_proba)
    best = proba.argmax(axis=1)
    return _Judged(
        true=[labels[k] for k in predictions.labels],
        predicted=[labels[k] for k in best],
        confidence=proba.max(axis=1),
        is_wrong=best != predictions.labels,
        figure=np.take_along_axis(proba, predictions.labels[:, None], axis=1)[:, 0],
        heads=("probability", "of the true class"),
    )


def _judged_sets(predictions: Predictions, labels: Sequence[str]) -> _Judged:
    proba, sets, given = np.exp(predictions.log_proba), predictions.labels, predictions.predicted
    assert given is not None
    return _Judged(
        true=[", ".join(names) for names in names_of(sets, labels)],
        predicted=[", ".join(names) for names in names_of(given, labels)],
        confidence=np.maximum(proba, 1 - proba).mean(axis=1),
        is_wrong=(sets != given).any(axis=1),
        figure=f1_of_rows(given.astype(np.int64), sets),
        heads=("mean probability", "F1"),
    )


def _shown_rows(parts: RunParts, texts: Sequence[str] | None) -> dict[str, Any]:
    """List the mistakes it is most sure of, and the rows it is least sure of."""
    predictions, labels = parts.predictions, parts.config["labels"]
    if texts is None and predictions.texts is not None:
        texts_of = dict(zip(predictions.rows.tolist(), predictions.texts, strict=True))
    else:
        texts_of = {row: texts[row] for row in predictions.rows.tolist()} if texts else {}
    judged = (_judged if predictions.predicted is None else _judged_sets)(predictions, labels)
    by_confidence = np.argsort(-judged.confidence, kind="stable")
    is_wrong = judged.is_wrong[by_confidence]

    def listed(chosen: npt.NDArray[Any]) -> list[list[Any]]:
        return [
            [
                str(predictions.rows[k]),
                *([texts_of[int(predictions.rows[k])]] if texts_of else []),
                judged.true[k],
                judged.predicted[k],
                float(judged.confidence[k]),
                float(judged.figure[k]),
            ]
            for k in chosen.tolist()
        ]

    return {
        "heads": [
            *("row", *(["text"] if texts_of else [])),
            *("true", "predicted", *judged.heads),
        ],
        "mistakes": listed(by_confidence[is_wrong][:_MOST_ROWS]),
        "uncertain": listed(by_confidence[::-1][:_MOST_ROWS]),
        "split": parts.metrics["eval_split"],
        "has_texts": bool(texts_of),
    }


def _stages(metrics: Mapping[str, Any]) -> list[tuple[str, float | None, str]]:
    """Give for each stage its seconds and how big it was."""
    seconds, size = metrics["seconds"], metrics.get("size")
    rows = metrics["splits"]
    stages: list[tuple[str, float | None, str]] = []
    if size:
        told = f"{size['n_rows']:,} rows, {size['n_tokens']:,} tokens, {bytes_of(size['features'])}"
        stages.append(("extract: features that are read", None, told))
    fitted = f"{rows['train']['n']:,} training rows"
    if metrics["peak_memory_bytes"] is not None:  # as on Windows
        fitted += f", {bytes_of(metrics['peak_memory_bytes'])} RAM"
    stages += [
        ("read", seconds["read"], ""),
        ("fit", seconds["fit"], fitted),
        ("evaluate", seconds["eval"], f"{rows['eval']['n']:,} rows"),
    ]
    tfidf = metrics.get("baselines", {}).get("tfidf", {})
    if "seconds" in tfidf:
        note = f"{tfidf['n_train']:,} texts; once for this data set, not in the total"
        stages.append((NAMES["tfidf"], tfidf["seconds"], note))
    parameters = f"{metrics['n_parameters']:,} parameters"
    return [*stages, ("total", seconds["total"], parameters)]


def bytes_of(n: float) -> str:
    """Write a size in bytes.

    >>> bytes_of(1_234_567), bytes_of(12)
    ('1.2 MB', '12 bytes')
    """
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if n >= 1000**power:
            return f"{n / 1000**power:.1f} {unit}"
    return f"{n:.0f} bytes"


def _commands(config: Mapping[str, Any]) -> Iterator[str]:
    """Write the commands that make this run again, from its texts on where they are known."""
    dataset, known = config["cache"].get("dataset"), config["cache"].get("provenance")
    for name, source in config["sources"].items() if known else ():
        own = [feature for feature in config["features"] if feature["source"] == name]
        recipe, origin = source["recipe"], str(known.get("origin", dataset))
        given = {
            "model": recipe["model"],
            "source": name,
            "layers": ",".join(map(str, sorted({feature["layer"] for feature in own}))),
            "pooling": ",".join(dict.fromkeys(feature["pooling"] for feature in own)),
            "dataset": origin if "/" in origin or "\\" in origin else dataset,
            "cache": config["fit"]["cache"],
            **{key: recipe.get(key) for key in _OF_RECIPE},
            **{key: known.get(key) for key in _OF_DATASET},
        }
        yield _command("llmembed-extract", given)
    defaults = {
        one.name: None if one.default is MISSING else one.default for one in fields(FitConfig)
    }
    changed = {
        name: ",".join(value) if isinstance(value, list | tuple) else value
        for name, value in config["fit"].items()
        if value not in (defaults.get(name), [])
    }
    yield _command("llmembed-fit", changed)


def _command(name: str, options: Mapping[str, Any]) -> str:
    """Write a command.

    >>> _command("llmembed-fit", {"cache": "my cache.zarr", "val_fraction": 0, "overwrite": True})
    "llmembed-fit --cache 'my cache.zarr' --val-fraction 0 --overwrite"
    >>> _command("llmembed-fit", {"class_weight": {"earn": 2.5, "trade": 3.0}})
    'llmembed-fit --class-weight earn=2.5 --class-weight trade=3'
    """
    words = [name]
    for option, value in options.items():
        if value is None or value is False:
            continue
        named = f"--{option.replace('_', '-')}"
        if isinstance(value, Mapping):
            words += [part for name in value for part in (named, f"{name}={value[name]:g}")]
            continue
        words += [named] if value is True else [named, str(value)]
    return shlex.join(words)
