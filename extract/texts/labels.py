"""Labels of any kind as indices of class names, int32, -1 where an example has none.

Strings, integers, booleans and whole numbers name classes, which are sorted, as numbers where all
are numbers. What is no label, docs/data.md says. A missing label that nobody marked is refused: it
may be a mistake, and training on the others would repair it in silence.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmembed.common.errors import DataError, listed, warn
from llmembed.common.scratch import column_array, forget_pages
from llmembed.common.splits import TRAIN

UNLABELLED = -1
NO_LABEL = ""  # what stands for an empty cell, null and NaN
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_AT_ONCE = 2**20
_SEPARATORS = ("|", ";", ",", "/")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a data set."""

    names: tuple[str, ...]  # of the classes
    codes: Mapping[str, npt.NDArray[np.int32]]  # of each split, int32 `[N]`, -1 where unlabelled
    # Of each split, int8 `[N, C]`, a row of -1 where unlabelled; None where a text has one label.
    sets: Mapping[str, npt.NDArray[np.int8]] | None = None

    @property
    def labelled_splits(self) -> list[str]:
        """Those that have a label in some row."""
        if self.sets is not None:
            return [split for split, sets in self.sets.items() if (sets >= 0).any()]
        return [split for split, codes in self.codes.items() if (codes >= 0).any()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedColumn:
    """A column with each distinct value as text."""

    split: str
    given: pa.ChunkedArray
    names: tuple[str, ...]  # each distinct label as text, the first of them `NO_LABEL`
    indices: npt.NDArray[np.int32]  # index of the label of each row, int32 `[N]`

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Rows of each label that occurs."""
        counts = np.bincount(self.indices, minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, counts, strict=True) if count}


def encode_labels(
    columns: Mapping[str, pa.ChunkedArray],
    names: Sequence[str] | None = None,
    *,
    unlabelled: str | None = None,
    wanted: Collection[str] = (),
) -> Labels:
    """Turn the label column of each split into indices of one list of class names.

    Args:
        columns: split name -> label column, as `columns.as_labels` gives it.
        names: class names that integer labels are indices of, where the data set brings them.
        unlabelled: what stands where there is no label; "" is for empty cells, null and NaN.
        wanted: splits that were asked for by name; none is all that have labels.

    Raises:
        DataError: a label is missing or not of a kind that can name a class, fewer than two
            classes are there, or a split has nothing but one label that is not trained on.

    >>> found = encode_labels({"train": pa.chunked_array([["no", "yes", "no"]])})
    >>> found.names, found.codes["train"]
    (('no', 'yes'), array([0, 1, 0], dtype=int32))
    """
    found_columns = [encoded(split, column) for split, column in columns.items()]
    absent = {NO_LABEL}
    if unlabelled is not None and not is_missing(unlabelled):
        absent.add(unlabelled)
    found = {name for column in found_columns for name in column.names} - absent
    names = usable_names(found, names)
    if names is not None:
        absent.add(str(UNLABELLED))
    called = name_classes(found - absent, names)
    taken = [column for column in found_columns if column.split in wanted or not wanted]
    present = {
        one.split: {label: n for label, n in sorted(one.counts.items()) if label not in absent}
        for one in taken
    }
    _refuse_unusable(taken, present, called, unlabelled, is_chosen=bool(wanted))
    for column in taken:
        _tell_absent(column, absent, is_left_out=not (present[column.split] or wanted))
    warn_of_doubtful(present, called)
    _warn_of_joined(called)
    if unlabelled and not any(unlabelled in column.names for column in taken):
        warn(f"no row has the label {unlabelled!r} that --unlabelled names.")
    code_of = {label: code for code, label in enumerate(called)} | dict.fromkeys(absent, UNLABELLED)
    return Labels(
        names=tuple(called.values()),
        codes={one.split: _coded(one, code_of) for one in found_columns},
    )


def _coded(column: EncodedColumn, code_of: Mapping[str, int]) -> npt.NDArray[np.int32]:
    """Make the indices those of classes, in place: a large split has no copy."""
    codes = np.array([code_of[name] for name in column.names], dtype=np.int32)
    for start in range(0, len(column.indices), _AT_ONCE):
        part = column.indices[start : start + _AT_ONCE]
        part[:] = codes[part]
    return column.indices


def usable_names(found: Collection[str], names: Sequence[str] | None) -> Sequence[str] | None:
    """Give the names of integer labels where they apply to these; else warn, and give None."""
    if names is not None and not all(map(_INTEGER.fullmatch, found)):
        example = min(label for label in found if not _INTEGER.fullmatch(label))
        warn(
            f"the data set names integer labels ({names[0]!r} is 0), but has the label "
            f"{example!r}: these names are not used, and each label names its own class."
        )
        return None
    return names


def name_classes(found: Collection[str], names: Sequence[str] | None) -> dict[str, str]:
    """Map each label to the name of its class, in the order of the classes.

    >>> name_classes({"10", "2"}, None), name_classes({"1"}, ["no", "yes"])
    ({'2': '2', '10': '10'}, {'0': 'no', '1': 'yes'})
    """
    if names is None:
        numeric = all(map(_INTEGER.fullmatch, found))  # "01" comes before "1" in any case
        in_order = sorted(found, key=lambda name: (int(name) if numeric else 0, name))
        return {name: name for name in in_order}
    called = {str(index): name for index, name in enumerate(names)}
    if beyond := {*found} - called.keys():
        raise DataError(
            f"label {min(beyond)} has no name: the data set names {len(names)} classes "
            f"(0-{len(names) - 1}). Add its name to labels.json or correct the label."
        )
    return called


def encoded(split: str, column: pa.ChunkedArray) -> EncodedColumn:
    """Give each distinct value of a column as the text that names its class.

    Raises:
        DataError: a value is none that can name a class.
    """
    if pa.types.is_nested(column.type):
        raise DataError(
            f"split {split!r} has labels of type {column.type}; a label is a string, an integer or "
            "a boolean, and several to an example are one list of such. Name another column with "
            "--label-column."
        )
    indices, n_before = column_array(len(column), np.int32), 0
    places = {NO_LABEL: 0}
    for chunk in column.chunks:  # all in one could be more text than an Arrow array holds
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        names = [_class_name(split, value) for value in encoded.dictionary.to_pylist()]
        own = [places.setdefault(name, len(places)) for name in (*names, NO_LABEL)]
        rows = encoded.indices.cast(pa.int64()).fill_null(len(names)).to_numpy()
        indices[n_before : n_before + len(chunk)] = np.array(own, dtype=np.int32)[rows]
        n_before += len(chunk)
        forget_pages()
    return EncodedColumn(split=split, given=column, names=tuple(places), indices=indices)


def _class_name(split: str, value: object) -> str:
    if value is None or is_missing(str(value)):
        return NO_LABEL
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | str):
        return str(value)
    raise DataError(
        f"split {split!r} has the label {value!r}, a {type(value).__name__}; labels are strings, "
        "integers or booleans. Check --label-column."
    )


def is_missing(text: str | None) -> bool:
    """Tell whether a text stands for no value: an empty cell, or NaN as pandas writes it."""
    return text is not None and text.strip() in {
        "",
        "nan",
        "NaN",
    }  # the last two are what pandas writes


def _refuse_unusable(
    columns: Sequence[EncodedColumn],
    present: Mapping[str, Mapping[str, int]],
    called: Mapping[str, str],
    unlabelled: str | None,
    *,
    is_chosen: bool,
) -> None:
    """Refuse labels that cannot be used; `called` has the class name of each label."""
    if not is_chosen and not any(present.values()):
        raise DataError("no row of any split has a label. Check --label-column.")
    for column in columns:
        is_marked = is_missing(unlabelled)
        if present[column.split] and NO_LABEL in column.counts and not is_marked:
            row = int(np.argmin(column.indices))  # NO_LABEL is the first of the names
            value = column.given[row].as_py()
            raise DataError(
                f"split {column.split!r}, row {row}: the label is "
                f"{'missing' if value is None else repr(value)} ({column.counts[NO_LABEL]} rows "
                "in all). Remove such rows, or pass --unlabelled '' to keep them as unlabelled."
            )
    if len(called) < 2:
        raise DataError(
            f"the labels have the classes {list(called.values())}; a classifier needs at least "
            "two. Check --label-column."
        )
    trained = present.get(TRAIN)
    for split, labels in present.items():
        only = next(iter(labels), "")
        if trained and not is_chosen and len(labels) == 1 and only not in trained:
            raise DataError(
                f"every label of split {split!r} is {only!r}, which no row of split {TRAIN!r} "
                f"has. If it means that there is no label, pass --unlabelled {only!r}; if it "
                "is a class, name the splits to extract with --split."
            )


def _tell_absent(column: EncodedColumn, absent: Collection[str], *, is_left_out: bool) -> None:
    counts = {name or "empty": n for name, n in column.counts.items() if name in absent}
    if counts:
        n_absent, n_rows = sum(counts.values()), len(column.indices)
        left_out = f" It is left out; --split {column.split} takes it." if is_left_out else ""
        _log.info(
            "%d of %d rows of split '%s' have no label (%s).%s",
            *(n_absent, n_rows, column.split, ", ".join(counts), left_out),
        )


def warn_of_doubtful(present: Mapping[str, Mapping[str, int]], called: Mapping[str, str]) -> None:
    """Warn of classes that look like one, and of those that no classifier can learn.

    Args:
        present: split -> label -> rows that have it, at least one.
        called: label -> name of its class.
    """
    first: dict[str, str] = {}
    alike = []
    occurring = {label for labels in present.values() for label in labels}
    for name in (name for label, name in called.items() if label in occurring):
        other = first.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            alike.append(f"{other!r} and {name!r}")
    if alike:
        warn(
            f"labels differ only by blanks or case, and are different classes: {listed(alike)}. "
            "Write them alike if they are one."
        )
    trained = present.get(TRAIN)
    for split, labels in present.items():
        untrained = [label for label in labels if trained and label not in trained]
        if untrained:
            counted = [f"{called[one]!r} ({labels[one]} rows)" for one in untrained]
            warn(
                f"split {split!r} has labels that no row of split {TRAIN!r} has, so no "
                f"classifier can learn them: {listed(counted)}."
            )


def _warn_of_joined(labels: Collection[str]) -> None:
    """Warn of classes that are others side by side: a text may have several labels."""
    for separator in _SEPARATORS:
        joined = []
        for label in labels:
            parts = [part.strip() for part in label.split(separator)]
            if len(parts) > 1 and all(part in labels for part in parts):
                joined.append(repr(label))
        if joined:
            warn(
                f"labels are others joined by {separator!r}, and are classes of their own: "
                f"{listed(joined)}. If a text may have several labels, pass --label-separator "
                f"{separator!r}."
            )
