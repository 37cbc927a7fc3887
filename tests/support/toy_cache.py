"""A small data set with known features, and how to write it to a cache."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmembed.cache_format import (
    Cache,
    CacheWriter,
    DatasetInfo,
    SourceInfo,
    SplitPlan,
    open_cache,
)
from llmembed.cache_format.layout.schema import content_digest
from llmembed.cache_format.writing.lock import LOCK
from llmembed.common.errors import CacheFormatError, CacheNotFoundError

HIDDEN_SIZE = 16
DATASET = DatasetInfo(name="toy", labels=("no", "yes", "maybe"), provenance={"origin": "made up"})
SOURCE = SourceInfo(
    name="tiny",
    fingerprint={"weights": "abc", "max_length": 512},
    recipe={"model": "tiny"},
    hidden_size=HIDDEN_SIZE,
    n_layers=12,
)


@dataclasses.dataclass(frozen=True)
class Toy:
    """A data set whose feature (row, pooling, layer) is known by arithmetic."""

    n_rows: int = 200

    @property
    def labels(self) -> NDArray[np.int32]:
        return (np.arange(self.n_rows) % 3).astype(np.int32)

    @property
    def text_hash(self) -> NDArray[np.uint64]:
        return np.arange(self.n_rows, dtype=np.uint64) * 7 + 2**63

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        return (np.arange(self.n_rows) % 40 + 1).astype(np.int32)

    def features(self, pooling: str, layer: int) -> NDArray[np.float16]:
        rows = np.arange(self.n_rows)[:, None] * 0.25 + np.arange(HIDDEN_SIZE)
        return (rows + 100 * layer + len(pooling)).astype(np.float16)


def write_toy(
    path: Path | str,
    n_rows: int = 200,
    *,
    layers: Sequence[int] = (4, 8),
    poolings: Sequence[str] = ("last", "mean"),
    n_blocks: int | None = None,
    split: str = "train",
    source: SourceInfo = SOURCE,
    **options: Any,
) -> SplitPlan:
    """Extract the toy data set, as far as `n_blocks`; return the plan that was found."""
    toy = Toy(n_rows)
    with CacheWriter(path, dataset=DATASET, **options) as writer:
        writer.add_source(source)
        writer.add_split(split, labels=toy.labels, text_hash=toy.text_hash)
        plan = writer.plan(split, source.name, arrays=product(poolings, layers))
        for block in plan.blocks[:n_blocks]:
            rows = slice(block.compute_from, block.stop)
            features = {key: toy.features(*key)[rows] for key in block.missing}
            writer.write(plan, block, n_tokens=toy.n_tokens[rows], features=features)
        if n_blocks is None:
            writer.finish(split, source.name)
    return plan


def assert_toy(cache: Cache, n_rows: int = 200, *, split: str = "train") -> None:
    """Every feature of the cache is the one that arithmetic gives."""
    toy, found = Toy(n_rows), cache[split]
    assert found.arrays
    for source, pooling, layer in found.arrays:
        features = found.features(layer, source, pooling, verify=True)
        np.testing.assert_array_equal(features, toy.features(pooling, layer))
    np.testing.assert_array_equal(found.labels, toy.labels)
    np.testing.assert_array_equal(found.text_hash, toy.text_hash)
    np.testing.assert_array_equal(found.n_tokens("tiny"), toy.n_tokens)


def count_right_rows(path: Path) -> int:
    """Count the rows of all arrays that a reader may see, and check each of them."""
    try:
        cache = open_cache(path)
    except (CacheNotFoundError, CacheFormatError):
        assert not list(path.rglob("commits/**/*.json"))
        return 0
    total = 0
    for split in (cache[name] for name in cache.splits):
        for (source, pooling, layer), n in split.arrays.items():
            found = split.features(layer, source, pooling, allow_partial=True)
            there = ~np.isnan(found).any(axis=1)
            expected = Toy(len(found)).features(pooling, layer)
            assert there.sum() == n
            np.testing.assert_array_equal(found[there], expected[there])
            total += n
    return total


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a cache with its bytes."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def set_format(path: Path, **changes: int) -> None:
    """Let the root say that it is of another format, with a digest that holds."""
    document = json.loads((path / "zarr.json").read_bytes())
    content = document["attributes"]["llmembed"]
    content |= changes
    content["digest"] = content_digest(content)
    (path / "zarr.json").write_text(json.dumps(document))


def end_process(path: Path) -> None:
    """Let a lock that was left in a cache be one of a process that has ended."""
    holder = {"pid": os.getpid(), "host": platform.node(), "started": "1", "token": "x"}
    if (path / LOCK).exists():
        (path / LOCK).write_text(json.dumps(holder))


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Write settings of an extraction as a command takes them."""
    values = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
