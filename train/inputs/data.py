"""Features of a cache as ready tensors.

A split is read once into one contiguous tensor, an example's features side by side, standardised
there, and held on the device; a batch is one `index_select`. No worker processes and no per-row
collation: on data that is already in memory they cost 3 to 100 times the training step. What
exceeds the memory, as float32, lies in a mapped file instead (`llmembed.train.inputs.spill`).

Neither the model nor the texts are needed here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmembed.cache_format import SourceInfo, Split, open_cache
from llmembed.common.errors import DataError, LLMEmbedWarning
from llmembed.train.config import FitConfig
from llmembed.train.fusions.classifier import Architecture, Standardiser
from llmembed.train.fusions.paper import paper_features
from llmembed.train.inputs.select import Feature, select_features
from llmembed.train.inputs.shares import (
    HELD_OUT_FRACTION,
    TRAIN_SPLIT,
    Rows,
    Shares,
    choose_shares,
    draw_validation,
)
from llmembed.train.inputs.spill import make_room
from llmembed.train.measures.metrics import Floats

_BLOCK_ROWS = 1 << 14  # whole blocks of any cache, which have at most 1,024 rows

Batch = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class FitData:
    """All that a fit needs."""

    labels: tuple[str, ...]
    """Names of the C classes."""
    sources: Mapping[str, SourceInfo]
    """Backbones of the cache, by name; empty where the features come from none."""
    fingerprint: str | None
    """Of the cache that the features come from; None where they come from none."""
    text_column: str | None = None
    """Column of the texts, or two with a comma between, as the cache recorded it."""
    features: tuple[Feature, ...]
    """What stands side by side in `x`, in this order."""
    shares: Shares
    """Rows of `x` that train and validate."""
    standardiser: Standardiser
    """Statistics of the training share."""
    x: Tensor
    """float32 `[N, F]`, standardised features of the training split, and behind them of the
    validation split where the shares have one."""
    y: Tensor
    """int64 `[N]`, labels of these rows, -1 where there is none."""
    x_eval: Tensor
    """float32 `[n, F]`, standardised features of the evaluation rows."""
    y_eval: Tensor
    """int64 `[n]`, labels of the evaluation rows."""
    sample_weights: Tensor | None = None
    """float32 `[N]`, weight of each row of `x`, whatever its class; None weighs all alike."""
    given_class_weights: Tensor | None = None
    """float32 `[C]`, weight of each class; None is what the config says."""


def load_data(config: FitConfig, *, read_evaluation: bool = True) -> FitData:
    """Read what a config asks for; without the evaluation rows `x_eval` is empty.

    Raises:
        CacheError: the cache is missing, malformed or incomplete.
        ConfigError: the cache has no such split, source, layer or pooling.
        DataError: labels or features that cannot be trained on.
    """
    cache = open_cache(config.cache)
    shares = choose_shares(cache, config)
    if read_evaluation and not len(shares.eval):
        warnings.warn(
            f"{HELD_OUT_FRACTION:.0%} of the {len(shares.train)} training rows is no row that can "
            "be held out, so all of them train and none is evaluated. Extract a test split to have "
            "figures.",
            LLMEmbedWarning,
            stacklevel=2,
        )
    split, eval_split = cache[shares.train_split], cache[shares.eval_split]
    features = select_features(cache, split, config)
    if config.preset == "paper":
        features = paper_features(features)
    splits = [split] + [cache[name] for name in [shares.validation_split] if name is not None]
    x = _read_splits(splits, features, config.memory_gb)
    standardiser = _standardiser(config, x, shares)
    standardiser.apply_(x)
    rows = torch.from_numpy(shares.eval)
    column = cache.dataset.provenance.get("text_column")
    if not read_evaluation:
        x_eval = x[:0]
    elif shares.held_out:
        x_eval = x[rows]
    else:
        x_eval = read_features(eval_split, features, shares.eval, memory_gb=config.memory_gb)
        standardiser.apply_(x_eval)
    return FitData(
        labels=cache.labels,
        sources=cache.sources,
        fingerprint=cache.fingerprint,
        text_column=column if isinstance(column, str) else None,
        features=features,
        shares=shares,
        standardiser=standardiser,
        x=x,
        y=torch.cat([_labels(one) for one in splits]),
        x_eval=x_eval,
        y_eval=_labels(eval_split)[rows],
    )


def data_in_memory(
    config: FitConfig,
    x: Tensor,
    y: Rows,
    labels: Sequence[str],
    features: Sequence[Feature],
    *,
    sample_weights: Floats | None = None,
    class_weights: Floats | None = None,
) -> FitData:
    """Make the data of a fit that trains on all rows and evaluates none; `x` is standardised.

    Args:
        config: options of the fit; its cache is not read.
        x: float32 `[N, F]`, features side by side.
        y: int64 `[N]`, classes.
        labels: names of the C classes.
        features: what stands side by side in `x`.
        sample_weights: float64 `[N]`, weights above 0 of the rows; None weighs all alike.
        class_weights: float64 `[C]`, weights above 0 of the classes; None is what the config says.
    """
    rows, generator = np.arange(len(y)), np.random.default_rng(config.seed)
    train, validation = draw_validation(y, rows, labels, config, generator)
    weights = None if sample_weights is None else proportions(sample_weights)
    standardiser = Standardiser.of(x, torch.from_numpy(train), weights)
    return FitData(
        labels=tuple(labels),
        sources={},
        fingerprint=None,
        features=tuple(features),
        shares=Shares(
            train=train,
            validation=validation,
            eval=rows[:0],
            train_split=TRAIN_SPLIT,
            eval_split=TRAIN_SPLIT,
        ),
        standardiser=standardiser,
        x=standardiser.apply_(x),
        y=torch.from_numpy(y),
        x_eval=x[:0],
        y_eval=torch.from_numpy(y[:0]),
        sample_weights=weights,
        given_class_weights=None if class_weights is None else torch.from_numpy(class_weights),
    )


def architecture_of(config: FitConfig, data: FitData, head: str) -> Architecture:
    """Derive the classifier's shapes from the features that were read."""
    return Architecture(
        fusion=config.operator,
        head=head,
        widths=tuple(feature.hidden_size for feature in data.features),
        n_classes=len(data.labels),
        dropout=config.training.dropout,
    )


