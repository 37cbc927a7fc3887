"""The cache against the memory it is copied through, the disk, and zarr-python's defaults.

Reading is limited by memory: the ceiling is `np.memmap` of one flat file, copied by one thread as
users do. Every reader of a whole layer is timed until each of its bytes has been read once from
the array it gave, so that a mapping cannot win by having read nothing; `copied load` is a fresh
copy by our threads, without that. Writing is limited by the file system: the ceiling is appending
the same rows to one flat file a layer. Both, zarr-python with its default layout, and ours
alternate within each round, so that what else the machine does hits all alike; the median counts.

    python benchmarks cache [--n-rows 65536] [--hidden-size 4096] [--rounds 7]

The answers of all readers are compared after timing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import zarr

from llmembed.cache_format import CacheWriter, DatasetInfo, SourceInfo, open_cache

N_RANDOM = 1024
APPEND_ROWS = 64
TARGETS = {
    "load / memmap": 0.9,
    "load / zarr default": 8.0,
    "verified load / memmap": 0.5,
    "verified load / zarr default": 5.0,
    "random rows / memmap": 0.5,
    "random rows / zarr default": 50.0,
    "append / raw append": 0.5,
    "append / zarr unbuffered": 50.0,
}
ALSO_SHOWN = ("copied load / memmap copy", "copied load / zarr default copy")
Array = np.ndarray[Any, Any]
Workload = dict[str, Callable[[], Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, compare the answers, print a table and one JSON line."""
    parser = harness.command_line(__doc__, "speed/cache.json")
    parser.add_argument("--n-rows", type=int, default=65_536)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        size = options.n_rows, options.hidden_size
        result = measure(Path(folder), *size, rounds=options.rounds)
    print_table(result)
    harness.finish(result, options.output)


def measure(folder: Path, n_rows: int, hidden_size: int, *, rounds: int) -> dict[str, Any]:
    """Time reading and writing one layer, and check that all readers agree."""
    load_before = os.getloadavg()[0]
    features = make_features(n_rows, hidden_size)
    make_stores(folder, features)
    chosen = np.random.default_rng(1).integers(0, n_rows, N_RANDOM)
    whole, rows = reading(folder, features.shape, chosen)
    seconds = {
        "load": medians(whole, rounds),
        "random rows": medians(rows, rounds),
        "append": medians(writing(folder, features), max(1, min(rounds, 5))),
    }
    check(whole, features)
    check(rows, features[chosen])
    return {
        "n_rows": n_rows,
        "hidden_size": hidden_size,
        "size_bytes": features.nbytes,
        "rounds": rounds,
        "load_average": [load_before, os.getloadavg()[0]],
        "n_cores": len(os.sched_getaffinity(0)),
        "seconds": seconds,
        "ratios": ratios(seconds),
        "targets": TARGETS,
    }


def make_features(n_rows: int, hidden_size: int) -> Array:
    """float16 `[N, H]`: mantissas of noise, as pooled hidden states have them."""
    rng = np.random.default_rng(0)
    scale = rng.lognormal(size=hidden_size).astype(np.float32)
    return (rng.standard_normal((n_rows, hidden_size), dtype=np.float32) * scale).astype("f2")


def make_stores(folder: Path, features: Array) -> None:
    """Write the same layer as a flat file, as a cache, and in zarr-python's default layout."""
    features.tofile(folder / "flat")
    write_cache(folder / "cache.zarr", {1: features})
    array = zarr.create_array(folder / "default.zarr", shape=features.shape, dtype="float16")
    array[:] = features


@contextlib.contextmanager
def planned(
    path: Path | str,
    layers: Iterable[int],
    hidden_size: int,
    labels: Array,
    *,
    split: str = "train",
    source: str = "s",
    classes: tuple[str, ...] = ("a",),
    text_hash: Array | None = None,
    **options: Any,
) -> Iterator[tuple[CacheWriter, Any]]:
    """Plan the means of some layers of a made-up cache, as far as they are missing."""
    layers = tuple(layers)
    made_up: dict[str, Any] = {"fingerprint": {}, "recipe": {}, "hidden_size": hidden_size}
    dataset = DatasetInfo(name="made-up", labels=classes, provenance={})
    with CacheWriter(path, dataset=dataset, **options) as writer:
        writer.add_source(SourceInfo(name=source, n_layers=max(layers) + 1, **made_up))
        text_hash = np.arange(len(labels), dtype=np.uint64) if text_hash is None else text_hash
        writer.add_split(split, labels=labels, text_hash=text_hash)
        yield writer, writer.plan(split, source, arrays=[("mean", layer) for layer in layers])


