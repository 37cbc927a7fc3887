"""Features of a cache as ready tensors.

A split is read once into one contiguous tensor, an example's features side by side, standardised
there; a batch is one `index_select`. Worker processes and per-row collation would cost 3 to 100
times the training step. What exceeds the memory, as float32, lies in a mapped file: the same code
gives the same result bit for bit, at the disk's speed once the rows in use exceed the memory.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from llmembed.cache_format import Cache, SourceInfo, Split, open_cache
from llmembed.common.errors import CacheSpaceError, DataError, LLMEmbedWarning, warn
from llmembed.common.progress import phase
from llmembed.common.registry import loaded
from llmembed.common.scratch import scratch_array, scratch_folder
from llmembed.common.splits import TRAIN
from llmembed.train.config import Reading
from llmembed.train.fusions.classifier import Architecture, Standardiser
from llmembed.train.inputs.grouping import Groups
from llmembed.train.inputs.select import Feature, select_features
from llmembed.train.inputs.sets import Targets, targets_of, weights_of_sets
from llmembed.train.inputs.shares import (
    HELD_OUT_FRACTION,
    Rows,
    Shares,
    choose_shares,
    draw_validation,
    weights_of_rows,
)
from llmembed.train.inputs.weighing import weights_by_name
from llmembed.train.measures import Floats

GB = 1e9
_BLOCK_ROWS = 1 << 14  # whole blocks of any cache, which have at most 1,024 rows


@dataclass(frozen=True, kw_only=True)
class FitData:
    """All that a fit needs."""

    labels: tuple[str, ...]  # names of the C classes
    sources: Mapping[str, SourceInfo]  # backbones of the cache, by name; none where there is none
    fingerprint: str | None  # of the cache; None where there is none
    eval_fingerprint: str | None = None  # of the evaluation split's texts and labels alone
    text_column: str | None = None  # as the cache recorded it; of pairs two, with a comma between
    dataset: str | None = None  # short name of the data set, as the cache has it
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of its texts, as the cache has it
    features: tuple[Feature, ...]  # what stands side by side in `x`, in this order
    shares: Shares  # rows of `x` that train and validate
    standardiser: Standardiser  # statistics of the training share
    x: Tensor  # float32 `[N, F]`, standardised: rows of the training, then of a validation split
    # int64 `[N]`, labels of these rows, -1 where there is none; where a text may have several,
    # `[N, C]`, 1 for those that it has
    y: Tensor
    x_eval: Tensor  # float32 `[n, F]`, standardised features of the evaluation rows
    y_eval: Tensor  # int64 `[n]` or `[n, C]`, labels of the evaluation rows
    base_logits: Tensor | None = None  # float32 `[N, C]`, held out, of a base that a head completes
    sample_weights: Tensor | None = None  # float32 `[N]`, whatever the class; None weighs all alike
    class_weight: str | Floats  # weights of the classes: none, balanced, or float64 `[C]`
    groups: Groups | None = None  # `[N]`, rows of one value belong together; None if none do

    @property
    def multilabel(self) -> bool:
        """Whether a text may have several labels."""
        return self.y.ndim == 2

    def class_weights(self) -> Tensor:
        """Weigh each class, float32 `[C]`, such that the weights of the training rows have mean 1.

        Balanced, class c has `n / (C n_c)`, C being the classes that occur, n_c the sum of the
        sample weights of its rows, n that of all.

        Raises:
            ConfigError: there are weights, and a text may have several labels.
        """
        if self.multilabel:
            if not (isinstance(self.class_weight, str) and self.class_weight == "none"):
                raise weights_of_sets(self.class_weight)
            return torch.ones(len(self.labels))
        rows = torch.from_numpy(self.shares.train)
        weights = None if self.sample_weights is None else self.sample_weights[rows].double()
        counts = torch.bincount(self.y[rows], weights, minlength=len(self.labels)).double()
        if not isinstance(self.class_weight, str):
            given = torch.from_numpy(self.class_weight)
            return (given * (counts.sum() / (given @ counts))).float()
        if self.class_weight == "none":
            return torch.ones_like(counts, dtype=torch.float32)
        present = counts > 0
        balanced = counts.sum() / (present.sum() * torch.where(present, counts, 1.0))
        return torch.where(present, balanced, 0.0).float()

    def architecture(self, fusion: str, head: str, dropout: float = 0.5) -> Architecture:
        """Derive a classifier's shapes from the features."""
        return Architecture(
            fusion=fusion,
            head=head,
            widths=tuple(feature.hidden_size for feature in self.features),
            n_classes=len(self.labels),
            dropout=dropout,
            multilabel=self.multilabel,
        )

    def to(self, device: torch.device) -> Self:
        """Move what is trained on."""
        moved = {name: getattr(self, name) for name in ("x", "y", "base_logits", "sample_weights")}
        return dataclasses.replace(
            self, **{name: one.to(device) for name, one in moved.items() if one is not None}
        )


