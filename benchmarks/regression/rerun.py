"""Rerun a suite from cached features, and say what changed since its baseline was accepted.

The expensive half of a text classifier on a frozen backbone, extraction, is in the caches; what is
left takes seconds, so it can run at every commit. Each cache is found by its fingerprint in a list
of places, each case is fitted, and compared row by row with `baselines/SUITE.json`.

    python benchmarks rerun ci                      # the caches in benchmarks/regression/caches
    python benchmarks rerun paper --caches /mnt/features --caches s3://bucket/features
    python benchmarks rerun paper --extract --data mr=texts/mr   # makes what is nowhere
    python benchmarks rerun ci --update             # accept today's figures

Every case is compared on its rows, and every fit once more on the rows of all its caches together
(`all/cooc`), where a loss that is too small for one data set shows. Holm's correction runs over all
of these. Time is judged by a factor, since its noise has no distribution one could rely on.

Exit code 1: something became significantly worse, fell below what the suite expects, or needs more
than twice the time; or a cache is missing. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from regression.cases import (
    BASELINES,
    Outcome,
    read_baseline,
    run_case,
    write_baseline,
    yardstick_s,
)
from regression.compare import Comparison, compare, holm
from regression.places import WORK, Places, places_of, require_cache
from regression.suites import Suite, load_suite

REPEATS = 3  # fits of a case that looks slow: the fastest counts, since noise only adds
POOLED = "all"
BAD = ("worse", "below expected", "slower", "other rows", "gone")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A case `cache/fit`, or a fit on all its caches `all/fit`, beside its baseline."""

    name: str
    verdicts: tuple[str, ...]
    """What is to be said of it; empty where nothing changed."""
    comparison: Comparison | None = None
    """Accuracy; None where there is nothing to compare with, or in one run only."""
    p: float | None = None
    """p-value after Holm's correction."""
    time_ratio: float | None = None
    """Yardsticks now over yardsticks in the baseline."""

    @property
    def is_bad(self) -> bool:
        """Whether the run has to fail for it."""
        return any(verdict in BAD for verdict in self.verdicts)


@harness.known_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    suite = load_suite(options.suite).only(options.only)
    if options.key:
        print(suite.features_key)
        return 0
    started = time.perf_counter()
    outcomes = run_suite(suite, places_of(options))
    path = options.baseline or BASELINES / f"{suite.name}.json"
    accepted = read_baseline(path)
    if options.update:
        accepted = {**_left_out(suite, accepted), **outcomes}
        write_baseline(path, accepted)
    left_out = _left_out(suite, accepted)
    before = {name: one for name, one in accepted.items() if name not in left_out}
    judgements = judge(suite, outcomes, before)
    print(table(suite, outcomes, judgements))
    document = record(suite, outcomes, judgements, time.perf_counter() - started)
    harness.finish(document, options.output)
    return int(any(judgement.is_bad for judgement in judgements))


