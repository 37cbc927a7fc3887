"""A run for people: as lines for a terminal, and as one page of HTML.

The page stands alone (no script, no font, no picture from elsewhere), so it can be mailed. It says
nothing that config.json and metrics.json don't.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from llmembed.common.errors import shown

_LARGEST_MATRIX = 20  # classes; beyond, the confusions are listed
_MOST_CLASSES = _MOST_ERRORS = 20
_MOST_NAMES = 5
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 0.5em 0 1.5em } th { text-align: left }
th, td { padding: 0.15em 0.8em; border-bottom: 1px solid #ddd; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
"""


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Lay out the figures of metrics.json for a terminal."""
    lines = [f"{name:<16} {text}" for name, text in _figures(metrics)]
    if metrics["n_eval"]:
        rows = [*metrics["per_class"].items()]
        names = [shown(name) for name, _ in rows[:_MOST_CLASSES]]
        width = max(len("class"), *(len(shown(name)) for name, _ in rows))
        lines += ["", f"{'class':<{width}}  precision  recall     F1      n"]
        lines += [
            f"{name:<{width}}  {row['precision']:9.4f}  {row['recall']:6.4f} {row['f1']:6.4f} "
            f"{row['n']:6d}"
            for name, (_, row) in zip(names, rows, strict=False)
        ]
        if len(rows) > _MOST_CLASSES:
            lines.append(f"and {len(rows) - _MOST_CLASSES} more, in metrics.json")
    return "\n".join(lines)


def _figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    head = ("head", _described_head(metrics))
    if not metrics["n_eval"]:
        return [head, ("evaluated on", "nothing, since all rows train")]
    low, high = metrics["accuracy_ci95"]
    absent = note_of_absent(metrics)
    figures = [
        head,
        ("evaluated on", f"{metrics['eval_split']}, {metrics['n_eval']} examples"),
        ("accuracy", f"{metrics['accuracy']:.4f}  (95 % interval {low:.4f}-{high:.4f})"),
        ("macro F1", f"{metrics['macro_f1']:.4f}" + (f"  ({absent})" if absent else "")),
        ("NLL", f"{metrics['nll']:.4f}  (uncalibrated {metrics['nll_uncalibrated']:.4f})"),
        ("ECE", f"{metrics['ece']:.4f}  (uncalibrated {metrics['ece_uncalibrated']:.4f})"),
        ("parameters", f"{metrics['n_parameters']:,}"),
        ("seconds", f"{metrics['seconds']['total']:.1f}"),
    ]
    watched = metrics["splits"]["validation"]
    if watched["split"] != metrics["splits"]["train"]["split"]:
        figures.insert(1, ("early stopping", f"{watched['split']}, {watched['n']} examples"))
    if len(metrics["per_seed"]) > 1:
        spread = metrics["over_seeds"]["accuracy"]
        deviation = f"(standard deviation {spread['std']:.4f})"
        over = f"over {len(metrics['per_seed'])} seeds"
        figures.append((over, f"accuracy {spread['mean']:.4f} {deviation}"))
    return figures


def _described_head(metrics: Mapping[str, Any]) -> str:
    kept = next(row for row in metrics["per_seed"] if row["kept"])
    if "n_epochs" in kept:
        return f"{kept['head']}, {kept['n_epochs']} epochs"
    chosen = f", {metrics['chosen']['fusion']}" if "chosen" in metrics else ""
    is_mean = "n_members" in kept
    how = f"mean of {kept['n_members']}" if is_mean else f"strength {kept['strength']:.3g}"
    accuracy = kept["held_out_accuracy"]
    told = "no row held out"
    if accuracy is not None:
        told = f"accuracy {accuracy:.4f} on the rows that chose it"
    return f"{kept['head']}{chosen}, {how}, {told}"


def note_of_absent(metrics: Mapping[str, Any]) -> str:
    """Name the classes that no evaluation row has, to stand beside the macro F1; "" if none is.

    >>> note_of_absent({"classes_without_rows": ["maybe"], "per_class": {"no": 0, "maybe": 0}})
    '1 of 2 classes has no evaluation row: maybe'
    """
    absent = metrics.get("classes_without_rows", [])
    if not absent:
        return ""
    more = f", and {len(absent) - _MOST_NAMES} more" if len(absent) > _MOST_NAMES else ""
    have = "has" if len(absent) == 1 else "have"
    named = ", ".join(absent[:_MOST_NAMES]) + more
    return f"{len(absent)} of {len(metrics['per_class'])} classes {have} no evaluation row: {named}"


def report_page(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Lay out a run as a page, from the content of config.json and metrics.json."""
    architecture = config["architecture"]
    title = f"{architecture['fusion']} with head {architecture['head']}"
    features = (f"layer {f['layer']} ({f['source']}, {f['pooling']})" for f in config["features"])
    options = {name: value for name, value in config["fit"].items() if value not in (None, [], ())}
    classes = ([name, *row.values()] for name, row in metrics["per_class"].items())
    shares = ([name, *share.values()] for name, share in metrics["splits"].items())
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(', '.join(features))}</p>",
        _table((), _figures(metrics)),
        *_seeds(metrics),
        "<h2>Classes</h2>",
        _table(("class", "precision", "recall", "F1", "examples", "predicted"), classes),
        "<h2>Confusions</h2>",
        _confusions(config["labels"], metrics["confusion"]),
        "<h2>Rows</h2>",
        _table(("share", "split", "examples"), shares),
        "<h2>Options</h2>",
        _table((), options.items()),
        "<h2>Made with</h2>",
        _table((), [*config["versions"].items(), ("device", config["device"])]),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n' + "\n".join(sections) + "\n</html>\n"


def _seeds(metrics: Mapping[str, Any]) -> list[str]:
    rows = metrics["per_seed"]
    if len(rows) == 1 or not metrics["n_eval"]:
        return []
    names = ("seed", "val_loss", "accuracy", "macro_f1", "nll")
    return [
        "<h2>Seeds</h2>",
        "<p>The page is about the seed with the lowest validation loss.</p>",
        _table(names, ([row[name] for name in names] for row in rows)),
    ]


def _confusions(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Give the matrix, rows being the true classes; of many classes only the commonest errors."""
    if len(labels) <= _LARGEST_MATRIX:
        rows = ([name, *row] for name, row in zip(labels, counts, strict=True))
        return _table(("true, predicted:", *labels), rows)
    errors = [
        (count, true, predicted)
        for true, row in zip(labels, counts, strict=True)
        for predicted, count in zip(labels, row, strict=True)
        if count and true != predicted
    ]
    commonest = sorted(errors, key=lambda error: -error[0])[:_MOST_ERRORS]
    return _table(("examples", "true", "predicted"), commonest)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>" if heads else f"<table>\n{body}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return f"<td>{escape(text)}</td>"
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return f'<td class="number">{text}</td>'
