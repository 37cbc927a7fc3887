"""A data set as extraction needs it: the texts and labels of each split, in data-set order.

Columns are detected by their usual names and said; whatever is missing or ambiguous is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import xxhash

from llmembed.cache_format import DatasetInfo
from llmembed.common.errors import ConfigError, DataError, listed, warn
from llmembed.common.scratch import column_array, forget_pages
from llmembed.common.splits import TRAIN, draw_share, split_name
from llmembed.extract.texts.columns import (
    LABEL_NAMES,
    as_labels,
    label_columns_of,
    text_columns_of,
    texts_of,
)
from llmembed.extract.texts.files import read_table, split_suffix
from llmembed.extract.texts.label_sets import (
    encode_indicators,
    encode_lists,
    from_lists,
    from_texts,
    is_list,
)
from llmembed.extract.texts.labels import Labels, encode_labels, is_missing
from llmembed.extract.texts.options import DatasetOptions, Dialect
from llmembed.extract.texts.origins import Origin, find_splits
from llmembed.extract.texts.weights import groups_of, weights_of

_Read = Callable[[str, str, pa.ChunkedArray], npt.NDArray[Any]]
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The texts of one split and their labels, in data-set order."""

    texts: pa.ChunkedArray  # arrow strings, `[N]`, none missing
    labels: npt.NDArray[np.int32]  # index of the class name, int32 `[N]`, -1 where unlabelled
    # Where a text may have several labels: int8 `[N, C]`, 1 where it has one, a row of -1 where it
    # is unlabelled; `labels` are -1 then.
    label_sets: npt.NDArray[np.int8] | None = None
    weights: npt.NDArray[np.float32] | None = None  # how much each counts, float32 `[N]`
    groups: npt.NDArray[np.uint64] | None = None  # which belong together, uint64 `[N]`

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.labels)

    @functools.cached_property
    def text_hash(self) -> npt.NDArray[np.uint64]:
        """xxh3-64 of the UTF-8 text, before any template, uint64 `[N]`."""
        hashes, n_before = column_array(len(self), np.uint64), 0
        for chunk in self.texts.chunks:
            found = (xxhash.xxh3_64_intdigest(text.as_buffer()) for text in chunk)
            part = hashes[n_before : n_before + len(chunk)]
            part[:] = np.fromiter(found, dtype=np.uint64, count=len(chunk))
            n_before += len(chunk)
            forget_pages()
        return hashes

    def part(self, start: int, stop: int) -> Examples:
        """Take a range of rows, without copying texts."""
        columns = {name: values[start:stop] for name, values in self.columns.items()}
        return Examples(texts=self.texts.slice(start, stop - start), **columns)

    def take(self, rows: npt.NDArray[np.int64]) -> Examples:
        """Take single rows."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Examples(texts=self.texts.take(pa.array(rows)), **columns)

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """What is known of each example beside its text, each `[N]` or `[N, C]`, by its name."""
        names = ("labels", "label_sets", "weights", "groups")
        found = ((name, getattr(self, name)) for name in names)
        return {name: values for name, values in found if values is not None}

    @property
    def strata(self) -> npt.NDArray[np.int32]:
        """Class of each row for a stratified choice, int32 `[N]`; of several labels the rarest."""
        if self.label_sets is None:
            return self.labels
        n_classes = self.label_sets.shape[1]
        is_set = self.label_sets == 1
        by_rarity = np.argsort(is_set.sum(axis=0), kind="stable")
        rarest = by_rarity[is_set[:, by_rarity].argmax(axis=1)]
        strata: npt.NDArray[np.int32] = np.where(is_set.any(axis=1), rarest, n_classes).astype("i4")
        strata[self.label_sets[:, 0] < 0] = -1
        return strata

    def batch(self, rows: slice) -> list[str]:
        """Read the texts of a range of rows."""
        start, stop, _ = rows.indices(len(self))
        return list(self.texts.slice(start, stop - start).to_pylist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A data set as extraction needs it."""

    name: str  # short name, which names the cache
    labels: tuple[str, ...]  # class names
    splits: Mapping[str, Examples]  # split name -> examples
    provenance: Mapping[str, str | int | None]  # where it came from and how it was read
    text_pair: bool = False  # whether each text is a pair

    @property
    def dataset(self) -> DatasetInfo:
        """What a cache records of it."""
        return DatasetInfo(name=self.name, labels=self.labels, provenance=dict(self.provenance))

    @property
    def notes(self) -> list[str]:
        """Several labels, weights and groups in sentences, where there are any."""
        return [note for split, one in self.splits.items() for note in _notes(split, one)]


