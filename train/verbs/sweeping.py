"""The verb of `llmembed-sweep`, and what `--fusion auto` takes from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmembed.common.errors import ConfigError, DataError
from llmembed.common.process import memory_told
from llmembed.common.replace import check_outside, check_place, write_files
from llmembed.train.config import Method, SweepConfig
from llmembed.train.fusions import AUTO, HEADS
from llmembed.train.inputs import FitData, columns_of, load_data
from llmembed.train.inputs.sets import check_method
from llmembed.train.linear.ray_moments import joined_if_asked
from llmembed.train.linear.solved import grid_of
from llmembed.train.linear.stacking import Member
from llmembed.train.linear.sweep import Candidate, Grid, best_of, stack_of, sweep
from llmembed.train.reports.charts import depth_chart

TABLE_FILE, PLOT_FILE = "sweep.json", "sweep.svg"
_MOST_OTHERS = 5  # in the printed table


def run_sweep(config: SweepConfig) -> dict[str, Any]:
    """Sweep over the features of a cache, write its table and a plot, and give the table.

    Raises:
        ConfigError: an option does not fit the cache, memory runs out, or the output is a file.
        DataError: labels or features cannot be trained on, or no class has two rows.
        CacheError: the cache is missing, malformed or incomplete.
        MissingPackageError: the engine is Ray, which is not installed.
        EngineError: Ray gave up.
        RunStorageError: nothing can be written to the output.
    """
    started = time.perf_counter()
    if not os.path.exists(config.output_path):  # noqa: PTH110 - False for a name that is too long
        check_place(config.output_path)
    elif not config.output_path.is_dir():
        raise ConfigError(
            f"--output {config.output_path} is a file, and a sweep writes a table and a plot into "
            "a folder. Pass another --output."
        )
    check_outside(config.output_path / TABLE_FILE)
    plan = config.as_fit().plan()
    remedy = "Pass fewer --layers, or set CUDA_VISIBLE_DEVICES= to sweep on the CPU."
    with joined_if_asked(plan.method), memory_told(remedy):
        data = load_data(plan.reading, read_evaluation=False)
        check_method(plan.method, multilabel=data.multilabel)
        read_s = time.perf_counter() - started
        # One head judges all, so that layers are compared and not heads.
        grid = dataclasses.replace(grid_of(plan.method, data, config.seed), is_softened=False)
        n_rows = len(grid.held_out)
        if not n_rows:
            raise DataError(
                f"each of the {len(data.shares.train)} training rows is the only one of its class, "
                "so none can be held out to judge a feature. Extract two examples a class or more."
            )
        candidates = sweep(grid)
    record = functools.partial(
        Candidate.record, names=data.features, n_rows=n_rows, multilabel=data.multilabel
    )
    table = {
        "cache": {"fingerprint": data.fingerprint},
        "sweep": dataclasses.asdict(config),
        "n_rows": n_rows,
        "candidates": [record(one) for one in candidates],
        "best": record(best_of(candidates)),
        "seconds": {"read": read_s, "total": time.perf_counter() - started},
    }
    document = json.dumps(table, indent=2, allow_nan=False) + "\n"
    files = {TABLE_FILE: document, PLOT_FILE: depth_chart(table).alone()}
    write_files({config.output_path / name: content for name, content in files.items()})
    return table


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What `--fusion auto` comes to: the method with that fusion, the data with its features."""

    method: Method
    data: FitData
    record: dict[str, Any] | None  # what the record says of the choice; None where there was none
    members: Mapping[Member, Candidate] = dataclasses.field(default_factory=dict)
    """Of the stack, with positions in `data.features`, and what each was judged as."""


def choose_fusion(method: Method, data: FitData) -> Chosen:
    """Resolve `--fusion auto` on the training rows.

    Heads that are judged by the sweep are stacked; for others the best candidate is taken.
    """
    if method.fusion != AUTO:
        return Chosen(method=method, data=data, record=None)
    grid = grid_of(method, data, method.seed)
    if method.head != AUTO and HEADS[method.head].is_trained:
        best = best_of(sweep(grid))
        return Chosen(
            method=dataclasses.replace(method, fusion=best.fusion),
            data=_narrow(data, grid, best.features),
            record=best.record(data.features, len(grid.held_out), multilabel=data.multilabel),
        )
    stack = stack_of(grid)
    used = sorted({feature for member in stack for feature in member.features})
    members = {
        dataclasses.replace(member, features=tuple(map(used.index, member.features))): judged
        for member, judged in stack.items()
    }
    return Chosen(
        method=dataclasses.replace(method, fusion="concat"),
        data=_narrow(data, grid, used),
        record={
            "fusion": "concat",
            "features": [data.features[index]._asdict() for index in used],
            "members": [dataclasses.asdict(member) for member in members],
        },
        members=members,
    )


def _narrow(data: FitData, grid: Grid, features: Sequence[int]) -> FitData:
    columns = columns_of(grid.widths, features)
    return dataclasses.replace(
        data,
        features=tuple(data.features[index] for index in features),
        standardiser=data.standardiser.select(columns),
        x=data.x.index_select(1, columns),
        x_eval=data.x_eval.index_select(1, columns),
    )


def table_of(result: Mapping[str, Any]) -> str:
    """Lay out a sweep for reading: every single feature, then the best of the others."""
    singles = [row for row in result["candidates"] if row["fusion"] == "single"]
    others = [row for row in result["candidates"] if row["fusion"] != "single"]
    multilabel = "nll" in result["best"]
    others.sort(key=lambda row: row["nll"] if multilabel else -row["accuracy"])
    lines = ["NLL held out  features" if multilabel else "held out  95 % interval   features"]
    for row in singles + others[:_MOST_OTHERS]:
        mark = "  <- best" if row == result["best"] else ""
        if multilabel:
            lines.append(f"{row['nll']:12.4f}  {describe(row)}{mark}")
            continue
        low, high = row["accuracy_ci95"]
        lines.append(f"{row['accuracy']:8.4f}  {low:.4f}-{high:.4f}  {describe(row)}{mark}")
    note = "The best was chosen on these rows, so its figure flatters; llmembed-fit evaluates."
    return "\n".join([*lines, note, _way_to_fit(result)])


def _way_to_fit(result: Mapping[str, Any]) -> str:
    """Name the command that fits the best, where one can, else the one that weighs all."""
    options, best = result["sweep"], result["best"]
    command = f"llmembed-fit --cache {shlex.quote(options['cache'])} --fusion"
    if best["fusion"] != "single":
        return f"to weigh them all: {command} {AUTO}"
    (feature,) = best["features"]
    known = {one["source"] for row in result["candidates"] for one in row["features"]}
    source = f" --source {feature['source']}" if options["source"] or len(known) > 1 else ""
    chosen = f"--layers {feature['layer']} --pooling {feature['pooling']}{source}"
    return f"to fit the best: {command} single {chosen}"


def describe(row: Mapping[str, Any]) -> str:
    """Name a candidate: its fusion, and the layers of each source and pooling."""
    groups: dict[str, list[str]] = {}
    for feature in row["features"]:
        group = f"{feature['source']}/{feature['pooling']}"
        groups.setdefault(group, []).append(str(feature["layer"]))
    parts = " + ".join(f"{group} {','.join(layers)}" for group, layers in groups.items())
    return f"{row['fusion']:<7} {parts}"
