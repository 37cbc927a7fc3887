"""Tiny caches of features that tell their classes apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmembed.cache_format import CacheWriter, DatasetInfo, SourceInfo
from llmembed.train import FitConfig
from llmembed.train.inputs.data import FitData, load_data

HIDDEN_SIZE = 16
LAYERS = (1, 2)
LABELS = ("earn", "grain", "trade")
MakeCache = Callable[..., Path]


def clustered(
    n: int, seed: int, *, n_classes: int = 3, n_layers: int = len(LAYERS)
) -> tuple[np.ndarray, np.ndarray]:
    """Features `[L, N, H]` that tell the classes apart, and labels in turn."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(n) % n_classes).astype(np.int32)
    centres = np.random.default_rng(99).normal(size=(n_layers, n_classes, HIDDEN_SIZE))
    noise = generator.normal(size=(n_layers, n, HIDDEN_SIZE))
    return (centres[:, labels] + noise).astype(np.float16), labels


def of_sets(
    n: int, seed: int, *, n_classes: int = 3, n_layers: int = len(LAYERS)
) -> tuple[np.ndarray, np.ndarray]:
    """Features `[L, N, H]` with a direction for each of several labels, and these, `[N, C]`."""
    generator = np.random.default_rng(seed)
    shares = 0.5 / np.arange(1, n_classes + 1)
    sets = (generator.random((n, n_classes)) < shares).astype(np.int8)
    directions = 3 * np.random.default_rng(98).normal(size=(n_layers, n_classes, HIDDEN_SIZE))
    noise = generator.normal(size=(n_layers, n, HIDDEN_SIZE))
    return (sets @ directions + 2 * noise).astype(np.float16), sets


def source_info(name: str, hidden_size: int) -> SourceInfo:
    return SourceInfo(
        name=name,
        fingerprint={"backbone": name},
        recipe={"model": name},
        hidden_size=hidden_size,
        n_layers=6,
    )


def text_hash(split: str, n: int) -> np.ndarray:
    """Stand-ins for the hashes of n different texts, which no other split has."""
    return np.arange(n, dtype=np.uint64) + np.uint64(sum(split.encode()) << 32)


def write_split(
    writer: CacheWriter,
    split: str,
    source: str,
    features: np.ndarray,
    classes: np.ndarray,
    *,
    hashes: np.ndarray | None = None,
    finish: bool = True,
) -> None:
    hashes = text_hash(split, len(classes)) if hashes is None else hashes
    several = {"label_sets": classes} if classes.ndim == 2 else {}
    labels = np.full(len(classes), -1, np.int32) if several else classes
    writer.add_split(split, labels=labels, text_hash=hashes, **several)
    plan = writer.plan(split, source, arrays=[("mean", 1 + k) for k in range(len(features))])
    for block in plan.blocks if finish else plan.blocks[:-1]:
        rows = slice(block.compute_from, block.stop)
        arrays = {("mean", 1 + k): features[k, rows] for k in range(len(features))}
        n_tokens = np.full(block.stop - block.compute_from, 3, dtype=np.int32)
        writer.write(plan, block, n_tokens=n_tokens, features=arrays)
    if finish:
        writer.finish(split, source)


def write_cache(
    path: Path,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    *,
    labels: Sequence[str] = LABELS,
    finish: bool = True,
) -> Path:
    dataset = DatasetInfo(name="tiny", labels=tuple(labels), provenance={})
    chosen = splits or {"train": clustered(90, 0), "test": clustered(60, 1)}
    with CacheWriter(path, dataset=dataset) as writer:
        writer.add_source(source_info("tiny", HIDDEN_SIZE))
        for split, (features, classes) in chosen.items():
            write_split(writer, split, "tiny", features, classes, finish=finish)
    return path


def load(config: FitConfig) -> FitData:
    """Read what a fit of these options reads."""
    return load_data(config.plan().reading)
