"""Draw the pictures of README.md from the records in results/.

    python benchmarks/plots.py [--results benchmarks/results]

Reads questions.json (`questions.py`) and paper*.json (`rerun.py paper`), writes SVG beside them:
accuracy against seconds, accuracy over depth, and where the time of a frozen backbone goes. The
same records give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
NAMES = {"mr": "MR", "sst2": "SST-2", "r8": "R8", "r52": "R52"}
FAMILIES = {
    "frozen": ("#0072b2", "frozen features"),
    "lora": ("#d55e00", "fine-tuned"),
    "full": ("#d55e00", "fine-tuned"),
    "zero-shot": ("#009e73", "prompted"),
    "few-shot": ("#009e73", "prompted"),
}
POOLINGS = {"single": ("#0072b2", "mean over tokens"), "last": ("#d55e00", "last token")}
STAGES = {"extract": "#56b4e9", "read": "#f0e442", "fit": "#0072b2"}
TICKS = (10, 30, 100, 300, 1000, 3000)
STYLE: Any = {  # of the keys that matplotlib knows
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "llmembed",  # the same ids in every file
}
Rows = Sequence[Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw every picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default=str(RESULTS), help="folder of the records")
    folder = Path(parser.parse_args(arguments).results)
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))["rows"]
    cases: dict[str, Any] = {}
    for path in sorted(folder.glob("paper*.json")):
        cases |= json.loads(path.read_text(encoding="utf-8"))["cases"]
    if not cases:
        record = folder / "paper.json"
        sys.exit(f"{folder} has no paper*.json; run rerun.py paper --output {record} first")
    with mpl.rc_context(STYLE):
        for name, figure in (
            ("accuracy_seconds", accuracy_against_seconds(rows)),
            ("accuracy_depth", accuracy_over_depth(cases)),
            ("time_split", time_split(rows)),
        ):
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
            print(path)


def accuracy_against_seconds(rows: Rows) -> Figure:
    """Draw each method of `questions.py` at its CPU seconds, with its 95 % interval."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(4.6 * len(names), 3.6), layout="constrained")
    for axes, name in zip(_panels(figure, len(names)), names, strict=True):
        own = [row for row in rows if row["data"] == name]
        for row in own:
            _draw_method(axes, row, below=any(_is_above(other, row) for other in own))
        axes.set(title=NAMES.get(name, name), xscale="log", xlabel="CPU seconds, texts to answers")
        axes.set_xticks(TICKS, map(str, TICKS))
        axes.minorticks_off()
        axes.set_xlim(TICKS[0], TICKS[-1])
    figure.axes[0].set_ylabel("accuracy (95 % interval)")
    return figure


def _is_above(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether the other is the same method's better variant, whose name goes above."""
    same = other["method"].split()[0] == row["method"].split()[0]
    return same and (other["accuracy"], other["cpu_s"]) > (row["accuracy"], row["cpu_s"])


def _draw_method(axes: Axes, row: Mapping[str, Any], *, below: bool) -> None:
    color, _ = FAMILIES[row["method"].split()[0]]
    accuracy, (low, high) = row["accuracy"], row["interval"]
    axes.errorbar(
        row["cpu_s"],
        accuracy,
        yerr=[[accuracy - low], [high - accuracy]],
        fmt="o",
        color=color,
        markersize=5,
        linewidth=1,
    )
    axes.annotate(
        row["method"],
        (row["cpu_s"], accuracy),
        xytext=(5, -11 if below else 4),
        textcoords="offset points",
        color=color,
        fontsize=8,
    )


def accuracy_over_depth(cases: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the accuracy of single layers, a panel a data set."""
    names = [name for name in NAMES if depth_curve(cases, name, "single")]
    figure = Figure(figsize=(3 * len(names), 2.9), layout="constrained")
    for axes, name in zip(_panels(figure, len(names)), names, strict=True):
        for fit, (color, label) in POOLINGS.items():
            points = depth_curve(cases, name, fit)
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=label, markersize=3)
        axes.set(title=NAMES[name], xlabel="layer")
    figure.axes[0].set_ylabel("accuracy, LDA on one layer")
    figure.axes[-1].legend(loc="lower right")
    return figure


def depth_curve(
    cases: Mapping[str, Mapping[str, Any]], name: str, fit: str
) -> list[tuple[int, float]]:
    """Gather (layer, accuracy) of one kind of fit on one data set, by layer.

    >>> cases = {"mr/last-12": {"accuracy": 0.8}, "mr/last-03": {"accuracy": 0.7}}
    >>> depth_curve(cases, "mr", "last")
    [(3, 0.7), (12, 0.8)]
    """
    found = ((re.fullmatch(rf"{name}/{fit}-(\d+)", case), case) for case in cases)
    return sorted((int(match[1]), cases[case]["accuracy"]) for match, case in found if match)


def time_split(rows: Rows) -> Figure:
    """Draw where the wall time of the methods on frozen features goes."""
    rows = [row for row in rows if row["method"].startswith("frozen")]
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1), layout="constrained")
    (axes,) = _panels(figure, 1)
    labels = [f"{NAMES.get(row['data'], row['data'])}, {row['method']}" for row in rows]
    start = [0.0] * len(rows)
    for stage, color in STAGES.items():
        seconds = [float(row["stages"][stage]) for row in rows]
        axes.barh(labels, seconds, left=start, color=color, label=stage)
        start = [a + b for a, b in zip(start, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _panels(figure: Figure, n: int) -> list[Axes]:
    return [figure.add_subplot(1, n, index + 1) for index in range(n)]


if __name__ == "__main__":
    main()
