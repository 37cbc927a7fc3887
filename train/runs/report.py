"""A run as one page of HTML, for people: its figures, its confusions, and how it came about.

The page stands alone (no script, no font, no picture from elsewhere), so it can be mailed. It says
nothing that config.json and metrics.json don't.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_LARGEST_MATRIX = 20  # classes; beyond, the confusions are listed
_N_LISTED = 20
_SHOWN = 5
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 0.5em 0 1.5em } th { text-align: left }
th, td { padding: 0.15em 0.8em; border-bottom: 1px solid #ddd; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
"""


def report_page(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Lay out a run.

    Args:
        config: content of config.json.
        metrics: content of metrics.json.
    """
    architecture = config["architecture"]
    title = f"{architecture['fusion']} with head {architecture['head']}"
    features = (f"layer {f['layer']} ({f['source']}, {f['pooling']})" for f in config["features"])
    options = {name: value for name, value in config["fit"].items() if value not in (None, [], ())}
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(', '.join(features))}</p>",
        _table((), _figures(metrics)),
        *_seeds(metrics),
        "<h2>Classes</h2>",
        _table(
            ("class", "precision", "recall", "F1", "examples", "predicted"),
            ([name, *row.values()] for name, row in metrics["per_class"].items()),
        ),
        "<h2>Confusions</h2>",
        _confusions(config["labels"], metrics["confusion"]),
        "<h2>Rows</h2>",
        _table(
            ("share", "split", "examples"),
            ([name, *share.values()] for name, share in metrics["splits"].items()),
        ),
        "<h2>Options</h2>",
        _table((), options.items()),
        "<h2>Made with</h2>",
        _table((), [*config["versions"].items(), ("device", config["device"])]),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n' + "\n".join(sections) + "\n</html>\n"


def note_of_absent(metrics: Mapping[str, Any]) -> str:
    """Name the classes that no evaluation row has, to stand beside the macro F1; "" if none is.

    >>> note_of_absent({"classes_without_rows": ["maybe"], "per_class": {"no": 0, "maybe": 0}})
    '1 of 2 classes has no evaluation row: maybe'
    """
    absent = metrics.get("classes_without_rows", [])
    if not absent:
        return ""
    more = f", and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
    have = "has" if len(absent) == 1 else "have"
    named = ", ".join(absent[:_SHOWN]) + more
    return f"{len(absent)} of {len(metrics['per_class'])} classes {have} no evaluation row: {named}"


def _figures(metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not metrics["n_eval"]:
        return [("evaluated on", "nothing, since all rows train")]
    low, high = metrics["accuracy_ci95"]
    return [
        ("evaluated on", f"{metrics['eval_split']}, {metrics['n_eval']} examples"),
        ("accuracy", f"{metrics['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})"),
        ("macro F1", metrics["macro_f1"]),
        *([("classes", absent)] if (absent := note_of_absent(metrics)) else []),
        ("NLL, before calibration", f"{metrics['nll']:.4f}, {metrics['nll_uncalibrated']:.4f}"),
        ("ECE, before calibration", f"{metrics['ece']:.4f}, {metrics['ece_uncalibrated']:.4f}"),
        ("parameters", f"{metrics['n_parameters']:,}"),
        ("seconds", f"{metrics['seconds']['total']:.1f}"),
    ]


def _seeds(metrics: Mapping[str, Any]) -> list[str]:
    rows = metrics["per_seed"]
    if len(rows) == 1 or not metrics["n_eval"]:
        return []
    names = ("seed", "val_loss", "accuracy", "macro_f1", "nll")
    spread = metrics["over_seeds"]["accuracy"]
    note = (
        f"Accuracy {spread['mean']:.4f}, standard deviation {spread['std']:.4f}. The page is about "
        "the seed with the lowest validation loss."
    )
    return [
        "<h2>Seeds</h2>",
        f"<p>{note}</p>",
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
    listed = sorted(errors, key=lambda error: -error[0])[:_N_LISTED]
    return _table(("examples", "true", "predicted"), listed)


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