def load_data(reading: Reading, *, read_evaluation: bool = True) -> FitData:
    """Read what is asked for; without the evaluation rows `x_eval` is empty.

    Raises:
        CacheError: the cache is missing, malformed or incomplete.
        ConfigError: the cache has no such split, source, layer or pooling.
        DataError: labels or features that cannot be trained on.
    """
    (data,) = load_each([reading], read_evaluation=read_evaluation)
    return data


def load_each(readings: Sequence[Reading], *, read_evaluation: bool = True) -> Iterator[FitData]:
    """Read once what several readings ask for that differ in the validation share alone.

    Each gets what `load_data` would give it. All but the last need a copy of the training features,
    for these are standardised in place by the training rows of a reading. Of shares only the first
    reading warns, so it should be one that has a validation share, if any has.
    """
    cache, first = open_cache(readings[0].cache), readings[0]
    class_weight = weights_by_name(first.class_weight, cache.labels)
    shares_of = [_shares(cache, reading, warns=reading is first) for reading in readings]
    shares = shares_of[0]
    if read_evaluation and not len(shares.eval):
        warn(
            f"{HELD_OUT_FRACTION:.0%} of the {len(shares.train)} training rows is no row that can "
            "be held out, so all of them train and none is evaluated. Extract a test split to have "
            "figures."
        )
    split, eval_split = cache[shares.train_split], cache[shares.eval_split]
    features = select_features(cache, split, first)
    if first.choose is not None:
        features = loaded(first.choose)(features)
    splits = [split] + [cache[name] for name in [shares.validation_split] if name is not None]
    n_rows = [one.n_rows for one in splits]
    width = sum(one.hidden_size for one in features)
    raw = make_room(sum(n_rows), width, first.memory_gb)
    for one, part in zip(splits, torch.split(raw, n_rows), strict=True):
        _fill(part, one, features, slice(0, one.n_rows))
    y = torch.cat([_labels(one) for one in splits])
    rows, raw_eval = torch.from_numpy(shares.eval), raw[:0]
    if read_evaluation and not shares.held_out:
        raw_eval = read_features(eval_split, features, shares.eval, memory_gb=first.memory_gb)
    column = cache.dataset.provenance.get("text_column")
    for reading, shares in zip(readings, shares_of, strict=True):
        copied = reading is not readings[-1]
        n = split.n_rows if shares.validation_split is None else len(raw)
        x = _own(raw[:n], reading, copied=copied)
        weights, groups = _weights(splits, shares, reading), _groups(splits, reading)
        standardiser = Standardiser(width)
        if reading.standardises:
            standardiser = Standardiser.of(x, torch.from_numpy(shares.train), weights)
        standardiser.apply_(x)
        if read_evaluation and shares.held_out:
            x_eval = x[rows]
        else:
            x_eval = standardiser.apply_(_own(raw_eval, reading, copied=copied))
        yield FitData(
            labels=cache.labels,
            sources=cache.sources,
            fingerprint=cache.fingerprint,
            eval_fingerprint=cache.fingerprint_of(splits=[shares.eval_split], sources=[]),
            text_column=column if isinstance(column, str) else None,
            dataset=cache.dataset.name,
            provenance=cache.dataset.provenance,
            features=features,
            shares=shares,
            standardiser=standardiser,
            x=x,
            y=y[:n],
            x_eval=x_eval,
            y_eval=_labels(eval_split)[rows],
            sample_weights=None if weights is None else weights[:n],
            class_weight=class_weight,
            groups=None if groups is None else groups[:n],
        )


