"""Rows that belong together, such as texts of one author, stay together wherever rows are divided.

Groups are dealt one by one, the largest first, each to the share where it overfills the classes
least (as scikit-learn's `StratifiedGroupKFold`, by squares in place of deviations). Of shares that
take a part `w` of all rows, `sum_c n_c^2 / (T_c^2 w)` is least where each has the part `w` of every
class; a group of `g` rows goes where that grows least. The rows as a whole count as a class more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llmembed.common.errors import DataError

Groups: TypeAlias = npt.NDArray[Any]
Labels: TypeAlias = npt.NDArray[np.int64]


def deal_groups(
    labels: Labels, groups: Groups, parts: Sequence[float], generator: np.random.Generator
) -> Labels:
    """Give the share of each row, int64 `[n]`, such that no group is in two.

    Args:
        labels: int64 `[n]`, class of each row, at least 0.
        groups: `[n]`, rows of one value belong together.
        parts: of all rows that each share is to take; they sum to 1.
        generator: gives the order of groups of one size.

    >>> labels, groups = np.array([0, 0, 1, 1, 0, 1]), np.array([5, 5, 5, 7, 7, 7])
    >>> shares = deal_groups(labels, groups, (0.5, 0.5), np.random.default_rng(0))
    >>> sorted([set(shares[:3].tolist()), set(shares[3:].tolist())], key=min)
    [{0}, {1}]
    """
    names, of_rows = np.unique(groups, return_inverse=True)
    whole = int(labels.max(initial=0)) + 1  # the class more, of all rows
    pairs, counts = np.unique(
        np.stack([np.tile(of_rows, 2), np.append(labels, np.full_like(labels, whole))]),
        axis=1,
        return_counts=True,
    )
    totals = np.bincount(pairs[1], counts)
    parted = counts / totals[pairs[1]]  # of each class, what a group has of it
    ends = np.searchsorted(pairs[0], np.arange(len(names) + 1))
    weight = np.bincount(pairs[0], parted**2)
    filled, shares = np.zeros((len(parts), whole + 1)), np.zeros(len(names), dtype=np.int64)
    room = np.asarray(parts, dtype=np.float64)
    for group in np.lexsort((generator.random(len(names)), -weight)).tolist():
        own = slice(ends[group], ends[group + 1])
        columns, added = pairs[1, own], parted[own]
        share = shares[group] = ((2 * filled[:, columns] + added) @ added / room).argmin()
        filled[share, columns] += added
    found: Labels = shares[of_rows]
    return found


def draw_groups(
    labels: Labels, groups: Groups, fraction: float, generator: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Say which rows a share takes, bool `[n]`: whole groups, and of no class all.

    >>> groups = np.arange(6) // 2
    >>> drawn = draw_groups(np.zeros(6, int), groups, 1 / 3, np.random.default_rng(0))
    >>> int(drawn.sum()), bool(drawn[0] == drawn[1])
    (2, True)
    """
    if not fraction:
        return np.zeros(len(labels), dtype=np.bool_)
    drawn: npt.NDArray[np.bool_]
    drawn = deal_groups(labels, groups, (1 - fraction, fraction), generator) == 1
    whole = np.setdiff1d(labels, labels[~drawn])
    drawn &= ~np.isin(groups, groups[np.isin(labels, whole)])
    return drawn


def check_groups(groups: Groups) -> int:
    """Count the groups of the training rows, which must be two, for one to be held out.

    Raises:
        DataError: there is one.
    """
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise DataError(
            f"all {len(groups)} training rows are of one group, so none can be held out without "
            "a row of its group on the other side. Extract another --group-column, or pass "
            "--ignore-groups, in Python no groups."
        )
    return n_groups


def as_group_names(groups: Iterable[Any], n_texts: int) -> Labels:
    """Number the groups of N texts, int64 `[N]`: equal values are one group.

    >>> as_group_names(["ann", "bob", "ann"], 3).tolist()
    [0, 1, 0]

    Raises:
        DataError: there are more or fewer than texts, or one is missing.
    """
    values = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    if len(values) != n_texts:
        raise DataError(
            f"groups has {len(values)} values, and there are {n_texts} texts. Pass one a text."
        )
    numbers: dict[Any, int] = {}
    for row, value in enumerate(values):
        if value is None or value != value:  # NaN, NaT
            raise DataError(
                f"groups is {value!r} in row {row}. Give each text a group: one of its own, where "
                "it belongs to no other."
            )
        numbers.setdefault(value, len(numbers))
    return np.array([numbers[value] for value in values], dtype=np.int64)
