"""Domain shift: train on one data set, test on another of the same classes, from cached features.

SST-2 was made from the sentences of MR (Socher et al., 2013), so that many test texts of one stand
in the training split of the other, whole or in part. Accuracy is therefore also given on the test
texts that share no run of six words with any training text of the other set; those are the figures
that say something about a shift.

    python benchmarks/transfer.py --data sst2=texts/sst2 --data mr=texts/mr --caches PLACE
                                  [--suite paper] [--fits single-15,concat-4,...] [--output FILE]

The first two data sets that are named are trained and tested on, each way. The last line of stdout
is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import one_thread
from places import Places, cached_texts, environment_places, require_cache
from rerun import COMMITTED, WORK
from suites import CachePlan, FitPlan, Suite, load_suite

from llmembed.cache_format import open_cache
from llmembed.common.errors import ConfigError, DataError, LLMEmbedError
from llmembed.train import Run, fit
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run each fit on both data sets, and print a table and the JSON line."""
    options = _parser().parse_args(arguments)
    places = Places(work=WORK, others=(*environment_places(options.caches), str(COMMITTED)))
    print("| fit | trained on | tested on | accuracy | unseen texts only |\n|---|---|---|---|---|")
    rows = []
    try:
        suite = load_suite(options.suite)
        domains = read_domains(suite, options.data, places)
        for name in options.fits.split(","):
            for row in transfer(suite.fits[name], domains):
                rows.append(row)
                print(_row(row), flush=True)
    except LLMEmbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    document = {"suite": suite.name, "run_of_words": RUN_OF_WORDS, "rows": rows}
    if options.output:
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return 0


def read_domains(suite: Suite, pairs: Sequence[str], places: Places) -> tuple[Domain, ...]:
    """Find the caches and texts of two data sets, and which texts they share.

    Raises:
        CacheError: a cache is nowhere, or the texts are not its own.
        ConfigError: there are not two data sets.
        DataError: the classes are not the same.
    """
    if len(pairs) != 2:
        raise ConfigError(
            f"a shift is between two data sets, and {len(pairs)} were named. Pass two to --data, "
            "such as --data sst2=texts/sst2 --data mr=texts/mr."
        )
    plans = [suite.caches[pair.partition("=")[0]] for pair in pairs]
    paths = [require_cache(plan, places) for plan in plans]
    labels = [open_cache(path).labels for path in paths]
    if labels[0] != labels[1]:
        raise DataError(
            f"{plans[0].name} has the classes {', '.join(labels[0])} and {plans[1].name} "
            f"{', '.join(labels[1])}. Pass two data sets with the same classes to --data."
        )
    texts = []
    for pair, plan, path in zip(pairs, plans, paths, strict=True):
        dataset, cache = pair.partition("=")[2] or plan.dataset, open_cache(path)
        splits = (cache["train"], cache[plan.eval_split])
        texts.append([cached_texts(plan, dataset, split) for split in splits])
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
            options = {"eval_split": trained_on.plan.eval_split}
            run = fit(plan.config(trained_on.cache, plan.seeds[0], f"{folder}/run", **options))
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


def _row(row: dict[str, Any]) -> str:
    cells = [row["fit"], row["trained_on"], row["tested_on"]]
    for figures in (row["all"], row["unseen"]):
        low, high = figures["interval"]
        cells.append(f"{figures['accuracy']:.3f} ({low:.3f}-{high:.3f}), {figures['n']:,} texts")
    return f"| {' | '.join(cells)} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", action="append", required=True, help="NAME=PATH of two data sets of the suite")
    add("--suite", default="paper")
    add("--fits", default="single-15,last-15,mean-4,concat-4,cooc-4,auto-4,minilm")
    add("--caches", action="append", default=[], help="folder or URL that holds caches")
    add("--output", help="file for the JSON document")
    return parser


if __name__ == "__main__":
    sys.exit(main())