def _shares(cache: Cache, reading: Reading, *, warns: bool) -> Shares:
    with warnings.catch_warnings():
        if not warns:
            warnings.simplefilter("ignore", LLMEmbedWarning)
        return choose_shares(cache, reading)


def _weights(splits: Sequence[Split], shares: Shares, reading: Reading) -> Tensor | None:
    """Weigh the rows of some splits one behind the other, float32 `[N]`, with a mean of 1."""
    given = [weights_of_rows(split, reading) for split in splits]
    if all(one is None for one in given):
        return None
    filled = [
        np.ones(split.n_rows) if one is None else one
        for split, one in zip(splits, given, strict=True)
    ]
    return proportions(np.concatenate(filled), np.concatenate([shares.train, shares.validation]))


def _groups(splits: Sequence[Split], reading: Reading) -> Groups | None:
    """Give the groups of a training split, and behind them 0, for the others are never divided."""
    groups = None if reading.ignore_groups else splits[0].groups
    if groups is None:
        return None
    return np.pad(groups, (0, sum(split.n_rows for split in splits[1:])))


def _own(x: Tensor, reading: Reading, *, copied: bool) -> Tensor:
    return make_room(len(x), x.shape[1], reading.memory_gb).copy_(x) if copied else x


def data_in_memory(
    reading: Reading,
    x: Tensor,
    y: Targets,
    labels: Sequence[str],
    features: Sequence[Feature],
    *,
    sample_weights: Floats | None = None,
    class_weights: Floats | None = None,
    groups: Groups | None = None,
) -> FitData:
    """Make the data of a fit that trains on all rows and evaluates none; `x` is standardised.

    Args:
        reading: of which only the validation share, the weights of the classes and the seed count.
        x: float32 `[N, F]`, features side by side.
        y: int64 `[N]`, classes; where a text may have several labels, `[N, C]`, 1 for those.
        labels: names of the C classes.
        features: what stands side by side in `x`.
        sample_weights: float64 `[N]`, weights above 0 of the rows; None weighs all alike.
        class_weights: float64 `[C]`, weights above 0 of the classes; None is what `reading` says.
        groups: `[N]`, rows of one value belong together; None if none do.
    """
    rows, generator = np.arange(len(y)), np.random.default_rng(reading.seed)
    train, validation = draw_validation(y, rows, labels, reading, generator, groups)
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
            train_split=TRAIN,
            eval_split=TRAIN,
        ),
        standardiser=standardiser,
        x=standardiser.apply_(x),
        y=torch.from_numpy(y),
        x_eval=x[:0],
        y_eval=torch.from_numpy(y[:0]),
        sample_weights=weights,
        class_weight=weights_by_name(reading.class_weight, labels)
        if class_weights is None
        else class_weights,
        groups=groups,
    )


def columns_of(widths: Sequence[int], features: Sequence[int]) -> Tensor:
    """List the columns of some of the features that stand side by side, int64 `[c]`.

    >>> columns_of((2, 3, 1), (2, 0)).tolist()
    [5, 0, 1]
    """
    ends = np.cumsum(widths).tolist()
    return torch.cat([torch.arange(ends[k] - widths[k], ends[k]) for k in features])


def proportions(weights: Floats, counted: Rows | slice = slice(None)) -> Tensor | None:
    """Scale weights to a mean of 1, float32 `[N]`; None stands for weights that are all alike.

    Only the rows that count have a say in what the mean is, and in whether they are alike.

    >>> proportions(np.array([1.0, 3.0])), proportions(np.array([2.0, 2.0]))
    (tensor([0.5000, 1.5000]), None)
    """
    given = weights[counted]
    if not len(given) or (given == given[0]).all():
        return None
    return torch.from_numpy(weights / given.mean()).float()