def columns_of(widths: Sequence[int], features: Sequence[int]) -> Tensor:
    """List the columns of some of the features that stand side by side, int64 `[c]`.

    >>> columns_of((2, 3, 1), (2, 0)).tolist()
    [5, 0, 1]
    """
    ends = np.cumsum(widths).tolist()
    return torch.cat([torch.arange(ends[k] - widths[k], ends[k]) for k in features])


def class_weights(config: FitConfig, data: FitData) -> Tensor:
    """Weigh each class, float32 `[C]`, such that the weights of the training rows have mean 1.

    Balanced, class c has `n / (C n_c)`, C being the classes that occur, n_c the sum of the sample
    weights of its rows, n that of all.
    """
    rows = torch.from_numpy(data.shares.train)
    weights = None if data.sample_weights is None else data.sample_weights[rows].double()
    counts = torch.bincount(data.y[rows], weights, minlength=len(data.labels)).double()
    if data.given_class_weights is not None:
        given = data.given_class_weights.double()
        return (given * (counts.sum() / (given @ counts))).float()
    if config.class_weight == "none":
        return torch.ones_like(counts, dtype=torch.float32)
    present = counts > 0
    balanced = counts.sum() / (present.sum() * torch.where(present, counts, 1.0))
    return torch.where(present, balanced, 0.0).float()


def proportions(weights: Floats) -> Tensor | None:
    """Scale weights to a mean of 1, float32 `[N]`, for only their proportions matter.

    None stands for weights that are all alike, so that they change nothing.

    >>> proportions(np.array([1.0, 3.0])), proportions(np.array([2.0, 2.0]))
    (tensor([0.5000, 1.5000]), None)
    """
    if not len(weights) or (weights == weights[0]).all():
        return None
    return torch.from_numpy(weights / weights.mean()).float()


