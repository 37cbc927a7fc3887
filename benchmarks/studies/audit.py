"""Wrong labels: how many of those that were flipped an audit lists first, and what it costs.

    python benchmarks audit --data clinc150_noisy=texts/clinc150_noisy --cache clinc150_noisy.zarr
                            [--fusions auto,mean] [--rounds 1] [--output FILE]

The data is a folder whose `train.parquet` has the right labels in `true_label`, beside `label`; the
cache is made of it. Each audit takes turns with a fit of its fusion, which reads, solves,
evaluates and writes its run, without baselines.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow.parquet as pq
from regression.cases import one_thread
from regression.suites import named

from llmembed.cache_format import open_cache
from llmembed.common.errors import DataError
from llmembed.train import AuditConfig, FitConfig, fit, run_audit

SHARE = 0.07
BARS = {"found": harness.least(0.8), "times a fit": harness.most(2)}


@harness.known_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Audit with each fusion, beside a fit of it, and print the figures beside their bars."""
    parser = harness.command_line(__doc__, output="studies/audit.json")
    add = parser.add_argument
    add("--data", action="append", required=True, help="NAME=FOLDER with train.parquet")
    add("--cache", required=True, help="cache of these texts")
    add("--fusions", default="auto,mean")
    add("--rounds", type=int, default=1)
    options = parser.parse_args(arguments)
    ((name, folder),) = named(options.data).items()
    is_wrong = flipped(Path(folder) / "train.parquet", options.cache)
    load, rows = harness.load(), []
    for fusion in options.fusions.split(","):
        found = measure(options.cache, fusion, is_wrong, options.rounds)
        rows.append(found)
        for figure, bar in BARS.items():
            print(bar.line(f"{fusion}: {figure}", found[figure]), flush=True)
    document = {"data": name, "n_rows": len(is_wrong), "n_flipped": int(is_wrong.sum())}
    harness.finish({**document, "share": SHARE, **load, "fusions": rows}, options.output)
    return 0


def flipped(path: Path, cache: str) -> np.ndarray:
    """Say which labels of the training split are not the right ones, bool `[N]`."""
    table = pq.read_table(path, columns=["label", "true_label"])
    given, true = (table[name].to_numpy() for name in ("label", "true_label"))
    if not np.array_equal(open_cache(cache)["train"].labels, given):
        raise DataError(f"the labels of {cache} are not those of {path}. Extract it again.")
    wrong: np.ndarray = given != true
    return wrong


def measure(cache: str, fusion: str, is_wrong: np.ndarray, rounds: int) -> dict[str, Any]:
    """Audit and fit in turn; the share of wrong labels that stand first, and seconds of both."""
    documents: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, one_thread():
        audited = AuditConfig(cache=cache, fusion=fusion, output=f"{folder}/audit")
        fitted = FitConfig(cache=cache, fusion=fusion, output=f"{folder}/run", baseline="none")
        ways: dict[str, Callable[[], Any]] = {
            "fit": functools.partial(fit, fitted),
            "audit": lambda: documents.append(run_audit(audited)),
        }
        seconds = harness.by_turns(ways, rounds)
    listed = [row["row"] for row in documents[0]["rows"]]
    first = listed[: int(SHARE * len(is_wrong))]
    return {
        "fusion": fusion,
        "head": documents[0]["head"],
        "n_flagged": documents[0]["n_flagged"],
        "found": float(is_wrong[first].sum() / is_wrong.sum()),
        "right_of_label": float(
            np.mean([is_wrong[r["row"]] for r in documents[0]["rows"] if "label" in r["reasons"]])
        ),
        "seconds": seconds,
        "times a fit": harness.ratio(seconds["audit"], seconds["fit"]),
    }
