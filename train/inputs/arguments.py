"""What users of Python pass: texts, weights and seeds, each checked once; `classes` has y.

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


def names_of_columns(table: Any) -> Any:
    """Name the columns of a table of Arrow, pandas or polars; None is no table."""
    return getattr(table, "column_names", getattr(table, "columns", None))


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
            columns = names_of_columns(given)
            names = "" if columns is None else ", ".join(map(str, list(columns)[:10]))
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
                f"{name} must be a list of strings: row {row} holds {brief(text)}, which is no "
                "text. Leave the row out, or make it a string."
            )
    return texts


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


def brief(value: Any) -> str:
    """Write a value, the first of it where it is long."""
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