def write_cache(
    path: Path, features: Mapping[int, Array], labels: Array | None = None, **options: Any
) -> None:
    """Write layers, `[N, H]` each, block by block, as an extraction does."""
    n_rows, hidden_size = next(iter(features.values())).shape
    n_tokens = np.zeros(n_rows, np.int32)
    labels = n_tokens if labels is None else labels
    with planned(path, features, hidden_size, labels, **options) as (writer, plan):
        for block in plan.blocks:
            rows = slice(block.compute_from, block.stop)
            arrays = {key: features[key[1]][rows] for key in block.missing}
            writer.write(plan, block, n_tokens=n_tokens[rows], features=arrays)
        writer.finish(plan.split, plan.source)


def reading(folder: Path, shape: tuple[int, ...], chosen: Array) -> tuple[Workload, Workload]:
    """Make the readers of a whole layer and of random rows; each opens its store anew."""

    def flat() -> Array:
        return np.memmap(folder / "flat", np.float16, "r", shape=shape)

    def ours(**options: Any) -> Array:
        return open_cache(folder / "cache.zarr")["train"].features(1, **options)

    def copied() -> Array:
        return np.array(ours())

    def default() -> Any:
        return zarr.open_array(folder / "default.zarr", mode="r")

    whole: Workload = {
        "memmap": lambda: read_all(np.array(flat())),
        "zarr default": lambda: read_all(default()[:]),
        "load": lambda: read_all(ours()),
        "verified load": lambda: read_all(ours(verify=True)),
        "memmap copy": lambda: np.array(flat()),
        "zarr default copy": lambda: default()[:],
        "copied load": copied,
    }
    rows: Workload = {
        "memmap": lambda: np.array(flat()[chosen]),
        "zarr default": lambda: default().oindex[chosen],
        "random rows": lambda: ours(rows=chosen),
    }
    return whole, rows


def read_all(features: Array) -> Array:
    """Read each byte once, at the speed of one core, and give the array back."""
    np.bitwise_xor.reduce(features.view(np.uint64), axis=None)
    return features


def writing(folder: Path, features: Array) -> Workload:
    """Make the writers; zarr-python gets a sixteenth of the rows, and its time is scaled up."""

    def raw() -> None:
        with (folder / "appended").open("wb", buffering=0) as file:
            for start in range(0, len(features), APPEND_ROWS):
                file.write(features[start : start + APPEND_ROWS].data.cast("B"))

    def ours() -> None:
        shutil.rmtree(folder / "written.zarr", ignore_errors=True)
        write_cache(folder / "written.zarr", {1: features})

    def unbuffered() -> float:
        n_rows = max(APPEND_ROWS, len(features) // 16)
        array = zarr.create_array(
            folder / "slow.zarr", shape=features.shape, dtype="float16", overwrite=True
        )
        started = time.perf_counter()
        for start in range(0, n_rows, APPEND_ROWS):
            array[start : start + APPEND_ROWS] = features[start : start + APPEND_ROWS]
        return (time.perf_counter() - started) * len(features) / n_rows

    return {"raw append": raw, "append": ours, "zarr unbuffered": unbuffered}


def medians(workload: Workload, rounds: int) -> dict[str, float]:
    turns = harness.by_turns(workload, rounds, warm_up=True)
    return {name: statistics.median(seconds) for name, seconds in turns.items()}


def ratios(seconds: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times faster the first of each pair is than the second."""
    found = {}
    for pair in (*TARGETS, *ALSO_SHOWN):
        ours, other = pair.split(" / ")
        group = next(times for times in seconds.values() if ours in times)
        found[pair] = round(group[other] / group[ours], 3)
    return found


def check(workload: Workload, expected: Array) -> None:
    """Refuse a timing whose answer is wrong."""
    for name, run in workload.items():
        if not np.array_equal(run(), expected):
            raise AssertionError(f"{name} gave other features")


def print_table(result: dict[str, Any]) -> None:
    """Print speeds, then ratios with their targets."""
    print(f"{result['size_bytes'] / 1e6:.0f} MB a layer, load {result['load_average']}")
    for group, times in result["seconds"].items():
        for name, value in times.items():
            size_bytes = result["size_bytes"]
            if group == "random rows":
                size_bytes *= N_RANDOM / result["n_rows"]
            print(
                f"{group:<12} {name:<16} {value * 1e3:9.1f} ms {size_bytes / value / 1e9:7.2f} GB/s"
            )
    for pair, value in result["ratios"].items():
        print(f"{pair:<32} {value:8.2f}  target {result['targets'].get(pair, '-')}")
