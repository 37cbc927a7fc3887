"""Rerun a suite from cached features, and say what changed since its baseline was accepted.

The expensive half of a text classifier on a frozen backbone, extraction, is in the caches; what is
left takes seconds, so it can run at every commit. Each cache is found by its fingerprint in a list
of places, each case is fitted, and compared row by row with `baselines/SUITE.json`.

    python benchmarks/rerun.py ci                      # the caches in benchmarks/caches
    python benchmarks/rerun.py full --caches /mnt/features --caches s3://bucket/features
    python benchmarks/rerun.py full --extract --data mr=texts/mr   # makes what is nowhere
    python benchmarks/rerun.py ci --update             # accept today's figures

Exit code 1: something became significantly worse, fell below what the suite expects, or needs more
than twice the time; or a cache is missing. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baselines import FOLDER as BASELINES
from baselines import read_baseline, write_baseline
from judge import Judgement, judge
from measure import Outcome, run_case, warm_up
from places import Places, environment_places, require_cache
from suites import Suite, load_suite

from llmembed.common.errors import ConfigError, LLMEmbedError

HERE = Path(__file__).parent
COMMITTED = HERE / "caches"
WORK = HERE.parent / "build" / "bench" / "caches"
REPEATS = 3  # fits of a case that looks slow: the fastest counts, since noise only adds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        suite = load_suite(options.suite).only(options.only)
        if options.key:
            print(suite.features_key)
            return 0
        started = time.perf_counter()
        outcomes = run_suite(suite, _places(options))
        path = Path(options.baseline or BASELINES / f"{suite.name}.json")
        accepted = read_baseline(path)
        if options.update:
            accepted = {**others(suite, accepted), **outcomes}
            write_baseline(path, accepted)
        left_out = others(suite, accepted)
        before = {name: one for name, one in accepted.items() if name not in left_out}
        judgements = judge(suite, outcomes, before)
    except LLMEmbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(suite, outcomes, judgements))
    document = record(suite, outcomes, judgements, time.perf_counter() - started)
    if options.output:
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return int(any(judgement.is_bad for judgement in judgements))


def others(suite: Suite, accepted: Mapping[str, Outcome]) -> dict[str, Outcome]:
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
    warm_up()
    for plan, fit in suite.cases:
        name = f"{plan.name}/{fit.name}"
        outcome = run_case(paths[plan.name], plan, fit)
        for _ in range(REPEATS - 1):
            if not _looks_slow(suite, outcome, baseline.get(name)):
                break
            outcome = min(outcome, run_case(paths[plan.name], plan, fit), key=_yardsticks)
        outcomes[name] = outcome
        print(f"{name}: {outcome.accuracy:.4f}, {outcome.seconds:.1f} s", file=sys.stderr)
    return outcomes


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
    cells = (judgement.name, accuracy, change, p, yards, ratio, ", ".join(judgement.verdicts))
    return f"| {' | '.join(cells)} |"


def _yardsticks(outcome: Outcome) -> float:
    return outcome.yardsticks


def _looks_slow(suite: Suite, outcome: Outcome, before: Outcome | None) -> bool:
    return before is not None and outcome.yardsticks > suite.slower * before.yardsticks


def _places(options: argparse.Namespace) -> Places:
    datasets = {}
    for pair in options.data:
        name, separator, path = pair.partition("=")
        if not separator:
            raise ConfigError(f"--data {pair!r} is not NAME=PATH, such as mr=texts/mr.")
        datasets[name] = path
    return Places(
        work=Path(options.work),
        others=(*environment_places(options.caches), str(COMMITTED)),
        datasets=datasets,
        may_extract=options.extract,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "suite",
        nargs="?",
        default="ci",
        help="name of a file in benchmarks/suites, or a path ending in .toml",
    )
    add("--only", default="", help="data sets of the suite, separated by commas; all without it")
    add("--caches", action="append", default=[], help="folder or URL that holds caches; repeatable")
    add("--work", default=str(WORK), help="folder for caches that are fetched or extracted")
    add("--extract", action="store_true", help="extract the caches that are found nowhere")
    add("--data", action="append", default=[], help="NAME=PATH: texts to extract a cache from")
    add("--baseline", help="file to compare with, or to write; benchmarks/baselines/SUITE.json")
    add("--update", action="store_true", help="accept the figures of this run as the baseline")
    add("--output", help="file for the JSON document")
    add("--key", action="store_true", help="only print a key to store the suite's features under")
    return parser


if __name__ == "__main__":
    sys.exit(main())
