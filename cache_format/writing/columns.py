"""The columns of a split: what is given of each example is checked, and compared with the cache.

Labels and texts are the identity of a data set, and may not differ from what is there. Weights and
groups may come later: a cache without them takes them, and one that has them keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmembed.cache_format.layout.arrays import COLUMN_DTYPES, digest, read_column
from llmembed.cache_format.layout.documents import MAX_HIDDEN_SIZE
from llmembed.cache_format.layout.schema import (
    COLUMN_FIELDS,
    GROUP,
    LABEL,
    LABEL_SETS,
    TEXT_HASH,
    WEIGHT,
    Header,
    SplitInfo,
)
from llmembed.cache_format.stores import Store
from llmembed.common.errors import CacheMismatchError, ConfigError, DataError

Columns = dict[str, NDArray[Any]]
_OPTIONS: Mapping[str, str] = {WEIGHT: "--weight-column", GROUP: "--group-column"}


def checked_columns(
    split: str, n_classes: int, given: Mapping[str, NDArray[Any] | None]
) -> Columns:
    """Give the columns of a split in their dtypes, without those that are None.

    Raises:
        DataError: lengths differ, or a value is not one that its column may hold.
    """
    found = {name: np.asarray(values) for name, values in given.items() if values is not None}
    labels, text_hash = found[LABEL], found[TEXT_HASH]
    if labels.ndim != 1 or labels.shape != text_hash.shape:
        raise DataError(
            f"split {split!r} has labels of shape {labels.shape} and text hashes of shape "
            f"{text_hash.shape}; one of each belongs to every example. Pass equal lengths."
        )
    for name, values in found.items():
        shape = (len(labels), n_classes) if name == LABEL_SETS else labels.shape
        if values.shape != shape:
            raise DataError(
                f"split {split!r} has {COLUMN_FIELDS[name]} of shape {values.shape}; its "
                f"{len(labels)} examples and {n_classes} classes need {shape}. Pass that shape."
            )
    _check_labels(split, labels, n_classes)
    if LABEL_SETS in found:
        _check_label_sets(split, found[LABEL_SETS], labels)
    if WEIGHT in found:
        check_weights(split, found[WEIGHT])
    return {
        name: values.astype(np.dtype(COLUMN_DTYPES[name]).newbyteorder("<"), order="C", copy=False)
        for name, values in found.items()
    }


def info_of(columns: Columns) -> SplitInfo:
    """Make what the root document says of a split."""
    hashes = {COLUMN_FIELDS[name]: digest(values) for name, values in columns.items()}
    return SplitInfo(n_rows=len(columns[LABEL]), **hashes)


def merged(store: Store, header: Header, split: str, given: Columns) -> SplitInfo:
    """Say what a split is once it has these columns; refuse what contradicts the cache.

    Raises:
        CacheMismatchError: other labels, texts, weights or groups are there, or fewer rows were
            given, or more rows without the weights or groups that the others have.
    """
    info, known = info_of(given), header.splits.get(split)
    _check_kind(store, header, split, info)
    if known is None or known == info:
        return info
    if info.n_rows < known.n_rows:
        raise CacheMismatchError(
            f"split {split!r} of {store.location} has {known.n_rows} rows, but "
            f"{info.n_rows} were given. Give the same data set, with more rows at its end "
            "if it grew, or use another --cache."
        )
    for name in known.columns:
        if name in given:
            _check_same(store, header, split, name, given[name])
        elif info.n_rows > known.n_rows:
            raise CacheMismatchError(
                f"split {split!r} of {store.location} has {COLUMN_FIELDS[name]} for its "
                f"{known.n_rows} rows, but {info.n_rows} rows were given without. Pass "
                f"{_OPTIONS[name]}, or use another --cache."
            )
    return replace(info, weights=info.weights or known.weights, groups=info.groups or known.groups)


def check_weights(split: str, weights: NDArray[Any]) -> None:
    """Refuse weights `[N]` that are negative, not finite in float32, or 0 in all rows."""
    with np.errstate(over="ignore", under="ignore"):
        stored = weights.astype(np.float32)
    vanished = (stored == 0) & (weights != 0)
    wrong = np.flatnonzero(~np.isfinite(stored) | (stored < 0) | vanished)
    if len(wrong):
        raise DataError(
            f"split {split!r}, row {wrong[0]}: the weight is {weights[wrong[0]]} ({len(wrong)} "
            "rows in all); allowed are 0 and numbers from 1e-38 to 1e38. Correct the weight."
        )
    if len(stored) and not stored.any():
        raise DataError(
            f"split {split!r} has the weight 0 in all of its {len(stored)} rows, so that no row "
            "counts. Give some row a weight."
        )


def _check_labels(split: str, labels: NDArray[Any], n_classes: int) -> None:
    if len(labels) and not -1 <= labels.min() <= labels.max() < n_classes:
        wrong = np.flatnonzero((labels < -1) | (labels >= n_classes))
        raise DataError(
            f"split {split!r} has label {labels[wrong[0]]} in row {wrong[0]}; with {n_classes} "
            f"classes, 0 to {n_classes - 1} are allowed, and -1 for unlabelled. Correct the label."
        )


def _check_label_sets(split: str, label_sets: NDArray[Any], labels: NDArray[Any]) -> None:
    n_classes = label_sets.shape[1]
    if not 1 <= n_classes <= MAX_HIDDEN_SIZE:
        raise DataError(
            f"split {split!r} has several labels a text of {n_classes} classes; 1 to "
            f"{MAX_HIDDEN_SIZE} are allowed. Leave out labels that hardly any text has."
        )
    is_unlabelled = (label_sets == -1).all(axis=1)
    is_set = ((label_sets == 0) | (label_sets == 1)).all(axis=1)
    wrong = np.flatnonzero(~(is_unlabelled | is_set))
    if len(wrong):
        values = np.unique(label_sets[wrong[0]]).tolist()
        raise DataError(
            f"split {split!r}, row {wrong[0]}: its labels hold the values {values}; allowed are 0 "
            "and 1, or -1 in the whole row where it is unlabelled. Correct the row."
        )
    wrong = np.flatnonzero(labels != -1)
    if len(wrong):
        raise DataError(
            f"split {split!r}, row {wrong[0]} has the label {labels[wrong[0]]} beside its label "
            "set; where a text has several labels, the single one is -1. Pass -1 in all rows."
        )


def _check_kind(store: Store, header: Header, split: str, info: SplitInfo) -> None:
    """Refuse several labels a text beside splits of single ones, and columns named as sources."""
    kinds = {True: "several labels a text", False: "one label a text"}
    for other, known in header.splits.items():
        kind, given = known.label_sets is not None, info.label_sets is not None
        if kind != given:
            raise CacheMismatchError(
                f"split {other!r} of {store.location} has {kinds[kind]}, but split {split!r} was "
                f"given with {kinds[given]}. Give the same kind of labels, or use another --cache."
            )
    for source in header.sources:
        if source.casefold() in info.columns:
            raise ConfigError(
                f"{store.location} has a source named {source!r}, where the column of that name "
                f"would lie. Use another --cache, or remove the source (llmembed-cache remove "
                f"--source {source})."
            )


def _check_same(store: Store, header: Header, split: str, name: str, values: NDArray[Any]) -> None:
    """Refuse a column that does not begin with the stored one; name the first differing row."""
    n_rows = header.splits[split].n_rows
    stored = read_column(store, header, split, name)
    differs = stored != values[:n_rows]
    differing = np.flatnonzero(differs.any(axis=1) if differs.ndim > 1 else differs)
    if len(differing):
        row = int(differing[0])
        raise CacheMismatchError(
            f"row {row} of split {split!r}: {store.location} has {name} {_told(stored[row])}, but "
            f"{_told(values[row])} was given ({len(differing)} of {n_rows} rows differ). Give "
            "the same data set in the same order, or use another --cache."
        )


def _told(value: Any) -> str:
    """Tell one value of a column; of a label set, which labels apply."""
    if not np.ndim(value):
        return str(value)
    return "unlabelled" if (value == -1).all() else str(np.flatnonzero(value).tolist())
