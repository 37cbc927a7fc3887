"""What users of Python pass: texts, classes, weights and seeds, each checked once.

Rows are counted from 0, by position, in every message.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from llmembed.common.errors import ConfigError, DataError
from llmembed.train.measures import Floats

_N_SEEDS = 1 << 32
_MISSING = ("NoneType", "NAType", "NaTType")  # the last two are pandas', equal to nothing


def as_texts(given: Any, name: str = "X") -> list[str]:
    """List the texts of a list, an iterator, an array, a series, or a table of one column.

    >>> as_texts(np.array([["a"], ["b"]], dtype=object))
    ['a', 'b']

    Raises:
        DataError: it is something else; messages call it by the name of the argument.
    """
    shape: Any = getattr(given, "shape", (0,))
    if len(shape) != 1:
        if len(shape) != 2 or shape[1] != 1 or not hasattr(given, "__array__"):
            names = ", ".join(map(str, list(getattr(given, "columns", []))[:10]))
            raise DataError(
                f"{name} has the shape {tuple(shape)}{names and f' ({names})'}, and must be one "
                f"column of texts. Pass the column that holds them, such as {name}['text']."
            )
        texts: list[Any] = np.asarray(given)[:, 0].tolist()
    elif isinstance(given, str | bytes | Mapping | Set) or not isinstance(given, Iterable):
        raise DataError(
            f"{name} must be a list of strings, and is a {type(given).__name__}. Pass [text] for a "
            "single one, and one column where the texts are part of a table."
        )
    elif hasattr(given, "to_pylist"):  # pyarrow's values are no strings
        texts = given.to_pylist()
    else:
        texts = list(given)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(
                f"{name} must be a list of strings: row {row} holds {_shown(text)}, which is no "
                "text. Leave the row out, or make it a string."
            )
    return texts


def as_classes(y: Any) -> npt.NDArray[Any]:
    """Give the classes as an array, as they were given: strings, whole numbers or booleans.

    >>> as_classes([-1, 0, 1]).tolist()
    [-1, 0, 1]

    Raises:
        DataError: a class is missing, or the classes are of different kinds.
    """
    if y is None:
        raise DataError(
            "LLMEmbedClassifier requires y to be passed, but the target y is None. "
            "Pass one class a text."
        )
    if not isinstance(y, Iterable) or len(getattr(y, "shape", (0,))) != 1:
        return np.asarray(y)  # several labels a text, which are refused with another word
    values = y.tolist() if hasattr(y, "tolist") else list(y)
    first_row: dict[bool, int] = {}  # of strings, and of what is none
    for row, value in enumerate(values):
        if _is_missing(value):
            raise DataError(
                f"y has no class in row {row}, but {_shown(value)}. Leave out the rows without a "
                "class, or give them one."
            )
        first_row.setdefault(isinstance(value, str), row)
    if len(first_row) > 1:
        text, other = first_row[True], first_row[False]
        raise DataError(
            f"y mixes strings and other values: {_shown(values[text])} in row {text}, "
            f"{_shown(values[other])} in row {other}. Make all of them strings, or all numbers."
        )
    array = np.asarray(y if hasattr(y, "dtype") else values)
    # Columns of pandas that may miss a value hold Python's numbers as objects.
    return np.asarray(values) if array.dtype == object and False in first_row else array


def as_sets(y: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Give the names of C labels, and int64 `[N, C]`, 1 for those of a text.

    A matrix of 0 and 1 has a column a label, which a table names; lists of labels, one a text, name
    them themselves.

    >>> names, sets = as_sets([["b"], [], ["a", "b"]])
    >>> names.tolist(), sets.tolist()
    (['a', 'b'], [[0, 1], [0, 0], [1, 1]])

    Raises:
        DataError: a value of the matrix is neither 0 nor 1, or labels are of different kinds.
    """
    if are_lists(y):
        labels = as_classes([name for names in y for name in names])
        names, codes = np.unique(labels, return_inverse=True)
        sets = np.zeros((len(y), len(names)), dtype=np.int64)
        sets[np.repeat(np.arange(len(y)), [len(own) for own in y]), codes] = 1
        return names, sets
    columns = getattr(y, "columns", None)
    matrix = np.asarray(y.toarray() if hasattr(y, "toarray") else y)
    wrong = ~np.isin(matrix, (0, 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise DataError(
            f"y holds {_shown(matrix[row, column])} in row {row}, column {column}; a matrix of "
            "several labels a text has 1 where the text has the label, else 0. Pass such, or a "
            "list of labels for each text."
        )
    names = np.arange(matrix.shape[1]) if columns is None else np.asarray(columns)
    return names, matrix.astype(np.int64)


def are_lists(y: Any) -> bool:
    """Tell whether y lists the labels of each text, and is no matrix of 0 and 1.

    >>> are_lists([["a"], []]), are_lists([[0, 1], [1, 1]]), are_lists(["a", "b"])
    (True, False, False)
    """
    if not isinstance(y, list | tuple) or not all(isinstance(row, list | tuple | Set) for row in y):
        return False
    is_matrix = len({len(row) for row in y}) == 1 and all(
        not isinstance(value, str) and value in (0, 1) for row in y for value in row
    )
    return bool(y) and not is_matrix


def as_weights(sample_weight: Any, n_texts: int) -> Floats:
    """Give the weights of N texts, float64 `[N]`, none below 0 and not all 0; None is 1 each."""
    if sample_weight is None:
        return np.ones(n_texts)
    try:
        weights = np.asarray(sample_weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"sample_weight must be numbers, one a text: {error}.") from error
    if weights.ndim == 0:
        weights = np.full(n_texts, weights)
    if weights.shape != (n_texts,):
        raise DataError(
            f"sample_weight has the shape {weights.shape}, and there are {n_texts} texts. "
            "Pass one weight a text."
        )
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise DataError(
            f"sample_weight is {weights[wrong[0]]} in row {wrong[0]}; a weight is a number of 0 or "
            "more. Give 0 to leave a row out."
        )
    if not weights.any():
        raise DataError(
            f"all {n_texts} values of sample_weight are zero, which leaves no row to train on. "
            "Pass weights above 0."
        )
    return weights


def as_class_weights(class_weight: Mapping[Any, Any], classes: npt.NDArray[Any]) -> Floats:
    """Look up the weight of each class, float64 `[C]`; a class that is not named has 1.

    >>> as_class_weights({"b": 3}, np.array(["a", "b"])).tolist()
    [1.0, 3.0]

    Raises:
        ConfigError: a weight is no number of 0 or more, or a name is no class.
    """
    for name, weight in class_weight.items():
        if not isinstance(weight, numbers.Real) or not 0 <= float(weight) < math.inf:
            raise ConfigError(
                f"class_weight[{name!r}] is {weight!r}; a weight is a number of 0 or more. "
                "Pass one."
            )
    known = classes.tolist()
    unknown = [name for name in class_weight if name not in known]
    if unknown and any(name not in class_weight for name in known):
        raise ConfigError(
            f"class_weight has {unknown[0]!r}, which is no class of y; its classes are "
            f"{', '.join(map(repr, known[:10]))}{', ...' if len(known) > 10 else ''}. "
            "Name those, as they stand in y."
        )
    return np.array([float(class_weight.get(name, 1)) for name in known])


def _is_missing(value: Any) -> bool:
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    return is_infinite or type(value).__name__ in _MISSING


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def as_seed(random_state: Any) -> int:
    """Give an int as it is; of None, a RandomState or a Generator, what it draws next.

    >>> as_seed(7)
    7

    Raises:
        ConfigError: it is none of these, or a number out of range.
    """
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(_N_SEEDS))
    source = np.random if random_state is None else random_state  # as in scikit-learn
    if source is np.random or isinstance(source, np.random.RandomState):
        return int(source.randint(_N_SEEDS, dtype=np.int64))
    if isinstance(random_state, numbers.Integral) and 0 <= int(random_state) < _N_SEEDS:
        return int(random_state)
    raise ConfigError(
        f"random_state {random_state!r} is none of what draws: None, a number from 0 to "
        f"{_N_SEEDS - 1}, or a RandomState or Generator of numpy. Pass one of these."
    )
