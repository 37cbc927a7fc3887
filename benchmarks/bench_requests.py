"""How many requests an object store gets for each block of rows, step by step.

An extraction on Ray is played in this process on a store in memory: plan, register, do units,
finalize. Each call that would be a request of S3 is counted; a listing is one request a thousand
names. Two sizes tell what a block costs and what does not grow with the blocks.

    python benchmarks/bench_requests.py [--n-blocks 40 80]

The features read are compared with those written. The last line is JSON, and is also written to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from llmembed.cache_format import CacheWriter, DatasetInfo, SourceInfo, open_cache
from llmembed.cache_format.tools import finalize
from llmembed.cache_format.writing import UnitWriter

RESULTS = Path(__file__).parent / "results"
LAYERS = (8, 16, 24, 32)
BLOCK_ROWS = 1024
LISTED = 1000
"""Names that one listing tells."""
KINDS: dict[str, str] = {
    "cat_file": "GET",
    "exists": "GET",
    "pipe_file": "PUT",
    "ls": "LIST",
    "find": "LIST",
    "rm_file": "DELETE",
}
DATASET = DatasetInfo(name="requests", labels=("a",), provenance={})
SOURCE = SourceInfo(name="s", fingerprint={}, recipe={}, hidden_size=4, n_layers=32)
Counts = dict[str, dict[str, float]]


def main() -> None:
    """Count two sizes and take the straight line through them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-blocks", type=int, nargs=2, default=[40, 80])
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_requests.json")
    arguments = parser.parse_args()
    small, large = arguments.n_blocks
    one, two = measure(small), measure(large)
    per_block: Counts = {
        step: {
            kind: (two[step].get(kind, 0) - one[step].get(kind, 0)) / (large - small)
            for kind in sorted({*one[step], *two[step]})
        }
        for step in two
    }
    for step, counts in per_block.items():
        print(step, "  ".join(f"{kind} {count:g}" for kind, count in counts.items()))
    result = {"n_layers": len(LAYERS), "n_blocks": [small, large], "per_block": per_block}
    result["all"] = {str(small): one, str(large): two}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def measure(n_blocks: int) -> Counts:
    """Extract, resume and finalize that many blocks, and count what each step asks for."""
    url, n_rows = f"memory://requests-{n_blocks}", n_blocks * BLOCK_ROWS
    rows = np.arange(n_rows * 4, dtype=np.float32).reshape(n_rows, 4) % 99
    counts: Counts = {}

    @contextlib.contextmanager
    def planned(**options: Any) -> Iterator[tuple[CacheWriter, Any]]:
        with CacheWriter(url, dataset=DATASET, **options) as writer:
            writer.add_source(SOURCE)
            text_hash = np.arange(n_rows, dtype=np.uint64)
            writer.add_split("train", labels=np.zeros(n_rows, np.int32), text_hash=text_hash)
            yield writer, writer.plan("train", "s", arrays=[("mean", k) for k in LAYERS])

    with counted(counts, "plan"), planned() as (writer, _):
        writer.register()
    with planned(shared="ray") as (writer, plan), counted(counts, "work"):
        for block in plan.blocks:
            unit = writer.unit(plan, [block])
            worker = UnitWriter(url, unit, writer.lease)
            for one in worker.left().blocks:
                part = rows[one.start : one.stop]
                features = dict.fromkeys(one.missing, part)
                n_tokens = np.zeros(len(part), np.int32)
                worker.write(unit.plan, one, n_tokens=n_tokens, features=features)
    began = time.perf_counter()
    with counted(counts, "finalize"):
        finalize(url, only_new=True)
    counts["finalize"]["seconds"] = time.perf_counter() - began
    with counted(counts, "resume"), planned(dry_run=True):
        pass
    if not np.array_equal(open_cache(url)["train"].features(LAYERS[0]), rows.astype(np.float16)):
        raise AssertionError("the cache gave other features")
    return counts


@contextlib.contextmanager
def counted(counts: Counts, step: str) -> Iterator[None]:
    """Count the calls of the store in memory that a request would stand for."""
    store = type(fsspec.filesystem("memory"))
    found = counts.setdefault(step, collections.defaultdict(float))
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


if __name__ == "__main__":
    main()