def read_features(
    split: Split,
    features: Sequence[Feature],
    rows: Rows | slice | None = None,
    memory_gb: float | None = None,
) -> Tensor:
    """Read features side by side.

    Args:
        split: split to read.
        features: arrays to read, in the order of the columns.
        rows: int64 `[n]`, or a slice from one row to another; None is all.
        memory_gb: most memory for them; beyond it they are read in blocks into a mapped file.

    Returns:
        float32 `[n, F]`, with F the sum of the hidden sizes.

    Raises:
        CacheError: the array is incomplete, or its bytes are not those that were committed.
        DataError: a feature is NaN or infinite.
    """
    rows = slice(0, split.n_rows) if rows is None else rows
    n_rows = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    x, is_mapped = make_room(n_rows, sum(feature.hidden_size for feature in features), memory_gb)
    _read_rows(x, split, features, rows, in_blocks=is_mapped)
    return x


def _read_splits(
    splits: Sequence[Split], features: Sequence[Feature], memory_gb: float | None
) -> Tensor:
    """Read all rows of some splits, one below the other."""
    n_rows = [split.n_rows for split in splits]
    width = sum(feature.hidden_size for feature in features)
    x, is_mapped = make_room(sum(n_rows), width, memory_gb)
    for split, part in zip(splits, torch.split(x, n_rows), strict=True):
        _read_rows(part, split, features, slice(0, split.n_rows), in_blocks=is_mapped)
    return x


def _read_rows(
    x: Tensor, split: Split, features: Sequence[Feature], rows: Rows | slice, *, in_blocks: bool
) -> None:
    step = _BLOCK_ROWS if in_blocks else max(1, len(x))
    for first in range(0, len(x), step):
        block = slice(first, min(first + step, len(x)))
        _read_block(x.numpy()[block], split, features, _part(rows, block))


def _part(rows: Rows | slice, block: slice) -> Rows | slice:
    if isinstance(rows, slice):
        return slice(rows.start + block.start, rows.start + block.stop)
    return rows[block]


def _read_block(
    x: npt.NDArray[np.float32], split: Split, features: Sequence[Feature], rows: Rows | slice
) -> None:
    """Fill float32 `[n, F]` with some rows, feature by feature."""
    start = 0
    for feature in features:
        block = x[:, start : start + feature.hidden_size]
        stored = split.features(
            feature.layer, feature.source, feature.pooling, rows=rows, verify=True
        )
        _widen(stored, block)
        _check_finite(block, feature, split, rows)
        start += feature.hidden_size


def _widen(stored: np.ndarray, x: npt.NDArray[np.float32]) -> None:
    """Copy float16 or float32 into float32, six times as fast as numpy does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        torch.from_numpy(x).copy_(torch.from_numpy(stored))


class FeatureBatches:
    """Ready batches of `x[rows]`, `y[rows]` and `weights[rows]`, iterable again and again.

    With a generator each pass has a new order; without one the order is that of the rows.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        rows: Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        weights: Tensor | None = None,
    ) -> None:
        self.x, self.y, self.rows, self.weights = x, y, rows, weights
        self.batch_size, self.generator = batch_size, generator
        self.device = x.device if device is None else device

    def __len__(self) -> int:
        """Count the batches of a pass."""
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield float32 `[B, F]`, int64 `[B]` and, where rows are weighed, float32 `[B]`."""
        rows = self.rows
        if self.generator is not None:
            order = torch.randperm(len(rows), generator=self.generator)
            rows = rows[order.to(rows.device)]
        for chosen in torch.split(rows, self.batch_size):
            x, y = self.x.index_select(0, chosen), self.y.index_select(0, chosen)
            weights = None if self.weights is None else self.weights[chosen].to(self.device)
            yield x.to(self.device), y.to(self.device), weights


def _standardiser(config: FitConfig, x: Tensor, shares: Shares) -> Standardiser:
    if config.preset == "paper":
        return Standardiser(x.shape[1])  # raw scales
    return Standardiser.of(x, torch.from_numpy(shares.train))


def _labels(split: Split) -> Tensor:
    return torch.from_numpy(np.asarray(split.labels, dtype=np.int64))


def _check_finite(block: np.ndarray, feature: Feature, split: Split, rows: Rows | slice) -> None:
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        row = first + rows.start if isinstance(rows, slice) else int(rows[first])
        raise DataError(
            f"{len(finite) - int(finite.sum())} rows of {feature} in split {split.name!r} hold "
            f"NaN or infinite values, the first is row {row}. Extract that layer again with "
            "--dtype float32 --overwrite, or leave it out with --layers."
        )
