"""How a cache grows with its rows: objects, metadata, and the time to open, plan and resume.

Features are four numbers wide, so that only what grows with the number of blocks is seen; the
blocks have the 1,024 rows of a wide model. Numbers for 10 million rows are extrapolated along the
last two sizes, and docs/scaling.md shows them.

    python benchmarks/bench_scaling.py [--n-rows 10000 100000 1000000]

The features read are compared with those written. The last line is JSON, and is also written to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmembed.cache_format import CacheWriter, DatasetInfo, SourceInfo, open_cache
from llmembed.cache_format.tools import finalize

RESULTS = Path(__file__).parent / "results"
LAYERS = (1, 2, 3, 4)
HIDDEN_SIZE = 4
TARGET_ROWS = 10_000_000
DATASET = DatasetInfo(name="scaling", labels=("a",), provenance={})
SOURCE = SourceInfo(name="s", fingerprint={}, recipe={}, hidden_size=HIDDEN_SIZE, n_layers=4)


def main() -> None:
    """Measure each size, extrapolate, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_scaling.json")
    arguments = parser.parse_args()
    sizes = []
    for n_rows in arguments.n_rows:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            sizes.append(measure(Path(folder) / "cache.zarr", n_rows))
    extrapolated = extrapolate(sizes[-2], sizes[-1], TARGET_ROWS)
    result = {
        "layers": len(LAYERS),
        "load_average": os.getloadavg()[0],
        "measured": sizes,
        "extrapolated": extrapolated,
    }
    for row in [*sizes, extrapolated]:
        print("  ".join(f"{key} {value:g}" for key, value in row.items()))
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def measure(path: Path, n_rows: int) -> dict[str, float]:
    """Write a cache of that many rows and measure it."""
    labels, text_hash = np.zeros(n_rows, np.int32), np.arange(n_rows, dtype=np.uint64)
    features = np.arange(n_rows * HIDDEN_SIZE, dtype=np.float32).reshape(n_rows, HIDDEN_SIZE) % 99
    write_s = seconds(lambda: write(path, features), 1)
    files = [file for file in path.rglob("*") if file.is_file()]
    chunks = [file for file in files if file.name.startswith("c.")]
    sizes = {file: file.stat().st_size for file in files}
    indexes = list(path.rglob(".llmembed/index/**/*.json"))
    result = {
        "n_rows": n_rows,
        "n_files": len(files),
        "n_chunks": len(chunks),
        "metadata_bytes": sum(size for file, size in sizes.items() if file not in set(chunks)),
        "index_bytes": sum(sizes[file] for file in indexes),
        "write_s": write_s,
        "open_s": seconds(lambda: open_cache(path), 7),
        "open_and_read_10_rows_s": seconds(lambda: read(path, slice(0, 10)), 7),
        "resume_complete_s": seconds(lambda: write(path, features), 3),
        "plan_bytes": peak_bytes(partial(plan_units, path / "new", labels, text_hash)),
    }
    remove(indexes)
    result["open_and_read_10_rows_without_index_s"] = seconds(lambda: read(path, slice(0, 10)), 3)
    result["finalize_s"] = seconds(partial(close, path, indexes), 3)
    result["finalize_bytes"] = peak_bytes(partial(close, path, indexes))
    if not np.array_equal(read(path, None), features.astype(np.float16)):
        raise AssertionError("the cache gave other features")
    return result


def write(path: Path, features: np.ndarray[Any, Any]) -> None:
    """Write what is missing of a cache of four layers."""
    n_tokens = np.zeros(len(features), np.int32)
    with CacheWriter(path, dataset=DATASET) as writer:
        writer.add_source(SOURCE)
        text_hash = np.arange(len(features), dtype=np.uint64)
        writer.add_split("train", labels=n_tokens, text_hash=text_hash)
        plan = writer.plan("train", "s", arrays=[("mean", layer) for layer in LAYERS])
        for block in plan.blocks:
            rows = slice(block.start, block.stop)
            arrays = dict.fromkeys(block.missing, features[rows])
            writer.write(plan, block, n_tokens=n_tokens[rows], features=arrays)
        writer.finish("train", "s")


def read(path: Path, rows: slice | None) -> np.ndarray[Any, Any]:
    """Open a cache and read rows of one layer."""
    return open_cache(path)["train"].features(2, rows=rows)


def remove(indexes: Sequence[Path]) -> None:
    """Make a cache as it is before a writer closes it."""
    for index in indexes:
        index.unlink(missing_ok=True)


def close(path: Path, indexes: Sequence[Path]) -> None:
    """Close a cache that several writers filled."""
    remove(indexes)
    finalize(path)


def plan_units(
    path: Path, labels: np.ndarray[Any, Any], text_hash: np.ndarray[Any, Any]
) -> list[str]:
    """Plan a cache that has nothing yet, and make its blocks ready for workers."""
    with CacheWriter(path, dataset=DATASET, dry_run=True) as writer:
        writer.add_source(SOURCE)
        writer.add_split("train", labels=labels, text_hash=text_hash)
        plan = writer.plan("train", "s", arrays=[("mean", layer) for layer in LAYERS])
        parts = (plan.blocks[first : first + 16] for first in range(0, len(plan.blocks), 16))
        units = [writer.unit(plan, part) for part in parts]
        return [unit.dumps() for unit in units]


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most memory that Python's objects take while it runs, beyond what they took before."""
    tracemalloc.start()
    run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median time of some rounds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def extrapolate(small: dict[str, float], large: dict[str, float], n_rows: int) -> dict[str, float]:
    """Continue the straight line through two sizes.

    >>> extrapolate({"n_rows": 1, "x": 10}, {"n_rows": 2, "x": 12}, 5)
    {'n_rows': 5, 'x': 18.0}
    """
    share = (n_rows - large["n_rows"]) / (large["n_rows"] - small["n_rows"])
    found = {key: large[key] + share * (large[key] - small[key]) for key in large}
    return {**found, "n_rows": n_rows}


if __name__ == "__main__":
    main()
