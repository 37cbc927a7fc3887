"""How a cache grows with its rows: objects, metadata, memory, time, and requests of a block.

Features are four numbers wide, so that only what grows with the number of blocks is seen; the
blocks have the 1,024 rows of a wide model. Numbers for 10 million rows are extrapolated along the
last two sizes, and docs/scaling.md shows them.

Requests: an extraction on Ray is played in this process on a store in memory: plan, register, do
units, finalize, resume. Each call that would be a request of S3 is counted; a listing is one
request a thousand names. Two sizes tell what a block costs and what does not grow with the blocks.

    python benchmarks scaling [--n-rows 10000 100000 1000000] [--n-blocks 40 80]

The features read are compared with those written.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import harness
import numpy as np
from speed.cache import planned, write_cache

from llmembed.cache_format import open_cache
from llmembed.cache_format.tools import finalize
from llmembed.cache_format.writing import UnitWriter

LAYERS = (8, 16, 24, 32)
HIDDEN_SIZE = 4
BLOCK_ROWS = 1024
TARGET_ROWS = 10_000_000
LISTED = 1000  # names that one listing tells
KINDS: dict[str, str] = {
    "cat_file": "GET",
    "exists": "GET",
    "pipe_file": "PUT",
    "ls": "LIST",
    "find": "LIST",
    "rm_file": "DELETE",
}
Array = np.ndarray[Any, Any]
Counts = dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each size, extrapolate, count requests, print tables and one JSON line."""
    parser = harness.command_line(__doc__, "speed/scaling.json")
    parser.add_argument("--n-rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--n-blocks", type=int, nargs=2, default=[40, 80])
    options = parser.parse_args(arguments)
    result = harness.load() | {"layers": len(LAYERS)}
    sizes = []
    for n_rows in options.n_rows:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            sizes.append(measure(Path(folder) / "cache.zarr", n_rows))
    result |= {"measured": sizes, "extrapolated": extrapolate(sizes[-2], sizes[-1], TARGET_ROWS)}
    for line in [*sizes, result["extrapolated"]]:
        print("  ".join(f"{key} {value:g}" for key, value in line.items()))
    small, large = options.n_blocks
    one, two = requests(small), requests(large)
    per_block: Counts = {
        step: {
            kind: (two[step].get(kind, 0) - one[step].get(kind, 0)) / (large - small)
            for kind in sorted({*one[step], *two[step]})
        }
        for step in two
    }
    for step, counts in per_block.items():
        print(step, "  ".join(f"{kind} {count:g}" for kind, count in counts.items()))
    result["requests"] = {"n_layers": len(LAYERS), "n_blocks": [small, large]}
    result["requests"] |= {"per_block": per_block, "all": {str(small): one, str(large): two}}
    harness.finish(result, options.output)


def measure(path: Path, n_rows: int) -> dict[str, float]:
    """Write a cache of that many rows and measure it."""
    features = np.arange(n_rows * HIDDEN_SIZE, dtype=np.float32).reshape(n_rows, HIDDEN_SIZE) % 99
    labels, text_hash = np.zeros(n_rows, np.int32), np.arange(n_rows, dtype=np.uint64)
    four = dict.fromkeys(LAYERS, features)
    write_s = harness.median_s(lambda: write_cache(path, four), 1)[0]
    sizes = {file: file.stat().st_size for file in path.rglob("*") if file.is_file()}
    chunks = [file for file in sizes if file.name.startswith("c.")]
    indexes = list(path.rglob(".llmembed/index/**/*.json"))

    def median_s(work: Callable[[], Any], rounds: int) -> float:
        return harness.median_s(work, rounds)[0]

    def reopened() -> None:
        for index in indexes:
            index.unlink(missing_ok=True)

    def close() -> None:
        """Close a cache that several writers filled."""
        reopened()
        finalize(path)

    result = {
        "n_rows": n_rows,
        "n_files": len(sizes),
        "n_chunks": len(chunks),
        "metadata_bytes": sum(sizes.values()) - sum(sizes[file] for file in chunks),
        "index_bytes": sum(sizes[file] for file in indexes),
        "write_s": write_s,
        "open_s": median_s(lambda: open_cache(path), 7),
        "open_and_read_10_rows_s": median_s(lambda: read(path, slice(0, 10)), 7),
        "resume_complete_s": median_s(lambda: write_cache(path, four), 3),
        "plan_bytes": peak_bytes(partial(plan_units, path / "new", labels, text_hash)),
    }
    reopened()
    result["open_and_read_10_rows_without_index_s"] = median_s(lambda: read(path, slice(0, 10)), 3)
    result["finalize_s"] = median_s(close, 3)
    result["finalize_bytes"] = peak_bytes(close)
    check(path, features)
    return result


