"""What is refused, warned of and told about the labels of a data set, before they become indices.

What has no label is told with its count. A missing label is refused: a row that nobody marked as
unlabelled may be a mistake, and training on the others would repair it in silence.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmembed.common.errors import DataError, LLMEmbedWarning
from llmembed.common.splits import TRAIN

NO_LABEL = ""
"""What stands for an empty cell, null and NaN."""
_SHOWN = 5

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelColumn:
    """The label column of a split."""

    split: str
    """Name of the split."""
    names: tuple[str, ...]
    """Label of each distinct value as text, or `NO_LABEL`."""
    values: tuple[Any, ...]
    """Those distinct values."""
    indices: npt.NDArray[np.int32]
    """Index of the value of each row, int32 `[N]`."""

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Count the rows of each label that occurs."""
        found: dict[str, int] = {}
        of_values = np.bincount(self.indices, minlength=len(self.names)).tolist()
        for name, count in zip(self.names, of_values, strict=True):
            if count:
                found[name] = found.get(name, 0) + count
        return found


def is_missing(text: str) -> bool:
    """Tell whether a label is none, as text: empty, blank, or what pandas writes for NaN."""
    return text.strip() in {"", "nan", "NaN"}


def check_names(names: Any, where: str) -> list[str]:
    """Check the names that integer labels are indices of.

    Raises:
        DataError: they are not distinct strings that can be written.
    """
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        message = f"{where} must be a JSON list of class names, in the order of the integer labels."
        raise DataError(message)
    known: set[str] = set()
    for name in names:
        if name in known:
            raise DataError(f"{where} has the class name {name!r} more than once. Rename one.")
        if not name.isascii() and name.encode(errors="replace").decode() != name:
            raise DataError(f"{where} has the class name {name!r}, which is no text. Rename it.")
        known.add(name)
    return names


def check_columns(
    columns: Sequence[LabelColumn],
    called: Mapping[str, str],
    absent: Collection[str],
    *,
    unlabelled: str | None,
    wanted: Collection[str],
) -> None:
    """Refuse labels that cannot be used, warn of doubtful ones, and tell which rows have none.

    Args:
        columns: the splits.
        called: label -> class name, in the order of the classes.
        absent: what is no label.
        unlabelled: what the user says stands where there is no label.
        wanted: splits that were asked for by name; none is all that have labels.

    Raises:
        DataError: a label is missing, fewer than two classes are there, or a split has nothing but
            one label that is not trained on.
    """
    columns = [column for column in columns if column.split in wanted or not wanted]
    present = {one.split: sorted(one.counts.keys() - set(absent)) for one in columns}
    if not wanted and not any(present.values()):
        raise DataError("no row of any split has a label. Check --label-column.")
    for column in columns:
        if present[column.split] and (unlabelled is None or not is_missing(unlabelled)):
            _refuse_missing(column)
    if len(called) < 2:
        message = (
            f"the labels have the classes {list(called.values())}; a classifier needs at least "
            "two. Check --label-column."
        )
        raise DataError(message)
    if not wanted:
        _refuse_placeholder(present)
    for column in columns:
        _tell_absent(column, absent, is_left_out=not (present[column.split] or wanted))
    occurring = {label for labels in present.values() for label in labels}
    _warn_of_lookalikes([name for label, name in called.items() if label in occurring])
    _warn_of_untrained(columns, present, called)
    if unlabelled and not any(unlabelled in column.names for column in columns):
        _warn(f"no row has the label {unlabelled!r} that --unlabelled names.")


def _refuse_missing(column: LabelColumn) -> None:
    if NO_LABEL not in column.counts:
        return
    missing = [place for place, name in enumerate(column.names) if name == NO_LABEL]
    row = int(np.flatnonzero(np.isin(column.indices, missing))[0])
    value = column.values[column.indices[row]]
    said = "missing" if value is None else repr(value)
    message = (
        f"split {column.split!r}, row {row}: the label is {said} "
        f"({column.counts[NO_LABEL]} rows in all). Remove such rows, or pass --unlabelled '' to "
        "keep them as unlabelled."
    )
    raise DataError(message)


def _refuse_placeholder(present: Mapping[str, Sequence[str]]) -> None:
    trained = present.get(TRAIN)
    for split, labels in present.items():
        if trained and len(labels) == 1 and labels[0] not in trained:
            message = (
                f"every label of split {split!r} is {labels[0]!r}, which no row of split {TRAIN!r} "
                f"has. If it means that there is no label, pass --unlabelled {labels[0]!r}; if it "
                "is a class, name the splits to extract with --split."
            )
            raise DataError(message)


def _tell_absent(column: LabelColumn, absent: Collection[str], *, is_left_out: bool) -> None:
    counts = {name or "empty": n for name, n in column.counts.items() if name in absent}
    if counts:
        n_absent, n_rows = sum(counts.values()), len(column.indices)
        left_out = f" It is left out; --split {column.split} takes it." if is_left_out else ""
        _log.info(
            "%d of %d rows of split '%s' have no label (%s).%s",
            *(n_absent, n_rows, column.split, ", ".join(counts), left_out),
        )


def _warn_of_lookalikes(names: Sequence[str]) -> None:
    first: dict[str, str] = {}
    pairs = []
    for name in names:
        other = first.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            pairs.append(f"{other!r} and {name!r}")
    if pairs:
        _warn(
            f"labels differ only by blanks or case, and are different classes: {_some(pairs)}. "
            "Write them alike if they are one."
        )


def _warn_of_untrained(
    columns: Sequence[LabelColumn],
    present: Mapping[str, Sequence[str]],
    called: Mapping[str, str],
) -> None:
    trained = present.get(TRAIN)
    for column in columns:
        untrained = [label for label in present[column.split] if trained and label not in trained]
        if untrained:
            counted = [f"{called[one]!r} ({column.counts[one]} rows)" for one in untrained]
            _warn(
                f"split {column.split!r} has labels that no row of split {TRAIN!r} has, so no "
                f"classifier can learn them: {_some(counted)}."
            )


def _some(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more


def _warn(message: str) -> None:
    warnings.warn(message, LLMEmbedWarning, stacklevel=4)
