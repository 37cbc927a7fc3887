"""Does the rerun cry wolf, and does it sleep? Twenty runs with other seeds, twenty with a fault.

Noise: each trial runs the suite with seeds that the baseline has not seen, on unchanged code. An
alarm is a false one. Fault: in the same trials, one fit at a time is run with its fusion weakened
on purpose: only every eighth column of the features reaches it, or the stack beneath it. The other
fits are those of the noise trial, so the alarm must name the weakened fit.

    python benchmarks false_alarms [--trials 20] [--suite ci] [--faulty cooc,mean] [--keep 8]

The file is written after each trial, and keeps those of earlier calls against the same baseline.
The last line of stdout is JSON; it says for each weakened fit how many trials caught it, and what
the fault cost. Accuracy alone is judged here: time is not what seeds change.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
import torch
from regression.cases import BASELINES, Outcome, read_baseline, run_case, yardstick_s
from regression.places import places_of, require_cache
from regression.rerun import Judgement, judge
from regression.suites import Suite, load_suite

from llmembed.train.verbs import fitting

ACCURACY_VERDICTS = {"worse", "below expected"}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one trial came to."""

    false_alarms: list[str]
    """Cases that were called worse, though only the seeds differ."""
    caught: dict[str, bool]
    """Weakened fit -> whether it was called worse."""
    points_lost: dict[str, float]
    """Weakened fit -> accuracy that the fault cost, mean over the caches, in points."""
    n_comparisons: int
    """Comparisons that Holm's correction ran over."""


@harness.known_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials, print each, and the counts as JSON."""
    parser = harness.command_line(__doc__, "studies/false_alarms.json")
    add = parser.add_argument
    add("--suite", default="ci")
    add("--trials", type=int, default=20)
    add("--faulty", default="cooc,mean", help="fits to weaken, one at a time")
    add("--keep", type=int, default=8, help="columns, one of so many, that are left")
    add("--jobs", type=int, default=2, help="trials at a time, one core each")
    add("--baseline", type=Path, help="file of accepted figures")
    options = parser.parse_args(arguments)
    suite = load_suite(options.suite)
    baseline = read_baseline(options.baseline or BASELINES / f"{suite.name}.json")
    places = places_of(options)
    paths = {plan.name: require_cache(plan, places) for plan in suite.caches.values()}
    settings = {"suite": suite.name, "keep": options.keep, "faulty": options.faulty}
    settings |= {"baseline": _digest(baseline)}
    earlier = harness.read(options.output)
    is_same = bool(earlier) and all(earlier.get(key) == one for key, one in settings.items())
    trials = [Trial(**trial) for trial in earlier["trials"]] if is_same else []
    faulty = options.faulty.split(",")
    one = functools.partial(run_trial, suite, baseline, paths, faulty, options.keep)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for trial in pool.map(one, range(len(trials), options.trials)):
            print(f"trial {len(trials)}: {trial}", file=sys.stderr, flush=True)
            trials.append(trial)
            harness.write({**settings, **summary(trials)}, options.output)
    harness.finish({**settings, **summary(trials)}, options.output)
    return 0


def _digest(baseline: Mapping[str, Outcome]) -> str:
    """Say which accepted figures the trials were judged against."""
    rows = [(name, outcome.correct.tolist()) for name, outcome in sorted(baseline.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def run_trial(
    suite: Suite,
    baseline: Mapping[str, Outcome],
    paths: Mapping[str, str],
    faulty: Sequence[str],
    keep: int,
    number: int,
) -> Trial:
    """Run the suite with other seeds; then each fit that is to be weakened, weakened.

    Args:
        suite: what to run.
        baseline: its accepted outcomes.
        paths: cache name -> path.
        faulty: fits to weaken.
        keep: one column of so many is left.
        number: which trial; its seeds are those of the suite plus a thousand for each trial.
    """
    yardstick_s()  # to warm up
    offset = 1000 * (number + 1)
    shifted = {
        name: dataclasses.replace(fit, seeds=tuple(seed + offset for seed in fit.seeds))
        for name, fit in suite.fits.items()
    }

    def run(*fits: str) -> dict[str, Outcome]:
        """Run fits with other seeds, and give them under the seeds of the suite."""
        cases = dataclasses.replace(suite, fits={name: shifted[name] for name in fits}).cases
        return {
            f"{plan.name}/{fit.name}": dataclasses.replace(
                run_case(paths[plan.name], plan, fit), seeds=suite.fits[fit.name].seeds
            )
            for plan, fit in cases
        }

    noise = run(*suite.fits)
    judgements = judge(suite, noise, baseline)
    caught, points_lost = {}, {}
    for name in faulty:
        with weakened(suite.fits[name].options["fusion"], keep):
            worse = run(name)
        alarms = _alarms(judge(suite, {**noise, **worse}, baseline))
        caught[name] = any(alarm.endswith(f"/{name}") for alarm in alarms)
        lost = [100 * (noise[case].accuracy - worse[case].accuracy) for case in worse]
        points_lost[name] = statistics.mean(lost)
    return Trial(
        false_alarms=_alarms(judgements),
        caught=caught,
        points_lost=points_lost,
        n_comparisons=sum(one.comparison is not None for one in judgements),
    )


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """Count over the trials."""
    faulty = trials[0].caught
    return {
        "n_trials": len(trials),
        "n_comparisons": trials[0].n_comparisons,
        "trials_with_false_alarm": sum(bool(trial.false_alarms) for trial in trials),
        "false_alarms": [name for trial in trials for name in trial.false_alarms],
        "caught": {name: sum(trial.caught[name] for trial in trials) for name in faulty},
        "points_lost": {
            name: statistics.mean(trial.points_lost[name] for trial in trials) for name in faulty
        },
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }


@contextmanager
def weakened(fusion: str, keep: int) -> Iterator[None]:
    """Let only one column of `keep` reach a fusion, and the stack beneath it if it has one."""
    train = fitting.train

    def lose_columns(plan: Any, data: Any, **options: Any) -> Any:
        if plan.method.fusion == fusion:
            lost = torch.arange(data.x.shape[1]) % keep != 0
            data.x[:, lost] = data.x_eval[:, lost] = 0.0
        return train(plan, data, **options)

    with patch.object(fitting, "train", lose_columns):
        yield


def _alarms(judgements: Sequence[Judgement]) -> list[str]:
    return [one.name for one in judgements if ACCURACY_VERDICTS & set(one.verdicts)]
