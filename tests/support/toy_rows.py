"""The toy cache with all that minor version 1 brought: several labels, weights and groups."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from toy_cache import DATASET, SOURCE, Toy

from llmembed.cache_format import CacheWriter

N_CLASSES = len(DATASET.labels)


def label_sets(n_rows: int) -> NDArray[np.int8]:
    """Label k where bit k of the row is set; of every tenth row nothing is known."""
    rows = np.arange(n_rows)[:, None]
    sets = ((rows >> np.arange(N_CLASSES)) & 1).astype(np.int8)
    sets[9::10] = -1
    return sets


def weights(n_rows: int) -> NDArray[np.float32]:
    """Quarters, from nothing to one and a half."""
    return (np.arange(n_rows) % 7 / 4).astype(np.float32)


def groups(n_rows: int) -> NDArray[np.uint64]:
    """Five rows a group."""
    return (np.arange(n_rows) // 5).astype(np.uint64) + np.uint64(2**63)


def rows_of(n_rows: int, *names: str) -> dict[str, Any]:
    """Columns of a split as `CacheWriter.add_split` takes them: these, or all."""
    toy = Toy(n_rows)
    given = {"label_sets": label_sets(n_rows), "weights": weights(n_rows), "groups": groups(n_rows)}
    given = {name: values for name, values in given.items() if not names or name in names}
    labels = np.full(n_rows, -1, np.int32) if "label_sets" in given else toy.labels
    return {"labels": labels, "text_hash": toy.text_hash, **given}


def write_rows(path: Path | str, n_rows: int = 100, *names: str, **columns: Any) -> None:
    """Write the toy features beside these columns, or add to what is there."""
    toy = Toy(n_rows)
    with CacheWriter(path, dataset=DATASET) as writer:
        writer.add_source(SOURCE)
        writer.add_split("train", **rows_of(n_rows, *names) | columns)
        plan = writer.plan("train", SOURCE.name, arrays=product(["mean"], [4, 8]))
        for block in plan.blocks:
            rows = slice(block.compute_from, block.stop)
            features = {key: toy.features(*key)[rows] for key in block.missing}
            writer.write(plan, block, n_tokens=toy.n_tokens[rows], features=features)
        writer.finish("train", SOURCE.name)