def load_corpus(options: DatasetOptions) -> Corpus:
    """Find a data set and read its texts and labels.

    Raises:
        DatasetNotFoundError: no such data set, or it cannot be had here.
        DataError: its texts or labels cannot be used.
        ConfigError: a split or column that does not exist.
    """
    origin = find_splits(options.dataset, options.config, options.dialect)
    wanted = _known_splits(options, origin)
    tables = {split: origin.tables[split] for split in wanted or origin.tables}
    text_columns, label_columns = _columns(tables, options)
    labels = _read_labels(origin, label_columns, options, wanted)
    splits = {}
    for split in wanted or labels.labelled_splits:
        examples = Examples(
            texts=texts_of(f"split {split!r}", tables[split], text_columns),
            labels=labels.codes[split],
            label_sets=labels.sets[split] if labels.sets is not None else None,
            **_weights_and_groups(split, tables[split], options),
        )
        if options.limit is not None and options.limit < len(examples):
            rows = stratified_rows(examples.strata, options.limit, options.seed)
            examples = examples.take(rows)
        splits[split] = examples
    if not wanted and TRAIN not in tables:
        warn(
            f"{options.dataset} has no split {TRAIN!r}, which a fit trains on, only "
            f"{listed([*tables])}. Rename the file of the rows to train on ({TRAIN}.csv), or name "
            "the splits with --split if none is to be trained on."
        )
    stem, _ = split_suffix(Path(options.dataset).name)
    return Corpus(
        name=re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "dataset",
        labels=labels.names,
        splits=splits,
        text_pair=len(text_columns) > 1,
        provenance={
            "origin": origin.place,
            "text_column": options.text_column or text_columns[0],
            "label_column": ",".join(label_columns),
            **options.recorded,
        },
    )


def texts_of_file(
    path: Path, column: str | None, known: str | None, dialect: Dialect
) -> tuple[list[str], pa.Table]:
    """Read the texts of a file, which needs no labels, and the columns beside them.

    Without `column` it is the known one, if the file has it; else it is detected, and said.
    """
    table = read_table(path, dialect)
    names = table.column_names
    if column is None:
        held = known is not None and (known in names or {*known.split(",")} <= {*names})
        others = [name for name in names if name.lower() not in LABEL_NAMES or not names[1:]]
        column = known if held else text_columns_of(others, None)[0]
        _log.info("Text from column %r.", column)
    chosen = text_columns_of(names, column)
    return texts_of(str(path), table, chosen).to_pylist(), table.drop_columns(chosen)


