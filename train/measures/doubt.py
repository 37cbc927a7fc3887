"""When a prediction is to be trusted: told by rows that were held out of the training.

Each rule counts one row more than there are, on the wrong side: of n rows it promises no more than
n rows can show. With one row held out nothing can be promised.

Abstaining answers the surest rows, as many as can be while the wrong ones among them, and one more,
are no larger a share than is allowed (Jin and Candes, "Selection by prediction with conformal
p-values", JMLR 2023). That holds on the mean over all training sets, those that answer nothing
included; where few rows would be answered, the others are wrong more often than they say. So the
standard deviation of such a count, its square root, is added: with 1,000 rows a point in 100.

Sets of labels are split conformal (Vovk, Gammerman and Shafer, 2005): a label is in the set where
its probability is at least what all but a share of the held-out rows gave their class; by class,
the held-out rows of that class. Where rows were held out fold by fold, each is judged by another
classifier than new texts are: what is proven is then twice the misses (Vovk, "Cross-conformal
predictors", 2015; Barber et al., "Predictive inference with the jackknife+", 2021), what is found
is what was asked for.

Everywhere n is the number of held-out rows, and a share is a number between 0 and 1.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmembed.common.errors import ConfigError
from llmembed.train.measures.metrics import Floats, Labels

REPORTED = (0.9, 0.95, 0.99)
_ROUNDING = 1e-9  # of a share times a number of rows
Bools = npt.NDArray[np.bool_]
Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class HeldOutRows:
    """What a classifier said of training rows that it had not seen, in the order of the rows."""

    label: npt.NDArray[np.int32]
    """int32 `[n]`, the class of each row."""
    right: Bools
    """bool `[n]`, whether its likeliest class is that."""
    top: Float32s
    """float32 `[n]`, the probability of its likeliest class."""
    true: Float32s
    """float32 `[n]`, the probability of its class."""

    @classmethod
    def of(cls, proba: Floats, labels: Labels) -> HeldOutRows:
        """Take what is needed of probabilities `[n, C]`.

        >>> found = HeldOutRows.of(np.array([[0.25, 0.75], [0.5, 0.5]]), np.array([0, 0]))
        >>> found.right.tolist(), found.top.tolist(), found.true.tolist()
        ([False, True], [0.75, 0.5], [0.25, 0.5])
        """
        return cls(
            label=labels.astype(np.int32),
            right=proba.argmax(axis=1) == labels,
            top=proba.max(axis=1, initial=0).astype(np.float32),
            true=proba[np.arange(len(labels)), labels].astype(np.float32),
        )


def check_share(value: Any, option: str, meaning: str) -> float:
    """Give a share as a plain number, and refuse one that no rule can keep.

    Raises:
        ConfigError: it is no number between 0 and 1, both excluded.
    """
    is_number = isinstance(value, numbers.Real)
    if not (is_number and 0 < value < 1):
        raise ConfigError(
            f"{option} is {f'{value:g}' if is_number else repr(value)}, and {meaning} lies between "
            "0 and 1, both excluded. Pass such as 0.95."
        )
    return float(value)


def abstain_below(held_out: HeldOutRows, accuracy: float) -> float | None:
    """Find the lowest probability to answer at such that the answers are right with this share.

    None where no probability does it. Rows of one probability are answered together.

    >>> proba = np.array([[p, 1 - p] for p in (0.9, 0.8, 0.7, 0.6)])
    >>> held_out = HeldOutRows.of(proba, np.array([0, 0, 0, 0]))
    >>> [abstain_below(held_out, accuracy) for accuracy in (0.5, 0.6)]  # 2 of 4 may be wrong
    [0.6000000238418579, None]
    """
    top, n_answered, counted = _surest(held_out)
    reached = np.flatnonzero(counted <= (1 - accuracy) * n_answered + _ROUNDING)
    return float(top[reached[-1]]) if len(reached) else None


def largest_accuracy(held_out: HeldOutRows) -> float:
    """Find the largest share of right answers that abstaining reaches; 0 where it is none.

    >>> largest_accuracy(HeldOutRows.of(np.array([[0.9, 0.1]] * 40), np.zeros(40, dtype=int)))
    0.95
    """
    _, n_answered, counted = _surest(held_out)
    return rounded_down(float((1 - counted / n_answered).max(initial=0)))


def rows_for_accuracy(accuracy: float) -> int:
    """Count the rows without which no answers are right with this share, all being right.

    >>> rows_for_accuracy(0.95)
    40
    """
    return math.ceil(round(2 / (1 - accuracy), 6))


def rounded_down(share: float) -> float:
    """Round to three decimals, so that what is promised is kept.

    >>> rounded_down(0.9756), rounded_down(1 - 2 / 40)
    (0.975, 0.95)
    """
    return math.floor(share * 1000 + _ROUNDING) / 1000


def _surest(held_out: HeldOutRows) -> tuple[Float32s, Labels, Floats]:
    """Give each probability, descending, how many rows have it or more, and what counts as wrong.

    That is the wrong ones of these, one more, and the deviation of such a count.
    """
    order = np.argsort(-held_out.top, kind="stable")
    top, n_wrong = held_out.top[order], np.cumsum(~held_out.right[order])
    ends = np.flatnonzero(np.append(top[1:] < top[:-1], np.ones(len(top[:1]), dtype=bool)))
    counted = n_wrong[ends] + 1
    return top[ends], ends + 1, counted + np.sqrt(counted)


def answered(proba: Floats, threshold: float) -> Bools:
    """Say which rows of probabilities `[N, C]` are answered, bool `[N]`."""
    found: Bools = proba.max(axis=1, initial=0).astype(np.float32) >= np.float32(threshold)
    return found


def label_sets(
    held_out: HeldOutRows, proba: Floats, coverage: float, *, by_class: bool = False
) -> Bools:
    """Say which labels are in the set of each row of probabilities `[N, C]`, bool `[N, C]`.

    A class with too few held-out rows to say what its rows get is in every set, `by_class`.

    >>> held_out = HeldOutRows.of(np.array([[p, 1 - p] for p in (0.9, 0.8, 0.7)]), np.zeros(3, int))
    >>> label_sets(held_out, np.array([[0.8, 0.2], [0.6, 0.4]]), 0.5).tolist()  # from 0.8 on
    [[True, False], [False, False]]
    """
    lowest = np.array(
        [
            set_threshold(
                held_out.true[held_out.label == k] if by_class else held_out.true, coverage
            )
            for k in range(proba.shape[1] if by_class else 1)
        ]
    )
    found: Bools = proba.astype(np.float32) >= lowest
    return found


def set_threshold(true: Float32s, coverage: float) -> np.float32:
    """Find what all but a share of n rows, and one row more, gave their class; 0 of too few rows.

    >>> [float(set_threshold(np.array([0.25, 0.75], np.float32), c)) for c in (0.3, 0.6, 0.7)]
    [0.75, 0.25, 0.0]
    """
    n = rows_kept(len(true), coverage)
    return np.float32(0) if n > len(true) else np.sort(true)[len(true) - n]


def rows_kept(n: int, coverage: float) -> int:
    """Count the rows of n and one more that a coverage asks for, at least 1."""
    return max(1, math.ceil((n + 1) * coverage - _ROUNDING))


def report_abstaining(held_out: HeldOutRows, proba: Floats, labels: Labels) -> dict[str, Any]:
    """Say what abstaining would come to, for metrics.json.

    Args:
        held_out: what decides.
        proba: float64 `[N, C]`, of the evaluation rows, which are only told about.
        labels: int64 `[N]`.
    """
    right = proba.argmax(axis=1) == labels
    found: dict[str, Any] = {}
    for accuracy in REPORTED:
        threshold = abstain_below(held_out, accuracy)
        if threshold is None:
            found[f"{accuracy:g}"] = None
            continue
        told = answered(proba, threshold)
        found[f"{accuracy:g}"] = {
            "threshold": threshold,
            "coverage": float((held_out.top >= np.float32(threshold)).mean()),
            "eval_coverage": float(told.mean()) if len(told) else None,
            "eval_accuracy": float(right[told].mean()) if told.any() else None,
        }
    return {"n_held_out": len(held_out.label), "at": found}
