"""A run as lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmembed.common.errors import shown

_MOST_CLASSES = 20
_MOST_NAMES = 5
FIGURES_OF_SETS = {
    "micro_f1": "micro F1",
    "samples_f1": "samples F1",
    "ranking_precision": "LRAP",
}
"""What is told besides of a run in which a text may have several labels, and how it is called."""
_BASELINES = {"majority": "majority class", "tfidf": "TF-IDF + LR"}


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Lay out the figures of metrics.json for a terminal."""
    lines = [f"{name:<16} {shown(text)}" for name, text in _figures(metrics)]
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
    head = ("head", described_head(metrics))
    if not metrics["n_eval"]:
        return [head, ("evaluated on", "nothing, since all rows train")]
    low, high = metrics["accuracy_ci95"]
    interval = f"95 % interval {low:.4f}-{high:.4f}"
    absent = note_of_absent(metrics)
    figures = [
        head,
        ("evaluated on", f"{metrics['eval_split']}, {metrics['n_eval']} examples"),
        ("accuracy", f"{metrics['accuracy']:.4f}  ({_of_all(metrics)}{interval})"),
        ("macro F1", f"{metrics['macro_f1']:.4f}" + (f"  ({absent})" if absent else "")),
        *_figures_of_sets(metrics),
        ("NLL", f"{metrics['nll']:.4f}  (uncalibrated {metrics['nll_uncalibrated']:.4f})"),
        ("ECE", f"{metrics['ece']:.4f}  (uncalibrated {metrics['ece_uncalibrated']:.4f})"),
        *_baselines(metrics.get("baselines", {})),
        ("parameters", f"{metrics['n_parameters']:,}"),
        ("seconds", f"{metrics['seconds']['total']:.1f}"),
    ]
    figures[2:2] = notes_of_rows(metrics)
    watched = metrics["splits"]["validation"]
    if watched["split"] != metrics["splits"]["train"]["split"]:
        figures.insert(1, ("early stopping", f"{watched['split']}, {watched['n']} examples"))
    if len(metrics["per_seed"]) > 1:
        spread = metrics["over_seeds"]["accuracy"]
        deviation = f"(standard deviation {spread['std']:.4f})"
        over = f"over {len(metrics['per_seed'])} seeds"
        figures.append((over, f"accuracy {spread['mean']:.4f} {deviation}"))
    return figures


def is_of_sets(metrics: Mapping[str, Any]) -> bool:
    """Tell whether these are the figures of a run in which a text may have several labels."""
    return "samples_f1" in metrics


def _of_all(metrics: Mapping[str, Any]) -> str:
    return "all labels of a text right; " if is_of_sets(metrics) else ""


def _figures_of_sets(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not is_of_sets(metrics):
        return []
    return [(heading, f"{metrics[name]:.4f}") for name, heading in FIGURES_OF_SETS.items()]


def _baselines(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    told = []
    for name, row in rows.items():
        text = f"not known: {row.get('missing')}"
        if "accuracy" in row:
            low, high = row["accuracy_ci95"]
            text = f"{row['accuracy']:.4f}  (95 % interval {low:.4f}-{high:.4f})"
        told.append((_BASELINES[name], text))
    return told


def described_head(metrics: Mapping[str, Any]) -> str:
    """Say what the head of the kept seed is, and how it was chosen."""
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


def notes_of_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what is to be known of the rows: weights, groups, evaluation rows that were trained on.

    >>> notes_of_rows({"splits": {"train": {"n": 9, "n_groups": 3}}})
    [('groups of rows', '3, none on two sides of a fold')]
    """
    train, told = metrics["splits"]["train"], []
    if "weights" in train:
        weights = train["weights"]
        left_out = f", {weights['n_left_out']} rows of 0 left out" * bool(weights["n_left_out"])
        told.append(("weights of rows", f"{weights['min']:g} to {weights['max']:g}{left_out}"))
    if "n_groups" in train:
        told.append(("groups of rows", f"{train['n_groups']}, none on two sides of a fold"))
    repeated = metrics.get("repeated") or {}
    if n_same := repeated.get("n_same_text", 0):
        found = f"{n_same} of {metrics['n_eval']} evaluation rows have the text of a training row"
        told.append(("repeated texts", found + _pairs(repeated.get("same_text", []), n_same)))
    near = repeated.get("near", {"n": 0})
    if near["n"]:
        found = (
            f"{near['n']} of {near['n_checked']} evaluation rows, by a cosine of "
            f"{near['cosine']:g} to a training row"
        )
        told.append(("near duplicates", found + _pairs(near["pairs"], near["n"])))
    return told


def _pairs(pairs: Sequence[Mapping[str, Any]], n: int) -> str:
    """Name the first of n pairs of an evaluation row and a training row.

    >>> _pairs([{"row": 4, "train_row": 11}], 2)
    ': 4 to 11, ...'
    """
    named = [f"{one['row']} to {one['train_row']}" for one in pairs[:_MOST_NAMES]]
    named += ["..."] * (0 < len(named) < n)
    return f": {', '.join(named)}" if named else ""


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
