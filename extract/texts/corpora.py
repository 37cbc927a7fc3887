"""A data set as extraction needs it: the texts and labels of each split, in data-set order.

Columns are detected by their usual names and said; whatever is missing or ambiguous is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from llmembed.common.errors import ConfigError, DataError, listed
from llmembed.common.splits import split_name
from llmembed.extract.config import ExtractConfig
from llmembed.extract.texts.class_names import class_names
from llmembed.extract.texts.columns import as_labels, as_texts
from llmembed.extract.texts.files.dialect import AS_THE_SUFFIX_SAYS, Dialect
from llmembed.extract.texts.files.tables import split_suffix
from llmembed.extract.texts.labelling import Labels, encode_labels
from llmembed.extract.texts.origins import Origin, read_splits
from llmembed.extract.texts.pairs import column_names, join_columns
from llmembed.extract.texts.spool import forget_pages, spooled_array

_TEXT_NAMES = ("text", "sentence", "content", "review", "document", "body", "title")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "topic")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The texts of one split and their labels, in data-set order."""

    texts: pa.ChunkedArray
    """Arrow strings, `[N]`, none missing."""
    labels: npt.NDArray[np.int32]
    """Index of the class name, int32 `[N]`, -1 where unlabelled."""

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.labels)

    @functools.cached_property
    def text_hash(self) -> npt.NDArray[np.uint64]:
        """xxh3-64 of the UTF-8 text, before any template, uint64 `[N]`."""
        hashes, n_before = spooled_array(len(self), np.dtype(np.uint64)), 0
        for chunk in self.texts.chunks:
            found = (xxhash.xxh3_64_intdigest(text.as_buffer()) for text in chunk)
            part = hashes[n_before : n_before + len(chunk)]
            part[:] = np.fromiter(found, dtype=np.uint64, count=len(chunk))
            n_before += len(chunk)
            forget_pages()
        return hashes

    def part(self, start: int, stop: int) -> Examples:
        """Take a range of rows, without copying texts."""
        return Examples(texts=self.texts.slice(start, stop - start), labels=self.labels[start:stop])

    def batch(self, rows: slice) -> list[str]:
        """Read the texts of a range of rows."""
        start, stop, _ = rows.indices(len(self))
        return list(self.texts.slice(start, stop - start).to_pylist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A data set as extraction needs it."""

    name: str
    """Short name, which names the cache."""
    labels: tuple[str, ...]
    """Class names."""
    splits: Mapping[str, Examples]
    """Split name -> examples."""
    provenance: Mapping[str, str | int | None]
    """Where it came from and how it was read."""
    text_pair: bool = False
    """Whether each text is a pair."""


def load_corpus(
    dataset: str,
    *,
    config: str | None = None,
    splits: Sequence[str] = (),
    text_column: str | None = None,
    label_column: str | None = None,
    unlabelled: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    dialect: Dialect = AS_THE_SUFFIX_SAYS,
) -> Corpus:
    """Find a data set and read its texts and labels.

    Args:
        dataset: alias, Hub id or path.
        config: configuration of a Hub data set.
        splits: the wanted ones; none means all labelled ones.
        text_column: column of the texts; None detects it.
        label_column: column of the labels; None detects it.
        unlabelled: what stands in it where there is none; "" is an empty cell, null or NaN.
        limit: examples a split, stratified by label.
        seed: seed of that choice.
        dialect: how delimited files are written, where their suffix does not say it.

    Raises:
        DatasetNotFoundError: no such data set, or it cannot be had here.
        DataError: its texts or labels cannot be used.
        ConfigError: a split or column that does not exist.
    """
    origin = read_splits(dataset, config, dialect)
    splits = _known_splits(splits, origin, dataset)
    text_column, label_column = _columns(origin, splits, text_column, label_column)
    labels = _labels(origin, label_column, unlabelled, splits)
    tables = {split: origin.tables[split] for split in splits or labels.labelled_splits}
    return Corpus(
        name=_short_name(dataset),
        labels=labels.names,
        splits={
            split: _choose(_texts(split, table, text_column), labels.codes[split], limit, seed)
            for split, table in tables.items()
        },
        text_pair=text_column not in next(iter(tables.values())).column_names,
        provenance={
            "origin": origin.place,
            "text_column": text_column,
            "label_column": label_column,
            **_choices(dialect, unlabelled, limit, seed),
        },
    )


def corpus_of(config: ExtractConfig) -> Corpus:
    """Read the texts and labels that a configuration asks for, as `load_corpus` does."""
    return load_corpus(
        config.dataset,
        config=config.config,
        splits=config.split,
        text_column=config.text_column,
        label_column=config.label_column,
        unlabelled=config.unlabelled,
        limit=config.limit,
        seed=config.seed,
        dialect=Dialect.of(vars(config)),
    )


def stratified_rows(labels: npt.NDArray[np.int32], n_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Choose rows so that each class keeps its share, and at least one row where there is room.

    Args:
        labels: int32 `[N]`.
        n_rows: how many to choose, at most N.
        seed: seed of the choice within a class.

    Returns:
        Rows in ascending order, int64 `[n_rows]`.

    >>> labels = np.array([0, 0, 0, 0, 1, 1], dtype=np.int32)
    >>> np.bincount(labels[stratified_rows(labels, 3, seed=0)])
    array([2, 1])
    """
    classes, counts = np.unique(labels, return_counts=True)
    ideal = counts * (n_rows / len(labels))
    quotas = np.floor(ideal).astype(np.int64)
    if n_rows >= len(classes):
        quotas = np.maximum(quotas, 1)
    while quotas.sum() > n_rows:  # the guaranteed rows of rare classes come from the largest
        quotas[np.argmax(quotas - ideal - (quotas <= 1) * len(labels))] -= 1
    for index in np.argsort(quotas - ideal, kind="stable")[: n_rows - quotas.sum()]:
        quotas[index] += 1
    rng = np.random.default_rng(seed)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def _choices(
    dialect: Dialect, unlabelled: str | None, limit: int | None, seed: int
) -> dict[str, str | int | None]:
    """List what a cache records of choices; only what was chosen, where older caches lack it."""
    marked = {} if unlabelled is None else {"unlabelled": unlabelled}
    return {"limit": limit, "seed": seed if limit else None, **dialect.given, **marked}


def _choose(
    texts: pa.ChunkedArray, labels: npt.NDArray[np.int32], limit: int | None, seed: int
) -> Examples:
    if limit is None or limit >= len(labels):
        return Examples(texts=texts, labels=labels)
    rows = stratified_rows(labels, limit, seed)
    return Examples(texts=texts.take(pa.array(rows)), labels=labels[rows])


def _labels(
    origin: Origin, label_column: str, unlabelled: str | None, wanted: Sequence[str]
) -> Labels:
    columns = {
        split: as_labels(f"split {split!r}", label_column, table[label_column])
        for split, table in origin.tables.items()
        if label_column in table.column_names  # a split that is left out may lack it
    }
    names = class_names(origin, label_column)
    return encode_labels(columns, names, unlabelled=unlabelled, wanted=wanted)


def _texts(split: str, table: pa.Table, text_column: str) -> pa.ChunkedArray:
    names = column_names(text_column, table.column_names)
    columns = [as_texts(f"split {split!r}", name, table[name]) for name in names]
    return columns[0] if len(columns) == 1 else join_columns(split, *columns)


def _columns(
    origin: Origin, splits: Sequence[str], text_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Name the columns of texts and of labels, which every wanted split must have."""
    tables = {split: origin.tables[split] for split in splits or origin.tables}
    names = next(iter(tables.values())).column_names
    label_column = _column("label", label_column, names, _LABEL_NAMES)
    others = [name for name in names if name != label_column]
    text_column = _column("text", text_column, others, _TEXT_NAMES)
    for split, table in tables.items():
        for column in (*column_names(text_column, names), label_column):
            if column not in table.column_names:
                message = (
                    f"split {split!r} has no column {column!r}, only {listed(table.column_names)}. "
                    "Give all splits the same columns, or choose splits with --split."
                )
                raise DataError(message)
    return text_column, label_column


def text_column_of(columns: Sequence[str]) -> str:
    """Detect the column of texts of a file, whose labels may be missing.

    Raises:
        DataError: none looks like it.

    >>> text_column_of(["id", "label", "Review"]), text_column_of(["anything"])
    ('Review', 'anything')
    """
    labels = [name for name in columns if name.lower() in _LABEL_NAMES] if columns[1:] else []
    others = [name for name in columns if name not in labels]
    return _column("text", None, others, _TEXT_NAMES)


def _column(kind: str, asked: str | None, columns: Iterable[str], usual: Sequence[str]) -> str:
    columns = list(columns)
    if asked is not None:
        if kind == "text":
            column_names(asked, columns)  # refuses what is not there
        elif asked not in columns:
            raise ConfigError.unknown("column", asked, columns, f"Pass one to --{kind}-column.")
        return asked
    by_name = {column.lower(): column for column in columns}
    for name in usual:
        if name in by_name:
            return by_name[name]
    if kind == "text" and len(columns) == 1:
        return columns[0]
    among = listed(columns)
    message = f"no column looks like the {kind} among {among}. Name it with --{kind}-column NAME."
    raise DataError(message)


def _known_splits(splits: Sequence[str], origin: Origin, dataset: str) -> list[str]:
    """Say what was taken as what, and find the splits that are asked for, by any of their names."""
    for note in origin.notes:
        _log.info("%s", note)
    known = [split if split in origin.tables else split_name(split) for split in splits]
    for asked, split in zip(splits, known, strict=True):
        if split not in origin.tables:
            raise ConfigError.unknown(
                f"{dataset}: split", asked, origin.tables, "Pass one to --split."
            )
    return known


def _short_name(dataset: str) -> str:
    stem, _ = split_suffix(Path(dataset).name)
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "dataset"
