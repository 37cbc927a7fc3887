"""Which head does it take? Depth, width, dropout and weight decay, one at a time, and solved heads.

The paper puts an MLP of two hidden layers on its features and does not say what less would do. Here
every head gets the same features of a cache side by side; one number at a time departs from an MLP
of one hidden layer of 256, dropout 0.5 and weight decay 0.01. The answer is the smallest head, by
weights, whose accuracy over the data sets is within 0.2 points of the best.

    python benchmarks ablation --caches PLACE [--suite paper] [--data mr,sst2,r8,r52]
                               [--layers 12,15,18,24] [--seeds 3] [--output FILE]

The evaluation rows choose here: this says what heads can do, and is no estimate of what a chosen
one will.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import harness
from regression.cases import Outcome, pack, run_case, yardstick_s
from regression.places import places_of, require_cache
from regression.suites import FitPlan, load_suite
from torch import nn

from llmembed.train.fusions.heads import Dropout, MLPHead

WITHIN = 0.002


@dataclass(frozen=True, kw_only=True)
class Head:
    """One way to classify the fused features."""

    name: str
    widths: tuple[int, ...] = (256,)
    """Widths of its hidden layers."""
    options: Mapping[str, Any] = field(default_factory=lambda: {"head": "mlp"})
    """Fields of `FitConfig`."""

    @property
    def is_solved(self) -> bool:
        """Whether seeds change nothing that matters."""
        return bool(self.options["head"] != "mlp")


def _trained(name: str, widths: tuple[int, ...] = (256,), **options: float) -> Head:
    return Head(name=name, widths=widths, options={"head": "mlp", **options})


HEADS = (
    *(Head(name=f"{head}, solved", options={"head": head}) for head in ("ridge", "lda", "linear")),
    _trained("1 x 256, dropout 0.5, decay 0.01"),
    _trained("depth 0", ()),
    _trained("depth 2", (256, 256)),
    _trained("depth 3", (256, 256, 256)),
    _trained("width 16", (16,)),
    _trained("width 64", (64,)),
    _trained("width 1024", (1024,)),
    _trained("dropout 0", dropout=0.0),
    _trained("dropout 0.25", dropout=0.25),
    _trained("dropout 0.75", dropout=0.75),
    _trained("decay 0", weight_decay=0.0),
    _trained("decay 0.1", weight_decay=0.1),
    _trained("decay 1", weight_decay=1.0),
)


@harness.known_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Fit every head on every data set, and print a table and the JSON line."""
    parser = harness.command_line(__doc__)
    add = parser.add_argument
    add("--suite", default="paper")
    add("--data", dest="names", default="mr,sst2,r8,r52", help="names of the suite's data sets")
    add("--layers", default="12,15,18,24", help="layers whose means stand side by side")
    add("--seeds", type=int, default=3, help="fits of each head that is trained")
    add("--caches", action="append", default=[], help="folder or URL that holds caches")
    options = parser.parse_args(arguments)
    suite, places = load_suite(options.suite), places_of(options)
    plans = [suite.caches[name] for name in options.names.split(",")]
    paths = {plan.name: require_cache(plan, places) for plan in plans}
    yardstick_s()  # to warm up
    print(harness.row("head", "weights", *paths, "mean", "CPU s"))
    print("|---|---|" + "---|" * len(paths) + "---|---|")
    rows = []
    for head in HEADS:
        outcomes = {plan.name: run_head(head, paths[plan.name], plan, options) for plan in plans}
        rows.append(row_of(head, outcomes))
        print(_line(rows[-1]), flush=True)
    document = {"suite": options.suite, "layers": options.layers, "rows": rows, **answer(rows)}
    harness.finish(document, options.output)
    return 0


def run_head(head: Head, cache: str, plan: Any, options: argparse.Namespace) -> Outcome:
    """Fit one head on one cache, on the first source's means over tokens."""
    fit_plan = FitPlan(
        name=head.name,
        options={
            "fusion": "concat",
            "source": (plan.sources[0].name,),
            "pooling": ("mean",),
            "layers": options.layers,
            **head.options,
        },
        seeds=(0,) if head.is_solved else tuple(range(options.seeds)),
    )
    with hidden_layers(head.widths):
        return run_case(cache, plan, fit_plan)


@contextmanager
def hidden_layers(widths: Sequence[int]) -> Iterator[None]:
    """Give the head mlp these hidden layers, ReLU after each, dropout before every linear map."""
    original = MLPHead.__init__

    def build(self: MLPHead, fused_width: int, n_classes: int, dropout: float) -> None:
        nn.Module.__init__(self)
        layers: list[nn.Module] = []
        for width, wider in pairwise((fused_width, *widths)):
            layers += [Dropout(dropout), nn.Linear(width, wider), nn.ReLU()]
        last = nn.Linear((fused_width, *widths)[-1], n_classes)
        self.layers = nn.Sequential(*layers, Dropout(dropout), last)

    MLPHead.__init__ = build  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        MLPHead.__init__ = original  # type: ignore[method-assign]


def row_of(head: Head, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Gather what one head came to."""
    return {
        "head": head.name,
        "n_parameters": {name: one.n_parameters for name, one in outcomes.items()},
        "accuracy": {name: one.accuracy for name, one in outcomes.items()},
        "mean_accuracy": statistics.mean(one.accuracy for one in outcomes.values()),
        "seconds": {name: one.seconds for name, one in outcomes.items()},
        "n_seeds": {name: len(one.seeds) for name, one in outcomes.items()},
        "correct": {name: pack(one.correct) for name, one in outcomes.items()},
    }


def answer(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name the best head, and the smallest that is within 0.2 points of it."""
    best = max(rows, key=lambda row: float(row["mean_accuracy"]))
    near = [row for row in rows if row["mean_accuracy"] >= best["mean_accuracy"] - WITHIN]
    smallest = min(near, key=lambda row: (sum(row["n_parameters"].values()), -row["mean_accuracy"]))
    return {"best": best["head"], "smallest": smallest["head"]}


def _line(row: Mapping[str, Any]) -> str:
    weights = sorted(row["n_parameters"].values())
    return harness.row(
        row["head"],
        f"{weights[0]:,}" + (f"-{weights[-1]:,}" if weights[1:] else ""),
        *(f"{accuracy:.4f}" for accuracy in row["accuracy"].values()),
        f"{row['mean_accuracy']:.4f}",
        f"{statistics.mean(row['seconds'].values()):.1f}",
    )