def stratified_rows(labels: npt.NDArray[np.int32], n_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Choose rows, int64 `[n_rows]`, ascending; each class keeps its share, and one row if it can.

    >>> labels = np.array([0, 0, 0, 0, 1, 1], dtype=np.int32)
    >>> np.bincount(labels[stratified_rows(labels, 3, seed=0)])
    array([2, 1])
    """
    rng = np.random.default_rng(seed)
    of_classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    shuffled = np.concatenate(of_classes)
    return np.flatnonzero(draw_share(labels, n_rows / len(labels), shuffled, least=1))


def _known_splits(options: DatasetOptions, origin: Origin) -> list[str]:
    """Find the splits that are asked for, by any of their names."""
    known = [name if name in origin.tables else split_name(name) for name in options.splits]
    for asked, split in zip(options.splits, known, strict=True):
        if split not in origin.tables:
            raise ConfigError.unknown(
                f"{options.dataset}: split", asked, origin.tables, "Pass one to --split."
            )
    return known


def _columns(
    tables: Mapping[str, pa.Table], options: DatasetOptions
) -> tuple[list[str], list[str]]:
    """Name the columns of texts and of labels, which every split that is taken must have."""
    names = next(iter(tables.values())).column_names
    known = {name for table in tables.values() for name in table.column_names}
    for kind in ("weight", "group"):
        column = getattr(options, f"{kind}_column")
        if column is not None and column not in known:
            remedy = f"Pass one to --{kind}-column."
            raise ConfigError.unknown("column", column, sorted(known), remedy)
    label_columns = label_columns_of(names, options.label_column, options.text_column)
    taken = {*label_columns, options.weight_column, options.group_column}
    others = [name for name in names if name not in taken]
    text_columns = text_columns_of(others, options.text_column)
    for split, table in tables.items():
        for column in (*text_columns, *label_columns):
            if column not in table.column_names:
                raise DataError(
                    f"split {split!r} has no column {column!r}, only {listed(table.column_names)}. "
                    "Give all splits the same columns, or choose splits with --split."
                )
    return text_columns, label_columns


def _read_labels(
    origin: Origin, names: list[str], options: DatasetOptions, wanted: list[str]
) -> Labels:
    """Read one label a text, or several in whichever way they are written."""
    marks: dict[str, Any] = {"unlabelled": options.unlabelled, "wanted": wanted}
    # A split that is left out may lack the columns.
    tables = {s: one for s, one in origin.tables.items() if {*names} <= {*one.column_names}}
    name, separator = names[0], options.label_separator
    if len(names) > 1:
        if separator is not None:
            raise ConfigError(
                f"--label-separator {separator!r} parts the labels of one column, and "
                f"--label-column names {len(names)}. Pass one of them."
            )
        _log.info("Several labels a text: columns %s, one label each.", listed(names))
        columns = {s: {one: table[one] for one in names} for s, table in tables.items()}
        return encode_indicators(columns, **marks)
    where = {split: f"split {split!r}" for split in tables}
    if separator is not None:
        mark = is_missing(options.unlabelled)
        part = functools.partial(from_texts, separator=separator, is_empty_unlabelled=mark)
        lists = {s: part(where[s], name, one[name]) for s, one in tables.items()}
    elif any(is_list(table[name]) for table in tables.values()):
        _log.info("Several labels a text: column %r holds lists.", name)
        lists = {s: from_lists(where[s], name, one[name]) for s, one in tables.items()}
    else:
        single = {s: as_labels(where[s], name, one[name]) for s, one in tables.items()}
        return encode_labels(single, origin.class_names(name), **marks)
    found = encode_lists(lists, origin.class_names(name), **marks)
    if separator is not None and all(lists[s].lengths.max(initial=0) < 2 for s in found.sets or ()):
        warn(
            f"no label of column {name!r} holds {separator!r} that --label-separator names, so no "
            "text has several labels. Leave it away, or name what stands between them."
        )
    return found


def _weights_and_groups(
    split: str, table: pa.Table, options: DatasetOptions
) -> dict[str, npt.NDArray[Any]]:
    """Read the weights and groups of a split that has them; say it of one that has not."""
    asked: Mapping[str, tuple[str | None, _Read]] = {
        "weights": (options.weight_column, weights_of),
        "groups": (options.group_column, groups_of),
    }
    found = {}
    for what, (column, read) in asked.items():
        if column is not None and column in table.column_names:
            found[what] = read(split, column, table[column])
        elif column is not None:
            _log.info("Split '%s' has no column %r: its rows have no %s.", split, column, what)
    return found


def _notes(split: str, examples: Examples) -> Iterator[str]:
    sets, weights, groups = examples.label_sets, examples.weights, examples.groups
    if sets is not None:
        known = sets[sets[:, 0] >= 0].sum(axis=1, dtype=np.int64)
        mean = known.mean() if len(known) else 0.0
        yield (
            f"Split {split!r}: {mean:.2f} labels a text of {sets.shape[1]}; "
            f"{int((known == 0).sum()):,} of {len(sets):,} rows have none, "
            f"{len(sets) - len(known):,} are unlabelled."
        )
    if weights is not None and len(weights):
        yield f"Split {split!r}: weights from {weights.min():g} to {weights.max():g}."
    if groups is not None:
        yield f"Split {split!r}: {len(np.unique(groups)):,} groups."


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentTexts:
    """The different texts of some rows, each computed once, and which of them each row has."""

    own: npt.NDArray[np.int64]  # rows to compute, the first of each text, int64 `[M]`
    places: npt.NDArray[np.int64]  # place of each row's text in `own`, int64 `[N]`

    @classmethod
    def among(cls, examples: Examples) -> DifferentTexts:
        """Find them; equal hashes only nominate, the texts themselves decide."""
        texts = examples.texts
        _, first, inverse = np.unique(examples.text_hash, return_index=True, return_inverse=True)
        originals = first[inverse]
        nominated = np.flatnonzero(originals != np.arange(len(examples)))
        if len(nominated):
            same = pyarrow.compute.equal(texts.take(nominated), texts.take(originals[nominated]))
            collided = nominated[~same.to_numpy()]
            originals[collided] = collided
        own, places = np.unique(originals, return_inverse=True)
        return cls(own=own, places=places)