def read_features(
    split: Split,
    features: Sequence[Feature],
    rows: Rows | slice | None = None,
    memory_gb: float | None = None,
) -> Tensor:
    """Read features side by side, float32 `[n, F]`, with F the sum of the hidden sizes.

    Args:
        split: split to read.
        features: arrays to read, in the order of the columns.
        rows: int64 `[n]`, or a slice from one row to another; None is all.
        memory_gb: most memory for them; beyond it they are read into a mapped file.

    Raises:
        CacheError: the array is incomplete, or its bytes are not those that were committed.
        DataError: a feature is NaN or infinite.
    """
    rows = slice(0, split.n_rows) if rows is None else rows
    n_rows = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    x = make_room(n_rows, sum(feature.hidden_size for feature in features), memory_gb)
    _fill(x, split, features, rows)
    return x


def memory_limit() -> float:
    """Half of the machine's memory, in bytes."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    import psutil  # Windows

    return float(psutil.virtual_memory().total) / 2


def make_room(n_rows: int, width: int, memory_gb: float | None) -> Tensor:
    """Give float32 `[N, F]`, not filled yet; beyond `memory_gb` it lies in a scratch file.

    Without a limit of the user's it is half of the machine's memory, beyond which it warns.

    Raises:
        CacheSpaceError: it fits neither into that memory nor on the disk.
    """
    size = n_rows * width * np.dtype(np.float32).itemsize
    if size <= (memory_limit() if memory_gb is None else memory_gb * GB):
        return torch.from_numpy(np.empty((n_rows, width), dtype=np.float32))
    if memory_gb is None:
        warn(
            f"{size / GB:.1f} GB of features are more than half of the memory, so they lie in a "
            f"file in {scratch_folder()}, which is slower. Choose fewer --layers, or set "
            "--memory-gb."
        )
    room = scratch_array(
        (n_rows, width),
        np.float32,
        "the features that exceed the memory limit",
        remedy=", raise --memory-gb, or choose fewer --layers",
        error=CacheSpaceError,
    )
    return torch.from_numpy(room)


def _fill(x: Tensor, split: Split, features: Sequence[Feature], rows: Rows | slice) -> None:
    """Fill float32 `[n, F]` with some rows, block by block, since all of it may not fit memory."""
    columns = torch.split(x, [feature.hidden_size for feature in features], dim=1)
    with phase(f"reading {split.name}", len(x), "rows") as progress:
        for start in range(0, len(x), _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, len(x))
            if isinstance(rows, slice):
                wanted: Rows | slice = slice(rows.start + start, rows.start + stop)
            else:
                wanted = rows[start:stop]
            for feature, column in zip(features, columns, strict=True):
                place = feature.layer, feature.source, feature.pooling
                stored = split.features(*place, rows=wanted, verify=True)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                    column[start:stop] = torch.from_numpy(stored)  # six times as fast as numpy
                _check_finite(column[start:stop].numpy(), feature, split, wanted)
            progress.count(stop - start)


class Batch(NamedTuple):
    """Some rows of a fit's data."""

    x: Tensor  # float32 `[B, F]`
    y: Tensor  # int64 `[B]`
    weights: Tensor | None = None  # float32 `[B]`, where rows are weighed
    base_logits: Tensor | None = None  # float32 `[B, C]`, where the head completes a base


class FeatureBatches:
    """Ready batches of some rows on a device, iterable again and again.

    Args:
        data: what they are of.
        rows: int64 `[n]`, which rows.
        batch_size: B; the last batch may be smaller.
        device: where batches are wanted.
        seed: gives the seed of a pass's order; None keeps that of the rows.
    """

    def __init__(
        self,
        data: FitData,
        rows: Rows,
        batch_size: int,
        device: torch.device,
        seed: Callable[[], int] | None = None,
    ) -> None:
        self._tensors = data.x, data.y, data.sample_weights, data.base_logits
        self._rows, self._device = torch.from_numpy(rows), device
        self._batch_size, self._seed = batch_size, seed

    def __len__(self) -> int:
        """Count the batches of a pass."""
        return math.ceil(len(self._rows) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; the order of a pass is drawn when the first is asked for."""
        rows = self._rows
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed())
            rows = rows[torch.randperm(len(rows), generator=generator)]
        for chosen in torch.split(rows.to(self._tensors[0].device), self._batch_size):
            yield Batch._make(
                None if one is None else one.index_select(0, chosen).to(self._device)
                for one in self._tensors
            )


def _labels(split: Split) -> Tensor:
    return torch.from_numpy(targets_of(split))


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
