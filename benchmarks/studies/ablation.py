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
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import harness
from regression.cases import Outcome, pack, run_case, yardstick_s
from regression.places import places_of, require_cache
from regression.suites import FitPlan, load_suite
from torch import nn

from llmembed.train import register_head

WITHIN = 0.002
SOLVED = ("ridge", "lda", "linear")
WIDTHS = {  # of the hidden layers
    "depth 0": (),
    "depth 2": (256, 256),
    "depth 3": (256, 256, 256),
    "width 16": (16,),
    "width 64": (64,),
    "width 1024": (1024,),
}
HEADS: dict[str, dict[str, Any]] = {  # options of the fit
    **{f"{head}, solved": {"head": head} for head in SOLVED},
    "1 x 256, dropout 0.5, decay 0.01": {"head": "mlp"},
    **{name: {"head": name.replace(" ", "-")} for name in WIDTHS},
    **{f"dropout {share:g}": {"head": "mlp", "dropout": share} for share in (0.0, 0.25, 0.75)},
    **{f"decay {decay:g}": {"head": "mlp", "weight_decay": decay} for decay in (0.0, 0.1, 1.0)},
}


class Hidden(nn.Sequential):
    """Hidden layers, ReLU after each, dropout before every linear map."""

    widths: tuple[int, ...] = ()

    def __init__(self, fused_width: int, n_classes: int, dropout: float) -> None:
        layers: list[nn.Module] = []
        for width, wider in pairwise((fused_width, *self.widths)):
            layers += [nn.Dropout(dropout), nn.Linear(width, wider), nn.ReLU()]
        last = nn.Linear((fused_width, *self.widths)[-1], n_classes)
        super().__init__(*layers, nn.Dropout(dropout), last)


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
    for name, widths in WIDTHS.items():
        register_head(HEADS[name]["head"])(type("Hidden", (Hidden,), {"widths": widths}))
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


def run_head(head: str, cache: str, plan: Any, options: argparse.Namespace) -> Outcome:
    """Fit one head on one cache, on the first source's means over tokens."""
    features = {"source": (plan.sources[0].name,), "pooling": ("mean",), "layers": options.layers}
    is_solved = HEADS[head]["head"] in SOLVED  # seeds change nothing that matters
    fit_plan = FitPlan(
        name=head,
        options={"fusion": "concat", **features, **HEADS[head]},
        seeds=(0,) if is_solved else tuple(range(options.seeds)),
    )
    return run_case(cache, plan, fit_plan)


def row_of(head: str, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Gather what one head came to."""
    return {
        "head": head,
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
