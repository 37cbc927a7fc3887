"""Domain shift: train on one data set, test on another of the same classes, from cached features.

SST-2 was made from the sentences of MR (Socher et al., 2013), so that many test texts of one stand
in the training split of the other, whole or in part. Accuracy is therefore also given on the test
texts that share no run of six words with any training text of the other set; those are the figures
that say something about a shift.

    python benchmarks transfer --data sst2=texts/sst2 --data mr=texts/mr --caches PLACE
                               [--suite paper] [--fits single-15,concat-4,...] [--output FILE]

The two data sets that are named are trained and tested on, each way.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np
import numpy.typing as npt
from regression.cases import one_thread
from regression.places import Places, cached_texts, places_of, require_cache
from regression.suites import CachePlan, FitPlan, Suite, load_suite, named

from llmembed.cache_format import open_cache
from llmembed.common.errors import ConfigError, DataError
from llmembed.train import FitConfig, Run, fit
from llmembed.train.inputs.data import read_features
from llmembed.train.measures import wilson_interval

RUN_OF_WORDS = 6
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A data set: its features, and which of its texts the other one has seen."""

    plan: CachePlan
    """What its cache was found by."""
    cache: str
    """Path of its cache."""
    unseen: Bools
    """bool `[n]`, evaluation rows that share no run of words with the other's training texts."""


@harness.known_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run each fit on both data sets, and print a table and the JSON line."""
    parser = harness.command_line(__doc__)
    add = parser.add_argument
    add("--data", action="append", required=True, help="NAME=PATH of two data sets of the suite")
    add("--suite", default="paper")
    add("--fits", default="single-15,last-15,mean-4,concat-4,cooc-4,auto-4,minilm")
    add("--caches", action="append", default=[], help="folder or URL that holds caches")
    options = parser.parse_args(arguments)
    suite = load_suite(options.suite)
    domains = read_domains(suite, named(options.data), places_of(options))
    print("| fit | trained on | tested on | accuracy | unseen texts only |\n|---|---|---|---|---|")
    rows = []
    for name in options.fits.split(","):
        for row in transfer(suite.fits[name], domains):
            rows.append(row)
            print(_line(row), flush=True)
    document = {"suite": suite.name, "run_of_words": RUN_OF_WORDS, "rows": rows}
    harness.finish(document, options.output)
    return 0


def read_domains(suite: Suite, data: Mapping[str, str], places: Places) -> tuple[Domain, ...]:
    """Find the caches and texts of two data sets, and which texts they share.

    Raises:
        CacheError: a cache is nowhere, or the texts are not its own.
        ConfigError: there are not two data sets.
        DataError: the classes are not the same.
    """
    if len(data) != 2:
        raise ConfigError(
            f"a shift is between two data sets, and {len(data)} were named. Pass two to --data, "
            "such as --data sst2=texts/sst2 --data mr=texts/mr."
        )
    plans = [suite.caches[name] for name in data]
    paths = [require_cache(plan, places) for plan in plans]
    labels = [open_cache(path).labels for path in paths]
    if labels[0] != labels[1]:
        raise DataError(
            f"{plans[0].name} has the classes {', '.join(labels[0])} and {plans[1].name} "
            f"{', '.join(labels[1])}. Pass two data sets with the same classes to --data."
        )
    texts = []
    for plan, path in zip(plans, paths, strict=True):
        splits = (open_cache(path)[split] for split in ("train", plan.eval_split))
        texts.append([cached_texts(plan, data[plan.name], split) for split in splits])
    return tuple(
        Domain(plan=plans[k], cache=paths[k], unseen=unseen(texts[k][1], texts[1 - k][0]))
        for k in (0, 1)
    )


def unseen(texts: Sequence[str], training_texts: Sequence[str]) -> Bools:
    """Say which texts share no run of six words with any training text.

    >>> unseen(["a b c d e f g", "b c d e f"], ["So: B c d, e F g!"]).tolist()
    [False, True]
    """
    known = {run for text in training_texts for run in _runs(text)}
    return np.array([known.isdisjoint(_runs(text)) for text in texts])


def transfer(plan: FitPlan, domains: Sequence[Domain]) -> Iterator[dict[str, Any]]:
    """Fit on the training split of each data set, and evaluate on those of both."""
    for trained_on in domains:
        with tempfile.TemporaryDirectory() as folder, one_thread():
            chosen = {"seed": plan.seeds[0], "eval_split": trained_on.plan.eval_split}
            chosen |= {"cache": trained_on.cache, "output": f"{folder}/run"}
            run = fit(FitConfig(baseline="none", **{**plan.options, **chosen}))
            for tested_on in domains:
                right = rows_right(run, tested_on)
                yield {
                    "fit": plan.name,
                    "trained_on": trained_on.plan.name,
                    "tested_on": tested_on.plan.name,
                    "all": _figures(right),
                    "unseen": _figures(right[tested_on.unseen]),
                }


def rows_right(run: Run, domain: Domain) -> Bools:
    """Say which evaluation rows of a data set a run has right, bool `[n]`."""
    split = open_cache(domain.cache)[domain.plan.eval_split]
    x = run.classifier.standardise.apply_(read_features(split, run.features))
    right: Bools = run.classifier.logits_all(x).argmax(dim=1).numpy() == split.labels
    return right


def _figures(right: Bools) -> dict[str, Any]:
    n_right, n = int(right.sum()), len(right)
    return {"n": n, "accuracy": n_right / n, "interval": wilson_interval(n_right, n)}


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[k : k + RUN_OF_WORDS]) for k in range(len(words) - RUN_OF_WORDS + 1)}


def _line(row: Mapping[str, Any]) -> str:
    cells = []
    for figures in (row["all"], row["unseen"]):
        low, high = figures["interval"]
        cells.append(f"{figures['accuracy']:.3f} ({low:.3f}-{high:.3f}), {figures['n']:,} texts")
    return harness.row(row["fit"], row["trained_on"], row["tested_on"], *cells)