def _left_out(suite: Suite, accepted: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Give the accepted figures of data sets that `--only` leaves out."""
    return {name: one for name, one in accepted.items() if name.partition("/")[0] in suite.left_out}


def run_suite(suite: Suite, places: Places) -> dict[str, Outcome]:
    """Find the caches of a suite, then run its cases.

    Raises:
        CacheNotFoundError: a cache is nowhere.
        CacheError: a cache is damaged, or what was extracted is something else.
        ConfigError: a fit's options do not suit its cache.
    """
    paths = {plan.name: require_cache(plan, places) for plan in suite.caches.values()}
    baseline = read_baseline(BASELINES / f"{suite.name}.json")
    outcomes: dict[str, Outcome] = {}
    yardstick_s()  # to warm up
    for plan, fit in suite.cases:
        name = f"{plan.name}/{fit.name}"
        outcome, before = run_case(paths[plan.name], plan, fit), baseline.get(name)
        for _ in range(REPEATS - 1):
            if before is None or outcome.yardsticks <= suite.slower * before.yardsticks:
                break
            again = run_case(paths[plan.name], plan, fit)
            outcome = min(outcome, again, key=lambda one: one.yardsticks)
        outcomes[name] = outcome
        print(f"{name}: {outcome.accuracy:.4f}, {outcome.seconds:.1f} s", file=sys.stderr)
    return outcomes


def judge(
    suite: Suite, outcomes: Mapping[str, Outcome], baseline: Mapping[str, Outcome]
) -> list[Judgement]:
    """Compare a run with its baseline, case by case and fit by fit."""
    comparable = [name for name in outcomes if _same_rows(outcomes[name], baseline.get(name))]
    comparisons = {
        name: compare(baseline[name].correct, outcomes[name].correct, len(outcomes[name].seeds))
        for name in comparable
    }
    for fit in suite.fits:
        names = [name for name in comparable if name.partition("/")[2] == fit]
        if len(names) > 1:  # no row is in two data sets
            before, now = (
                np.concatenate([run[name].correct for name in names])
                for run in (baseline, outcomes)
            )
            comparisons[f"{POOLED}/{fit}"] = compare(before, now, len(outcomes[names[0]].seeds))
    corrected = holm({name: one.p for name, one in comparisons.items()})
    judged = []
    for name in [*outcomes, *(name for name in comparisons if name not in outcomes)]:
        outcome, accepted, comparison = (
            outcomes.get(name),
            baseline.get(name),
            comparisons.get(name),
        )
        verdicts, ratio = [], None
        if comparison is not None and corrected[name] < suite.alpha:
            verdicts.append("worse" if comparison.now < comparison.before else "better")
        if outcome is not None and outcome.accuracy < suite.lowest(name):
            verdicts.append("below expected")
        if outcome is not None and accepted is None:
            verdicts.append("new")
        elif outcome is not None and comparison is None:
            verdicts.append("other rows")
        elif outcome is not None and accepted is not None:
            ratio = outcome.yardsticks / accepted.yardsticks
            verdicts += ["slower"] if ratio > suite.slower else []
        judged.append(
            Judgement(
                name=name,
                verdicts=tuple(verdicts),
                comparison=comparison,
                p=corrected.get(name),
                time_ratio=ratio,
            )
        )
    gone = [name for name in baseline if name not in outcomes]
    return judged + [Judgement(name=name, verdicts=("gone",)) for name in gone]


def _same_rows(now: Outcome, before: Outcome | None) -> bool:
    return before is not None and (
        (now.fingerprint, now.seeds, len(now.correct))
        == (before.fingerprint, before.seeds, len(before.correct))
    )


def table(suite: Suite, outcomes: Mapping[str, Outcome], judgements: Sequence[Judgement]) -> str:
    """Lay out a run as Markdown."""
    lines = [
        f"### {suite.name}: {suite.about}",
        "",
        "| case | accuracy | change in points (95 % interval) | p (Holm) | yardsticks | time | |",
        "|---|---|---|---|---|---|---|",
        *(_row(judgement, outcomes.get(judgement.name)) for judgement in judgements),
    ]
    bad = [judgement.name for judgement in judgements if judgement.is_bad]
    verdict = f"**Regression: {', '.join(bad)}**" if bad else "No regression."
    return "\n".join([*lines, "", verdict])


def _row(judgement: Judgement, outcome: Outcome | None) -> str:
    comparison = judgement.comparison
    accuracy, change, p, yards, ratio = "", "", "", "", ""
    if outcome is not None:
        accuracy, yards = f"{outcome.accuracy:.4f}", f"{outcome.yardsticks:.1f}"
    if comparison is not None:
        low, high = (100 * bound for bound in comparison.interval)
        points = 100 * (comparison.now - comparison.before)
        accuracy, p = f"{comparison.now:.4f}", f"{judgement.p:.2g}"
        change = f"{points:+.2f} ({low:+.2f} to {high:+.2f})"
    if judgement.time_ratio is not None:
        ratio = f"{judgement.time_ratio:.2f} x"
    verdicts = ", ".join(judgement.verdicts)
    return harness.row(judgement.name, accuracy, change, p, yards, ratio, verdicts)


def record(
    suite: Suite, outcomes: Mapping[str, Outcome], judgements: Sequence[Judgement], seconds: float
) -> dict[str, Any]:
    """Gather what the JSON line holds."""
    cases = {}
    for one in judgements:
        outcome, comparison = outcomes.get(one.name), one.comparison
        cases[one.name] = {
            "accuracy": outcome.accuracy if outcome else comparison and comparison.now,
            "n": outcome and len(outcome.correct),
            "n_parameters": outcome and outcome.n_parameters,
            "before": comparison and comparison.before,
            "interval": comparison and comparison.interval,
            "p_holm": one.p,
            "seconds": outcome and outcome.seconds,
            "yardsticks": outcome and outcome.yardsticks,
            "time_ratio": one.time_ratio,
            "verdicts": one.verdicts,
        }
    bad = [judgement.name for judgement in judgements if judgement.is_bad]
    return {"suite": suite.name, "seconds": seconds, "regressions": bad, "cases": cases}


def _parser() -> argparse.ArgumentParser:
    parser = harness.command_line(__doc__)
    add = parser.add_argument
    add("suite", nargs="?", default="ci", help="name of a suite, or a path ending in .toml")
    add("--only", default="", help="data sets of the suite, separated by commas; all without it")
    add("--caches", action="append", default=[], help="folder or URL that holds caches; repeatable")
    add("--work", default=WORK, type=Path, help="folder for caches that are fetched or extracted")
    add("--extract", action="store_true", help="extract the caches that are found nowhere")
    add("--data", action="append", default=[], help="NAME=PATH: texts to extract a cache from")
    add("--baseline", type=Path, help="file to compare with, or to write; baselines/SUITE.json")
    add("--update", action="store_true", help="accept the figures of this run as the baseline")
    add("--key", action="store_true", help="only print a key to store the suite's features under")
    return parser
