"""Labels of any kind as indices of class names, int32, -1 where an example has none.

Strings, integers, booleans and whole numbers name classes, which are sorted, as numbers where all
are numbers. An empty cell, null and NaN are no label; so is -1 where the data set brings names that
integers are indices of, and what the user says. Nothing else is: -1 may well be a class. The rules
stand in docs/data.md.
"""

from __future__ import annotations

import dataclasses
import decimal
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmembed.common.errors import DataError, LLMEmbedWarning
from llmembed.extract.texts.label_checks import NO_LABEL, LabelColumn, check_columns, is_missing
from llmembed.extract.texts.spool import forget_pages, spooled_array

UNLABELLED = -1
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_AT_ONCE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a data set."""

    names: tuple[str, ...]
    """Class names."""
    codes: Mapping[str, npt.NDArray[np.int32]]
    """Split -> index of the class name, int32 `[N]`, -1 where unlabelled."""

    @property
    def labelled_splits(self) -> list[str]:
        """Those that have a label in some row."""
        return [split for split, codes in self.codes.items() if (codes >= 0).any()]


def encode_labels(
    columns: Mapping[str, pa.ChunkedArray],
    names: Sequence[str] | None = None,
    *,
    unlabelled: str | None = None,
    wanted: Collection[str] = (),
) -> Labels:
    """Turn the label column of each split into indices of one list of class names.

    Args:
        columns: split name -> label column.
        names: class names that integer labels are indices of, where the data set brings them.
        unlabelled: what stands where there is no label, besides -1 where `names` are given; the
            empty string is for empty cells, null and NaN, which are refused without it.
        wanted: splits that were asked for by name; none is all that have labels.

    Raises:
        DataError: a label is missing or not of a kind that can name a class, or fewer than two
            classes are there.

    >>> encode_labels({"train": pa.chunked_array([["no", "yes", "no"]])})
    Labels(names=('no', 'yes'), codes={'train': array([0, 1, 0], dtype=int32)})
    """
    encoded = [_dictionary(split, column) for split, column in columns.items()]
    absent = {NO_LABEL} if unlabelled is None or is_missing(unlabelled) else {NO_LABEL, unlabelled}
    found = {name for column in encoded for name in column.names} - absent
    if names is not None and not all(_INTEGER.fullmatch(name) for name in found):
        _warn_of_names(found, names)
        names = None
    if names is not None:
        absent.add(str(UNLABELLED))
        called = {str(index): name for index, name in enumerate(names)}
        _refuse_beyond(found - absent - called.keys(), len(names))
    else:
        called = {name: name for name in _in_order(found)}
    check_columns(encoded, called, absent, unlabelled=unlabelled, wanted=wanted)
    code_of = {label: code for code, label in enumerate(called)} | dict.fromkeys(absent, UNLABELLED)
    for column in encoded:
        codes = np.array([code_of[name] for name in column.names], dtype=np.int32)
        for start in range(0, len(column.indices), _AT_ONCE):  # in place: a large split has no copy
            part = column.indices[start : start + _AT_ONCE]
            part[:] = codes[part]
    return Labels(
        names=tuple(called.values()), codes={column.split: column.indices for column in encoded}
    )


def _dictionary(split: str, column: pa.ChunkedArray) -> LabelColumn:
    """Encode a column as its distinct values, and an index for each row."""
    if pa.types.is_nested(column.type):
        raise DataError(
            f"split {split!r} has labels of type {column.type}, several to an example; a cache "
            "holds one label an example. Name a column of single labels with --label-column, or "
            "train on several with LLMEmbedClassifier (README, the same in Python)."
        )
    indices, n_before = spooled_array(len(column), np.dtype(np.int32)), 0
    places: dict[Any, int] = {None: 0}
    for chunk in column.chunks:  # all in one could be more text than an Arrow array holds
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        own = encoded.dictionary.to_pylist()
        for value in own:
            places.setdefault(value, len(places))
        place_of = np.array([places[value] for value in (*own, None)], dtype=np.int32)
        rows = encoded.indices.cast(pa.int64()).fill_null(len(own)).to_numpy()
        indices[n_before : n_before + len(chunk)] = place_of[rows]
        n_before += len(chunk)
        forget_pages()
    names = tuple(_class_name(split, value) for value in places)
    return LabelColumn(split=split, names=names, values=tuple(places), indices=indices)


def _class_name(split: str, value: object) -> str:
    if value is None or is_missing(str(value)):
        return NO_LABEL
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, decimal.Decimal) and value == value.to_integral_value():
        return str(int(value))
    if isinstance(value, int | str):
        return str(value)
    message = (
        f"split {split!r} has the label {value!r}, a {type(value).__name__}; labels are strings, "
        "integers or booleans. Check --label-column."
    )
    raise DataError(message)


def _in_order(names: Collection[str]) -> list[str]:
    """Sort always the same way, "01" before "1" too."""
    numeric = all(_INTEGER.fullmatch(name) for name in names)
    return sorted(names, key=lambda name: (int(name) if numeric else 0, name))


def _refuse_beyond(labels: Collection[str], n_names: int) -> None:
    if labels:
        message = (
            f"label {min(labels)} has no name: the data set names {n_names} classes "
            f"(0-{n_names - 1}). Add its name to labels.json or correct the label."
        )
        raise DataError(message)


def _warn_of_names(labels: Collection[str], names: Sequence[str]) -> None:
    example = min(label for label in labels if not _INTEGER.fullmatch(label))
    warnings.warn(
        f"the data set names integer labels ({names[0]!r} is 0), but has the label {example!r}: "
        "these names are not used, and each label names its own class.",
        LLMEmbedWarning,
        stacklevel=3,
    )
