"""What ranks and planning cost: two ranks against one, and a driver that plans ten million rows.

Ranks have one thread each and agree on nothing while they run, so the limit is the number of cores.
A rank takes seconds to start, whatever its share, so two figures are given: of computing and
writing alone, by the slowest rank, and of the whole commands. With 16 layers of 4,096 texts one
rank works for about two minutes, so that its start is a small part; on cores that others use, two
ranks lose more than one does, and the load is told.
The planner must not grow with the texts: it holds a hash and a label a row, and what sorts them.

    python benchmarks ranks [--parts ranks] [--n-texts 4096] [--n-rows 1000000 10000000]

Both worlds must give the same features.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from llmembed.cache_format import open_cache

EXTRACT = "from llmembed.extract.cli import main; main()"
PLAN = """
import json, resource, sys, time
from llmembed.extract import ExtractConfig
from llmembed.extract.pipeline import prepare
from llmembed.extract.engines.ray_engine import cut

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
began = time.perf_counter()
config = ExtractConfig(**json.loads(sys.argv[1]), engine="ray", workers=8)
task = prepare(config)
load_s = time.perf_counter() - began
task.register()
with task.open_writer(shared="ray") as writer:
    units = [unit for plan in task.make_plans(writer) for unit in cut(plan, 8)]
seconds = time.perf_counter() - began
found = {"n_units": len(units), "load_s": load_s, "seconds": seconds, "peak_bytes": peak()}
print(json.dumps(found))
"""
BATCH = 2**17
PARTS = ("ranks", "planned")


def main(arguments: Sequence[str] | None = None) -> None:
    """Time one rank and two, then plan data sets of some sizes."""
    parser = harness.command_line(__doc__, "speed/ranks.json")
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--layers", default="16")
    add("--compute-dtype", default="auto", help="of the ranks")
    add("--dataset", default="r8")
    add("--n-texts", type=int, default=4096)
    add("--n-rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="keep the others")
    options = parser.parse_args(arguments)
    result = harness.read(options.output)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        if "ranks" in options.parts:
            ranks = result["ranks"] = compare(options, Path(folder))
            limit, alone = min(2, os.cpu_count() or 1), f"{ranks['speedup']:.2f}"
            whole = f"{ranks['speedup_with_start']:.2f} whole"
            print(f"two ranks, limit {limit} x one: {alone}, {whole}")
        if "planned" in options.parts:
            sizes = options.n_rows
            result["planned"] = [plan(options, Path(folder), n_rows) for n_rows in sizes]
            for one in result["planned"]:
                size = f"{one['seconds']:.1f} s, {one['peak_bytes'] / 2**20:.0f} MiB"
                print(f"{one['n_rows']:,} rows: {size}")
    harness.finish(result, options.output)


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run one rank alone, then two at once, one thread each."""
    found = {}
    for world in (1, 2):
        settings = {
            "model": arguments.model,
            "layers": arguments.layers,
            "dataset": arguments.dataset,
            "split": "train",
            "limit": arguments.n_texts,
            "pooling": "mean",
            "max_length": 32,  # the texts are longer, so that the ranks have equal shares
            "compute_dtype": arguments.compute_dtype,
            "cache": folder / f"{world}.zarr",
            "world": world,
        }
        line = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        found[world] = run_ranks([*line, "--json", "--quiet"], world)
    one, two = (
        open_cache(folder / f"{world}.zarr")["train"].features(int(arguments.layers))
        for world in (1, 2)
    )
    if not np.array_equal(one, two):
        raise AssertionError("two ranks gave other features than one")
    return {
        **harness.load(),
        "seconds_1": found[1][0],
        "seconds_2": found[2][0],
        "with_start_1": found[1][1],
        "with_start_2": found[2][1],
        "speedup": found[1][0] / found[2][0],
        "speedup_with_start": found[1][1] / found[2][1],
    }


def run_ranks(line: list[str], world: int) -> tuple[float, float]:
    """Run all ranks at once; give the slowest one's time of computing, and the wall time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", EXTRACT, *line, f"--rank={rank}"],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for rank in range(world)
    ]
    results = [json.loads(rank.communicate()[0]) for rank in ranks]
    return max(result["seconds"] for result in results), time.perf_counter() - began


def plan(arguments: argparse.Namespace, folder: Path, n_rows: int) -> dict[str, Any]:
    """Plan that many short texts in a process of its own."""
    path = folder / "texts.parquet"
    write_texts(path, n_rows)
    config = {
        "pooling": ["mean"],
        "model": arguments.model,
        "layers": arguments.layers,
        "dataset": str(path),
        "compute_dtype": "float32",
        "cache": str(folder / f"{n_rows}.zarr"),
    }
    line = [sys.executable, "-c", PLAN, json.dumps(config)]
    found: dict[str, Any] = json.loads(subprocess.check_output(line))
    return {"n_rows": n_rows, "file_bytes": path.stat().st_size} | found | harness.load()


def write_texts(path: Path, n_rows: int) -> None:
    """Write different texts of about 30 characters, in two classes."""
    schema = pa.schema({"text": pa.string(), "label": pa.string()})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, n_rows, BATCH):
            rows = range(start, min(start + BATCH, n_rows))
            texts = [f"text number {row} of the data set" for row in rows]
            labels = ["no" if row % 2 else "yes" for row in rows]
            writer.write_table(pa.table([texts, labels], schema=schema))
