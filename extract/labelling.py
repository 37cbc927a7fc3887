"""Labels of any kind as indices of class names, int32, -1 where an example is unlabelled.

Strings, integers, booleans and whole floats are class names; a missing label is an error that names
its row, since a guess would be silent. Class names are sorted, as numbers where all are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmembed.cache_format.errors import DataError
from llmembed.extract.spool import forget_pages, spooled_array

UNLABELLED = -1
_MISSING = frozenset({"", "nan", "NaN"})
_INTEGER = re.compile(r"-?\d+")
_AT_ONCE = 2**20


def encode_labels(
    columns: Mapping[str, pa.ChunkedArray], names: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, npt.NDArray[np.int32]]]:
    """Turn the label column of each split into indices of one list of class names.

    Args:
        columns: split name -> label column.
        names: class names that integer labels are indices of, where the data set brings them.

    Returns:
        The class names, and for each split int32 `[N]`, -1 where unlabelled.

    Raises:
        DataError: a label is missing or not of a kind that can name a class, or fewer than two
            classes are there.

    >>> encode_labels({"train": pa.chunked_array([["no", "yes", "no"]])}, None)
    (('no', 'yes'), {'train': array([0, 1, 0], dtype=int32)})
    """
    encoded = {split: _dictionary(split, column) for split, column in columns.items()}
    found = {name for values, _ in encoded.values() for name in values} - {str(UNLABELLED)}
    if names is not None and all(_INTEGER.fullmatch(name) for name in found):
        code_of = {str(index): index for index in range(len(names))}
        _refuse_beyond(found - code_of.keys(), len(names))
    else:
        names = _in_order(found)
        code_of = {name: index for index, name in enumerate(names)}
    if len(names) < 2:
        message = (
            f"the labels have the classes {list(names)}; a classifier needs at least two. "
            "Check --label-column."
        )
        raise DataError(message)
    code_of[str(UNLABELLED)] = UNLABELLED
    for values, indices in encoded.values():
        codes = np.array([code_of[value] for value in values], dtype=np.int32)
        for start in range(0, len(indices), _AT_ONCE):  # in place: a large split has no copy
            part = indices[start : start + _AT_ONCE]
            part[:] = codes[part]
    return tuple(names), {split: indices for split, (_, indices) in encoded.items()}


def _dictionary(split: str, column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Encode a column as its distinct values, as class names, and an index for each row."""
    if pa.types.is_nested(column.type):
        raise DataError(
            f"split {split!r} has labels of type {column.type}, several to an example; a cache "
            "holds one label an example. Name a column of single labels with --label-column, or "
            "train on several with LLMEmbedClassifier (README, the same in Python)."
        )
    if column.null_count:
        _refuse_missing(split, np.flatnonzero(column.is_null().to_numpy()), "no value")
    indices, n_before = spooled_array(len(column), np.dtype(np.int32)), 0
    values: dict[str, Any] = {}
    for chunk in column.chunks:  # all in one could be more text than an Arrow array holds
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        own = encoded.dictionary.to_pylist()
        values |= {str(value): value for value in own}
        places = {name: place for place, name in enumerate(values)}
        place_of = np.array([places[str(value)] for value in own], dtype=np.int32)
        indices[n_before : n_before + len(chunk)] = place_of[encoded.indices.to_numpy()]
        n_before += len(chunk)
        forget_pages()
    for index, (name, value) in enumerate(values.items()):
        if name in _MISSING and (rows := np.flatnonzero(indices == index)).size:
            _refuse_missing(split, rows, repr(value))
    return [_class_name(split, value) for value in values.values()], indices


def _class_name(split: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | str):
        return str(value)
    message = (
        f"split {split!r} has the label {value!r}, a {type(value).__name__}; labels are strings, "
        "integers or booleans. Check --label-column."
    )
    raise DataError(message)


def _in_order(names: set[str]) -> list[str]:
    numeric = all(_INTEGER.fullmatch(name) for name in names)
    return sorted(names, key=int if numeric else None)


def _refuse_missing(split: str, rows: npt.NDArray[np.int64], value: str) -> None:
    message = (
        f"split {split!r}, row {rows[0]}: the label is {value} ({len(rows)} rows in all). Remove "
        f"such rows, or give them the label {UNLABELLED} to keep them as unlabelled."
    )
    raise DataError(message)


def _refuse_beyond(labels: set[str], n_names: int) -> None:
    if labels:
        message = (
            f"label {min(labels)} has no name: the data set names {n_names} classes "
            f"(0-{n_names - 1}). Add its name to labels.json or correct the label."
        )
        raise DataError(message)