def plan_units(path: Path, labels: Array, text_hash: Array) -> list[str]:
    """Plan a cache that has nothing yet, and make its blocks ready for workers."""
    options: dict[str, Any] = {"text_hash": text_hash, "dry_run": True}
    with planned(path, LAYERS, HIDDEN_SIZE, labels, **options) as (_, plan):
        parts = (plan.blocks[first : first + 16] for first in range(0, len(plan.blocks), 16))
        units = [plan.part(part) for part in parts]
        return [unit.dumps() for unit in units]


def read(path: Path | str, rows: slice | None) -> Array:
    return open_cache(path)["train"].features(LAYERS[0], rows=rows)


def check(path: Path | str, features: Array) -> None:
    if not np.array_equal(read(path, None), features.astype(np.float16)):
        raise AssertionError("the cache gave other features")


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most memory that Python's objects take while it runs, beyond what they took before."""
    tracemalloc.start()
    run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def extrapolate(small: dict[str, float], large: dict[str, float], n_rows: int) -> dict[str, float]:
    """Continue the straight line through two sizes.

    >>> extrapolate({"n_rows": 1, "x": 10}, {"n_rows": 2, "x": 12}, 5)
    {'n_rows': 5, 'x': 18.0}
    """
    share = (n_rows - large["n_rows"]) / (large["n_rows"] - small["n_rows"])
    found = {key: large[key] + share * (large[key] - small[key]) for key in large}
    return {**found, "n_rows": n_rows}


def requests(n_blocks: int) -> Counts:
    """Extract, resume and finalize that many blocks, and count what each step asks for."""
    url, n_rows = f"memory://requests-{n_blocks}", n_blocks * BLOCK_ROWS
    rows = np.arange(n_rows * HIDDEN_SIZE, dtype=np.float32).reshape(n_rows, HIDDEN_SIZE) % 99
    counts: Counts = {}
    four_layers = partial(planned, url, LAYERS, HIDDEN_SIZE, np.zeros(n_rows, np.int32))
    with counted(counts, "plan"), four_layers() as (writer, _):
        writer.register()
    with four_layers(shared="ray") as (writer, plan), counted(counts, "work"):
        for block in plan.blocks:
            unit = plan.part([block])
            worker = UnitWriter(url, unit, writer.lease)
            for one in worker.left().blocks:
                part = rows[one.start : one.stop]
                features = dict.fromkeys(one.missing, part)
                n_tokens = np.zeros(len(part), np.int32)
                worker.write(unit, one, n_tokens=n_tokens, features=features)
    began = time.perf_counter()
    with counted(counts, "finalize"):
        finalize(url, only_new=True)
    counts["finalize"]["seconds"] = time.perf_counter() - began
    with counted(counts, "resume"), four_layers(dry_run=True):
        pass
    check(url, rows)
    return counts


@contextlib.contextmanager
def counted(counts: Counts, step: str) -> Iterator[None]:
    """Count the calls of the store in memory that a request would stand for."""
    store = type(fsspec.filesystem("memory"))
    found = counts.setdefault(step, defaultdict(float))
    inside: list[str] = []
    before = {name: getattr(store, name) for name in KINDS}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted_call(*arguments: Any, **options: Any) -> Any:
            inside.append(name)
            n_names = 1
            try:
                answer = call(*arguments, **options)
                n_names = len(answer) if KINDS[name] == "LIST" else 1
                return answer
            finally:
                inside.pop()
                if not inside:  # what a call does by others is one request of S3
                    found[KINDS[name]] += -(-max(n_names, 1) // LISTED)

        return counted_call

    for name, call in before.items():
        setattr(store, name, counting(name, call))
    try:
        yield
    finally:
        for name, call in before.items():
            setattr(store, name, call)
