"""Draw accuracy over depth, the picture of README.md, from the records of `rerun paper`.

    python benchmarks plots [--results benchmarks/results/studies]

Reads paper*.json and writes SVG beside them; the same records give the same bytes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import matplotlib as mpl
from matplotlib.figure import Figure

NAMES = {"mr": "MR", "sst2": "SST-2", "r8": "R8", "r52": "R52"}
POOLINGS = {"single": ("#0072b2", "mean over tokens"), "last": ("#d55e00", "last token")}
STYLE: Any = {  # of the keys that matplotlib knows
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "llmembed",  # the same ids in every file
}
Cases = Mapping[str, Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture."""
    parser = harness.command_line(__doc__)
    folder = harness.RESULTS / "studies"
    parser.add_argument("--results", type=Path, default=folder, help="folder of the records")
    folder = parser.parse_args(arguments).results
    cases: dict[str, Any] = {}
    for path in sorted(folder.glob("paper*.json")):
        cases |= harness.read(path)["cases"]
    if not cases:
        record = folder / "paper.json"
        sys.exit(f"{folder} has no paper*.json; run rerun paper --output {record} first")
    picture = folder / "accuracy_depth.svg"
    with mpl.rc_context(STYLE):
        figure = accuracy_over_depth(cases)
        figure.savefig(picture, metadata={"Date": None}, bbox_inches="tight")
    print(picture)


def accuracy_over_depth(cases: Cases) -> Figure:
    """Draw the accuracy of single layers, a panel a data set."""
    names = [name for name in NAMES if depth_curve(cases, name, "single")]
    figure = Figure(figsize=(3 * len(names), 2.9), layout="constrained")
    for panel, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), panel)
        for fit, (color, label) in POOLINGS.items():
            points = depth_curve(cases, name, fit)
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=label, markersize=3)
        axes.set(title=NAMES[name], xlabel="layer")
    figure.axes[0].set_ylabel("accuracy, LDA on one layer")
    figure.axes[-1].legend(loc="lower right")
    return figure


def depth_curve(cases: Cases, name: str, fit: str) -> list[tuple[int, float]]:
    """Gather (layer, accuracy) of one kind of fit on one data set, by layer.

    >>> cases = {"mr/last-12": {"accuracy": 0.8}, "mr/last-03": {"accuracy": 0.7}}
    >>> depth_curve(cases, "mr", "last")
    [(3, 0.7), (12, 0.8)]
    """
    found = ((re.fullmatch(rf"{name}/{fit}-(\d+)", case), case) for case in cases)
    return sorted((int(match[1]), cases[case]["accuracy"]) for match, case in found if match)
