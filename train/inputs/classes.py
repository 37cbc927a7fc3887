"""What is given as y: a class a text, or several labels, in whatever holds them.

What scikit-learn takes is taken, and so are columns of Arrow, generators, and lists or sets of
labels wherever they stand. It is scikit-learn's check that tells classes from numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import column_or_1d

from llmembed.common.errors import DataError
from llmembed.train.inputs.arguments import brief, names_of_columns

_MISSING = ("NoneType", "NAType", "NaTType")  # the last two are pandas', equal to nothing
Target = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]


def as_target(y: Any) -> Target:
    """Give the names of C classes, and int64 `[N]`, the index of each text's class.

    Where a text may have several labels, it is `[N, C]`, 1 for those it has. A matrix of 0 and 1
    has a column a label, which a table names; lists of labels, one a text, name them themselves.

    >>> [one.tolist() for one in as_target(["b", "a", "b"])]
    [['a', 'b'], [1, 0, 1]]
    >>> [one.tolist() for one in as_target([["b"], [], ["a", "b"]])]
    [['a', 'b'], [[0, 1], [0, 0], [1, 1]]]

    Raises:
        DataError: it is none of these, a class is missing, or classes are of different kinds.
    """
    if y is None:
        raise DataError(
            "LLMEmbedClassifier requires y to be passed, but the target y is None. "
            "Pass one class a text."
        )
    columns = names_of_columns(y)
    if hasattr(y, "toarray"):  # of scipy
        y = y.toarray()
    elif columns is None and hasattr(y, "to_pylist"):  # of Arrow, whose values are no strings
        y = y.to_pylist()
    elif hasattr(y, "__array__") and not isinstance(y, Iterable):
        y = np.asarray(y)
    shape = getattr(y, "shape", (0,))
    is_flat = isinstance(y, Iterable) and not isinstance(y, str | bytes | Mapping | Set)
    if not (len(shape) == 2 or (len(shape) == 1 and is_flat)):
        of_shape = f" of the shape {shape}" if len(shape) != 1 else ""
        raise DataError(
            f"y is a {type(y).__name__}{of_shape}, and must be an array, a series or a list of one "
            "class a text, or of several: a list of labels for each, or a matrix of 0 and 1. Pass "
            "one of these."
        )
    if len(shape) == 2:
        return _of_matrix(y, columns)
    values = y.tolist() if hasattr(y, "tolist") else list(y)
    if are_lists(values):
        return _of_lists(values)
    if values and all(_is_list(row) for row in values):
        return _of_matrix(np.asarray(values), None)
    names, codes = np.unique(as_classes(y if hasattr(y, "dtype") else values), return_inverse=True)
    return names, codes


def as_classes(y: Any, rows: Sequence[int] | None = None) -> npt.NDArray[Any]:
    """Give classes as an array, as they were given: strings, whole numbers or booleans.

    >>> as_classes([-1, 0, 1]).tolist()
    [-1, 0, 1]

    Args:
        y: the classes.
        rows: of which text each is, where that may have several; None is one a text.

    Raises:
        DataError: one is missing or no class, or they are of different kinds.
    """
    values = y.tolist() if hasattr(y, "tolist") else y
    rows = range(len(values)) if rows is None else rows
    first_of: dict[bool, int] = {}  # of strings, and of what is none
    for index, value in enumerate(values):
        if _is_missing(value):
            raise DataError(
                f"y has no class in row {rows[index]}, but {brief(value)}. Leave out the rows "
                "without a class, or give them one."
            )
        first_of.setdefault(isinstance(value, str), index)
    if len(first_of) > 1:
        text, other = first_of[True], first_of[False]
        raise DataError(
            f"y mixes strings and other values: {brief(values[text])} in row {rows[text]}, "
            f"{brief(values[other])} in row {rows[other]}. Make all of them strings, or all "
            "numbers."
        )
    array = np.asarray(y)
    # Columns of pandas that may miss a value hold Python's numbers as objects, and scikit-learn
    # knows no strings of numpy that may be of any length.
    if (array.dtype == object and False in first_of) or array.dtype.kind == "T":
        array = np.asarray(values)
    try:
        check_classification_targets(array)
    except (TypeError, ValueError) as error:
        index = next((at for at, value in enumerate(values) if not _is_class(value)), 0)
        kind = type(values[index]).__name__
        raise DataError(
            f"Unknown label type: {'continuous' if kind == 'float' else kind}: y holds "
            f"{brief(values[index])} in row {rows[index]}, and a class is a string, a whole number "
            "of 64 bits, or a boolean. Make the classes such."
        ) from error
    return array


def are_lists(y: Sequence[Any]) -> bool:
    """Tell whether y lists the labels of each text, and is no matrix of 0 and 1.

    >>> are_lists([["a"], []]), are_lists([[0, 1], [1, 1]]), are_lists(["a", "b"])
    (True, False, False)
    """
    if not all(_is_list(row) for row in y):
        return False
    is_matrix = len({len(row) for row in y}) == 1 and all(
        not isinstance(value, str) and value in (0, 1) for row in y for value in row
    )
    return bool(y) and not is_matrix


def _of_lists(y: Sequence[Any]) -> Target:
    rows = np.repeat(np.arange(len(y)), [len(own) for own in y])
    labels = as_classes([name for own in y for name in own], rows.tolist())
    names, codes = np.unique(labels, return_inverse=True)
    sets = np.zeros((len(y), len(names)), dtype=np.int64)
    sets[rows, codes] = 1
    return names, sets


def _of_matrix(y: Any, columns: Any) -> Target:
    """Read a matrix of 0 and 1; one column is one class a text, of which scikit-learn warns."""
    if y.shape[1] == 1:
        return as_target(column_or_1d(np.asarray(y), warn=True))
    # Masked values, and columns of pandas that may miss one, are objects or None there.
    matrix = np.asarray(y.tolist() if np.ma.is_masked(y) else y)
    matrix = np.asarray(matrix.tolist()) if matrix.dtype == object else matrix
    missing = np.zeros(matrix.shape, dtype=bool)
    if matrix.dtype.kind in "fO":
        missing = np.vectorize(_is_missing, otypes=[bool])(matrix)
    if not missing.any() and type_of_target(matrix) != "multilabel-indicator":
        raise DataError(
            f"y has the shape {matrix.shape}, several classes to a text; a fit takes one class a "
            "text, or several labels as 0 and 1. Wrap it, MultiOutputClassifier(LLMEmbedClassifier("
            "cache=...)) of scikit-learn, to fit one for each column; the cache keeps the features."
        )
    wrong = missing if missing.any() else ~np.isin(matrix, (0, 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise DataError(
            f"y holds {brief(matrix.tolist()[row][column])} in row {row}, column {column}; a "
            "matrix of several labels a text has 1 where the text has the label, else 0. Pass "
            "such, or a list of labels for each text."
        )
    names = np.arange(matrix.shape[1]) if columns is None else np.asarray(columns)
    return names, matrix.astype(np.int64)


def _is_list(row: Any) -> bool:
    return isinstance(row, list | tuple | Set) or (isinstance(row, np.ndarray) and row.ndim == 1)


def _is_class(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and value.is_integer())


def _is_missing(value: Any) -> bool:
    is_infinite = isinstance(value, float) and not np.isfinite(value)
    return is_infinite or type(value).__name__ in _MISSING
