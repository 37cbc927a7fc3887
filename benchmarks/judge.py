"""Verdicts: what of a suite became worse, better or slower than its baseline.

Every case is compared on its rows, and every fit once more on the rows of all its caches together
(`all/cooc`), where a loss that is too small for one data set shows. Holm's correction runs over all
of these. Time is judged by a factor, since its noise has no distribution one could rely on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compare import Comparison, compare, holm, pooled
from measure import Outcome
from suites import Suite

POOLED = "all"
BAD = ("worse", "below expected", "slower", "other rows", "gone")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A case, or a fit on all its caches, beside its baseline."""

    name: str
    """`cache/fit`, or `all/fit`."""
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
        if len(names) > 1:
            comparisons[f"{POOLED}/{fit}"] = compare(
                pooled([baseline[name].correct for name in names]),
                pooled([outcomes[name].correct for name in names]),
                len(outcomes[names[0]].seeds),
            )
    corrected = holm({name: one.p for name, one in comparisons.items()})
    names = [*outcomes, *(name for name in comparisons if name not in outcomes)]
    judged = [
        _judgement(suite, name, outcomes.get(name), baseline, comparisons.get(name), corrected)
        for name in names
    ]
    gone = [name for name in baseline if name not in outcomes]
    return judged + [Judgement(name=name, verdicts=("gone",)) for name in gone]


def expected(suite: Suite, name: str) -> float | None:
    """Look up the lowest accuracy that a suite accepts of a case."""
    cache, _, fit = name.partition("/")
    return suite.fits[fit].at_least.get(cache)


def _judgement(
    suite: Suite,
    name: str,
    outcome: Outcome | None,
    baseline: Mapping[str, Outcome],
    comparison: Comparison | None,
    corrected: Mapping[str, float],
) -> Judgement:
    verdicts, ratio = [], None
    if comparison is not None and corrected[name] < suite.alpha:
        verdicts.append("worse" if comparison.now < comparison.before else "better")
    if outcome is not None:
        lowest = expected(suite, name)
        if lowest is not None and outcome.accuracy < lowest:
            verdicts.append("below expected")
        if name not in baseline:
            verdicts.append("new")
        elif comparison is None:
            verdicts.append("other rows")
        else:
            ratio = outcome.yardsticks / baseline[name].yardsticks
            if ratio > suite.slower:
                verdicts.append("slower")
    return Judgement(
        name=name,
        verdicts=tuple(verdicts),
        comparison=comparison,
        p=corrected.get(name),
        time_ratio=ratio,
    )


def _same_rows(now: Outcome, before: Outcome | None) -> bool:
    return before is not None and (
        (now.fingerprint, now.seeds, len(now.correct))
        == (before.fingerprint, before.seeds, len(before.correct))
    )
