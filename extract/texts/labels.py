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
_NO_LABEL = ""  # what stands for an empty cell, null and NaN
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_AT_ONCE = 2**20

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a data set."""

    names: tuple[str, ...]  # of the classes
    codes: Mapping[str, npt.NDArray[np.int32]]  # of each split, int32 `[N]`, -1 where unlabelled

    @property
    def labelled_splits(self) -> list[str]:
        """Those that have a label in some row."""
        return [split for split, codes in self.codes.items() if (codes >= 0).any()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Column:
    split: str
    given: pa.ChunkedArray
    names: tuple[str, ...]  # each distinct label as text, the first of them `_NO_LABEL`
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

    >>> encode_labels({"train": pa.chunked_array([["no", "yes", "no"]])})
    Labels(names=('no', 'yes'), codes={'train': array([0, 1, 0], dtype=int32)})
    """
    encoded = [_encoded(split, column) for split, column in columns.items()]
    absent = {_NO_LABEL}
    if unlabelled is not None and not _is_missing(unlabelled):
        absent.add(unlabelled)
    found = {name for column in encoded for name in column.names} - absent
    if names is not None and not all(map(_INTEGER.fullmatch, found)):
        example = min(label for label in found if not _INTEGER.fullmatch(label))
        warn(
            f"the data set names integer labels ({names[0]!r} is 0), but has the label "
            f"{example!r}: these names are not used, and each label names its own class."
        )
        names = None
    if names is not None:
        absent.add(str(UNLABELLED))
        called = {str(index): name for index, name in enumerate(names)}
        if beyond := found - absent - called.keys():
            raise DataError(
                f"label {min(beyond)} has no name: the data set names {len(names)} classes "
                f"(0-{len(names) - 1}). Add its name to labels.json or correct the label."
            )
    else:
        numeric = all(map(_INTEGER.fullmatch, found))  # "01" comes before "1" in any case
        in_order = sorted(found, key=lambda name: (int(name) if numeric else 0, name))
        called = {name: name for name in in_order}
    taken = [column for column in encoded if column.split in wanted or not wanted]
    present = {one.split: sorted(one.counts.keys() - absent) for one in taken}
    _refuse_unusable(taken, present, called, unlabelled, is_chosen=bool(wanted))
    for column in taken:
        _tell_absent(column, absent, is_left_out=not (present[column.split] or wanted))
    _warn_of_doubtful(taken, present, called)
    if unlabelled and not any(unlabelled in column.names for column in taken):
        warn(f"no row has the label {unlabelled!r} that --unlabelled names.")
    code_of = {label: code for code, label in enumerate(called)} | dict.fromkeys(absent, UNLABELLED)
    for column in encoded:
        codes = np.array([code_of[name] for name in column.names], dtype=np.int32)
        for start in range(0, len(column.indices), _AT_ONCE):  # in place: a large split has no copy
            part = column.indices[start : start + _AT_ONCE]
            part[:] = codes[part]
    return Labels(
        names=tuple(called.values()), codes={column.split: column.indices for column in encoded}
    )


def _encoded(split: str, column: pa.ChunkedArray) -> _Column:
    if pa.types.is_nested(column.type):
        raise DataError(
            f"split {split!r} has labels of type {column.type}, several to an example; a cache "
            "holds one label an example. Name a column of single labels with --label-column, or "
            "train on several with LLMEmbedClassifier (README, the same in Python)."
        )
    indices, n_before = column_array(len(column), np.int32), 0
    places = {_NO_LABEL: 0}
    for chunk in column.chunks:  # all in one could be more text than an Arrow array holds
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        names = [_class_name(split, value) for value in encoded.dictionary.to_pylist()]
        own = [places.setdefault(name, len(places)) for name in (*names, _NO_LABEL)]
        rows = encoded.indices.cast(pa.int64()).fill_null(len(names)).to_numpy()
        indices[n_before : n_before + len(chunk)] = np.array(own, dtype=np.int32)[rows]
        n_before += len(chunk)
        forget_pages()
    return _Column(split=split, given=column, names=tuple(places), indices=indices)


def _class_name(split: str, value: object) -> str:
    if value is None or _is_missing(str(value)):
        return _NO_LABEL
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


def _is_missing(text: str) -> bool:
    return text.strip() in {"", "nan", "NaN"}  # the last two are what pandas writes


def _refuse_unusable(
    columns: Sequence[_Column],
    present: Mapping[str, Sequence[str]],
    called: Mapping[str, str],
    unlabelled: str | None,
    *,
    is_chosen: bool,
) -> None:
    """Refuse labels that cannot be used; `called` has the class name of each label."""
    if not is_chosen and not any(present.values()):
        raise DataError("no row of any split has a label. Check --label-column.")
    for column in columns:
        is_marked = unlabelled is not None and _is_missing(unlabelled)
        if present[column.split] and _NO_LABEL in column.counts and not is_marked:
            row = int(np.argmin(column.indices))  # _NO_LABEL is the first of the names
            value = column.given[row].as_py()
            raise DataError(
                f"split {column.split!r}, row {row}: the label is "
                f"{'missing' if value is None else repr(value)} ({column.counts[_NO_LABEL]} rows "
                "in all). Remove such rows, or pass --unlabelled '' to keep them as unlabelled."
            )
    if len(called) < 2:
        raise DataError(
            f"the labels have the classes {list(called.values())}; a classifier needs at least "
            "two. Check --label-column."
        )
    trained = present.get(TRAIN)
    for split, labels in present.items():
        if trained and not is_chosen and len(labels) == 1 and labels[0] not in trained:
            raise DataError(
                f"every label of split {split!r} is {labels[0]!r}, which no row of split {TRAIN!r} "
                f"has. If it means that there is no label, pass --unlabelled {labels[0]!r}; if it "
                "is a class, name the splits to extract with --split."
            )


def _tell_absent(column: _Column, absent: Collection[str], *, is_left_out: bool) -> None:
    counts = {name or "empty": n for name, n in column.counts.items() if name in absent}
    if counts:
        n_absent, n_rows = sum(counts.values()), len(column.indices)
        left_out = f" It is left out; --split {column.split} takes it." if is_left_out else ""
        _log.info(
            "%d of %d rows of split '%s' have no label (%s).%s",
            *(n_absent, n_rows, column.split, ", ".join(counts), left_out),
        )


def _warn_of_doubtful(
    columns: Sequence[_Column], present: Mapping[str, Sequence[str]], called: Mapping[str, str]
) -> None:
    """Warn of classes that look like one, and of those that no classifier can learn."""
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
    for column in columns:
        untrained = [label for label in present[column.split] if trained and label not in trained]
        if untrained:
            counted = [f"{called[one]!r} ({column.counts[one]} rows)" for one in untrained]
            warn(
                f"split {column.split!r} has labels that no row of split {TRAIN!r} has, so no "
                f"classifier can learn them: {listed(counted)}."
            )
