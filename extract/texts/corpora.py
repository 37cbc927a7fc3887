"""A data set as extraction needs it: the texts and labels of each split, in data-set order.

Columns are detected by their usual names and said; whatever is missing or ambiguous is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import xxhash

from llmembed.common.errors import ConfigError, DataError, listed
from llmembed.common.scratch import column_array, forget_pages
from llmembed.common.splits import draw_share, split_name
from llmembed.extract.texts.columns import (
    LABEL_NAMES,
    as_labels,
    label_column_of,
    text_columns_of,
    texts_of,
)
from llmembed.extract.texts.files import read_table, split_suffix
from llmembed.extract.texts.labels import encode_labels
from llmembed.extract.texts.options import DatasetOptions, Dialect
from llmembed.extract.texts.origins import Origin, find_splits

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The texts of one split and their labels, in data-set order."""

    texts: pa.ChunkedArray  # arrow strings, `[N]`, none missing
    labels: npt.NDArray[np.int32]  # index of the class name, int32 `[N]`, -1 where unlabelled

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
        return Examples(texts=self.texts.slice(start, stop - start), labels=self.labels[start:stop])

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
    text_columns, label_column = _columns(tables, options)
    labels = encode_labels(
        {
            split: as_labels(f"split {split!r}", label_column, table[label_column])
            for split, table in origin.tables.items()
            if label_column in table.column_names  # a split that is left out may lack it
        },
        origin.class_names(label_column),
        unlabelled=options.unlabelled,
        wanted=wanted,
    )
    splits = {}
    for split in wanted or labels.labelled_splits:
        codes = labels.codes[split]
        texts = texts_of(f"split {split!r}", tables[split], text_columns)
        if options.limit is not None and options.limit < len(codes):
            rows = stratified_rows(codes, options.limit, options.seed)
            texts, codes = texts.take(pa.array(rows)), codes[rows]
        splits[split] = Examples(texts=texts, labels=codes)
    stem, _ = split_suffix(Path(options.dataset).name)
    return Corpus(
        name=re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "dataset",
        labels=labels.names,
        splits=splits,
        text_pair=len(text_columns) > 1,
        provenance={
            "origin": origin.place,
            "text_column": options.text_column or text_columns[0],
            "label_column": label_column,
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


def _columns(tables: Mapping[str, pa.Table], options: DatasetOptions) -> tuple[list[str], str]:
    """Name the columns of texts and of labels, which every split that is taken must have."""
    names = next(iter(tables.values())).column_names
    label_column = label_column_of(names, options.label_column, options.text_column)
    others = [name for name in names if name != label_column]
    text_columns = text_columns_of(others, options.text_column)
    for split, table in tables.items():
        for column in (*text_columns, label_column):
            if column not in table.column_names:
                raise DataError(
                    f"split {split!r} has no column {column!r}, only {listed(table.column_names)}. "
                    "Give all splits the same columns, or choose splits with --split."
                )
    return text_columns, label_column


def first_occurrences(examples: Examples) -> npt.NDArray[np.int64]:
    """Find for each row the first row of the split with the same text, int64 `[N]`.

    Equal hashes only nominate; the texts themselves decide.
    """
    texts = examples.texts
    _, first, inverse = np.unique(examples.text_hash, return_index=True, return_inverse=True)
    originals = first[inverse]
    nominated = np.flatnonzero(originals != np.arange(len(examples)))
    if len(nominated):
        same = pyarrow.compute.equal(texts.take(nominated), texts.take(originals[nominated]))
        collided = nominated[~same.to_numpy()]
        originals[collided] = collided
    return originals


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentTexts:
    """The different texts of consecutive rows, each computed once, and where its feature is."""

    earlier: npt.NDArray[np.int64]  # rows before these ones that have a text's feature, int64 `[K]`
    own: npt.NDArray[np.int64]  # offsets of the rows to compute, int64 `[M]`
    places: npt.NDArray[np.int64]  # place of each row's text in `earlier`, then `own`, int64 `[N]`

    @classmethod
    def among(cls, originals: npt.NDArray[np.int64], start: int, stop: int) -> DifferentTexts:
        """Find the different texts of rows `start` to `stop`, by their `first_occurrences`.

        >>> texts = DifferentTexts.among(np.array([0, 1, 1, 3, 0]), 2, 5)
        >>> texts.earlier, texts.own, texts.places
        (array([0, 1]), array([1]), array([1, 2, 0]))
        """
        rows, first, places = np.unique(
            originals[start:stop], return_index=True, return_inverse=True
        )
        n_earlier = int(np.searchsorted(rows, start))
        return cls(earlier=rows[:n_earlier], own=first[n_earlier:], places=places)

    def spread(
        self,
        values: npt.NDArray[Any],
        read_earlier: Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]],
    ) -> npt.NDArray[Any]:
        """Give every row the value of its text, `[N, H]`: of `own` `[M, H]`, else read `[K, H]`."""
        if len(self.earlier):
            values = np.concatenate([read_earlier(self.earlier), values])
        return values[self.places]
