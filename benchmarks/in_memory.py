"""Rows of a cache in memory, for studies that draw from them or fit many classifiers on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmembed.cache_format import Cache
from llmembed.common.errors import ConfigError
from llmembed.common.splits import draw_share
from llmembed.train import FitConfig
from llmembed.train.inputs import Feature, data_in_memory
from llmembed.train.inputs.data import FitData
from llmembed.train.verbs.fitting import train

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Training rows of one source, and those that judge."""

    features: tuple[Feature, ...]
    labels: tuple[str, ...]
    x: Floats
    """`[N, F]`, features side by side."""
    y: Ints
    x_eval: Floats
    y_eval: Ints

    def drawn(self, rows: Ints) -> Rows:
        """Keep some training rows."""
        return dataclasses.replace(self, x=self.x[rows], y=self.y[rows])

    def at(self, kept: Sequence[int]) -> Rows:
        """Keep the features at some positions."""
        features = tuple(self.features[k] for k in kept)
        columns = self.columns(features)
        x, x_eval = self.x[:, columns], self.x_eval[:, columns]
        return dataclasses.replace(self, features=features, x=x, x_eval=x_eval)

    def columns(self, features: Sequence[Feature]) -> Ints:
        """List the columns of some features."""
        starts = np.cumsum([0, *(one.hidden_size for one in self.features)])
        positions = [self.features.index(one) for one in features]
        return np.concatenate([np.arange(starts[k], starts[k + 1]) for k in positions])

    def data(self, config: FitConfig) -> FitData:
        """Make the data of a fit, as `LLMEmbedClassifier` does."""
        x = torch.from_numpy(self.x.copy())
        return data_in_memory(config.plan().reading, x, self.y, self.labels, self.features)


def eval_split_of(cache: Cache) -> str:
    return "test" if "test" in cache.splits else "validation"


def read_rows(cache: Cache, source: str, train_rows: Ints, judged: Ints) -> Rows:
    """Read all features of a source, of some rows.

    Raises:
        ConfigError: the cache has no such source.
    """
    if source not in cache.sources:
        raise ConfigError.unknown(
            "source", source, cache.sources, f"It is missing in {cache.path}."
        )
    arrays = sorted(array for array in cache["train"].arrays if array[0] == source)
    width = cache.sources[source].hidden_size
    splits = {"train": train_rows, eval_split_of(cache): judged}
    x, x_eval = (
        np.concatenate(
            [cache[name].features(k, source, pooling)[rows] for _, pooling, k in arrays],
            axis=1,
            dtype=np.float32,
        )
        for name, rows in splits.items()
    )
    y, y_eval = (
        np.asarray(cache[name].labels, dtype=np.int64)[rows] for name, rows in splits.items()
    )
    features = tuple(Feature(*array, width) for array in arrays)
    return Rows(features=features, labels=cache.labels, x=x, y=y, x_eval=x_eval, y_eval=y_eval)


def at_most(labels: npt.NDArray[np.int32], most: int | None) -> Ints:
    """List the labelled rows, or draw so many, stratified and the same each time.

    >>> at_most(np.array([0, 0, -1, 1, 1], np.int32), None).tolist()
    [0, 1, 3, 4]
    >>> len(at_most(np.array([0, 0, -1, 1, 1], np.int32), 2))
    2
    """
    rows = np.flatnonzero(labels >= 0)
    if most is None or len(rows) <= most:
        return rows
    by_class = np.lexsort((np.random.default_rng(0).random(len(rows)), labels[rows]))
    return rows[draw_share(labels[rows], most / len(rows), by_class)]


def identity(cache: Cache, source: str | None) -> dict[str, Any]:
    """Name what figures depend on: texts, labels, and the features of a source."""
    sources = {source} if source else set()
    arrays = sorted(f"{pooling}/{k}" for own, pooling, k in cache["train"].arrays if own == source)
    splits = {"train", eval_split_of(cache)}
    return {"cache": cache.fingerprint_of(splits=splits, sources=sources), "features": arrays}


def predicted_by(rows: Rows, **options: Any) -> Ints:
    """Fit with options of `llmembed-fit`, and label the rows that judge."""
    config = FitConfig(cache="texts", accelerator="cpu", **options)
    outcome = train(config.plan(), rows.data(config))
    classifier = outcome.best.classifier
    new = torch.from_numpy(rows.x_eval[:, rows.columns(outcome.data.features)])
    logits = classifier.logits_all(classifier.standardise.apply_(new))
    predicted: Ints = logits.argmax(dim=1).numpy()
    return predicted
