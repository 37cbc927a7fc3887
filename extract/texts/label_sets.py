"""Several labels a text, as int8 `[N, C]`: 1 where a text has the label, 0 where not.

They come as a column of lists, as texts with a separator between the labels, or as one column of 0
and 1 a label. A row of none is a text to which no label applies; a row of -1 is unlabelled, and is
there only where that was marked. Labels themselves are what they are for single ones: see `labels`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from llmembed.common.errors import DataError, warn
from llmembed.common.scratch import column_array
from llmembed.extract.texts import labels as single
from llmembed.extract.texts.columns import as_labels
from llmembed.extract.texts.labels import UNLABELLED, EncodedColumn, Labels

_APPLIES: Mapping[str, int] = {"0": 0, "1": 1, "false": 0, "true": 1}
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedLabels:
    """The labels of the rows of one split, one after the other."""

    labels: pa.ChunkedArray  # as `columns.as_labels` gives them
    lengths: npt.NDArray[np.int64]  # how many each row has, int64 `[N]`
    is_missing: npt.NDArray[np.bool_]  # which rows have no list at all, bool `[N]`


def is_list(column: pa.ChunkedArray) -> bool:
    """Tell whether a column holds lists."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(kind(column.type) for kind in (*kinds, *views))


def from_lists(where: str, name: str, column: pa.ChunkedArray) -> ListedLabels:
    """Read a column of lists; one of nothing but nulls is of no list in any row.

    >>> found = from_lists("toy.parquet", "labels", pa.chunked_array([[["a", "b"], [], None]]))
    >>> found.labels.to_pylist(), found.lengths.tolist(), found.is_missing.tolist()
    (['a', 'b'], [2, 0, 0], [False, False, True])
    """
    if pa.types.is_null(column.type):
        column = column.cast(pa.large_list(pa.null()))
    if not is_list(column):
        raise DataError(
            f"{where}: column {name!r} holds {column.type}, where other splits have lists of "
            "labels. Write a list in every row."
        )
    # No cast to lists of one kind: pyarrow 26 mixes up the rows of sliced views by it.
    flat = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
    lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0)
    return ListedLabels(
        labels=as_labels(f"{where} (its labels one after the other)", name, flat),
        lengths=lengths.to_numpy().astype(np.int64),
        is_missing=column.is_null().to_numpy(),
    )


def from_texts(
    where: str,
    name: str,
    column: pa.ChunkedArray,
    *,
    separator: str,
    is_empty_unlabelled: bool = False,
) -> ListedLabels:
    """Part texts at a separator; blanks around a label do not count.

    An empty text is one to which no label applies, or it `is_empty_unlabelled`.

    >>> found = from_texts("t.csv", "tags", pa.chunked_array([["a; b", "", "c"]]), separator=";")
    >>> found.labels.to_pylist(), found.lengths.tolist()
    (['a', 'b', 'c'], [2, 0, 1])
    """
    if is_list(column):
        raise DataError(
            f"{where}: column {name!r} holds lists, which --label-separator {separator!r} cannot "
            "part. Leave it away."
        )
    texts = as_labels(where, name, column)
    if pa.types.is_dictionary(texts.type):
        texts = texts.cast(texts.type.value_type)
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise DataError(
            f"{where}: column {name!r} holds {texts.type}, which --label-separator {separator!r} "
            "cannot part. Name a column of text with --label-column, or leave it away."
        )
    parts = pyarrow.compute.split_pattern(texts, pattern=separator)
    is_missing = texts.is_null().to_numpy()
    is_empty = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(texts), "")
    is_empty = pyarrow.compute.fill_null(is_empty, True).to_numpy()
    filled = parts.filter(pa.array(~is_empty))
    flat = pa.chunked_array([chunk.flatten() for chunk in filled.chunks], texts.type)
    lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(parts), 0)
    return ListedLabels(
        labels=pyarrow.compute.utf8_trim_whitespace(flat),
        lengths=np.where(is_empty, 0, lengths.to_numpy()).astype(np.int64),
        is_missing=(is_missing | is_empty) if is_empty_unlabelled else is_missing,
    )


def encode_lists(
    columns: Mapping[str, ListedLabels],
    names: Sequence[str] | None = None,
    *,
    unlabelled: str | None = None,
    wanted: Collection[str] = (),
) -> Labels:
    """Turn the listed labels of each split into label sets over one list of class names.

    Arguments and errors are those of `labels.encode_labels`; of the splits that are taken, a list
    may hold no label twice and none that is missing.

    >>> listed = from_lists("t", "labels", pa.chunked_array([[["b"], [], ["a", "b"]]]))
    >>> found = encode_lists({"train": listed})
    >>> found.names, found.sets["train"].tolist()
    (('a', 'b'), [[0, 1], [0, 0], [1, 1]])
    """
    encoded = {split: single.encoded(split, one.labels) for split, one in columns.items()}
    is_missing_marked = single.is_missing(unlabelled)
    mark = None if is_missing_marked else unlabelled
    nothing = {single.NO_LABEL, mark}
    found = {name for one in encoded.values() for name in one.names} - nothing
    called = single.name_classes(found, single.usable_names(found, names))
    taken = {split: one for split, one in columns.items() if split in wanted or not wanted}
    sets, counts = {}, {}
    for split, listed in taken.items():
        of_rows = _Rows.of(split, listed, encoded[split], mark)
        of_rows.refuse_missing(is_marked=is_missing_marked)
        sets[split] = of_rows.sets(list(called))
        counts[split] = {
            label: n for label, n in encoded[split].counts.items() if label not in nothing
        }
    if mark is not None and not any(mark in encoded[split].names for split in taken):
        warn(f"no row has the label {mark!r} that --unlabelled names.")
    return _checked(sets, counts, called, wanted)


def encode_indicators(
    columns: Mapping[str, Mapping[str, pa.ChunkedArray]],
    *,
    unlabelled: str | None = None,
    wanted: Collection[str] = (),
) -> Labels:
    """Turn columns of 0 and 1 of each split, each named as its label, into label sets.

    A row in which all of them are missing, or hold the mark, is unlabelled where that is marked.
    """
    sets, counts = {}, {}
    for split, labels in columns.items():
        if wanted and split not in wanted:
            continue
        found = [_applies(split, name, column, unlabelled) for name, column in labels.items()]
        rows = column_array(len(found[0]) * len(found), np.int8).reshape(-1, len(found))
        for place, values in enumerate(found):
            rows[:, place] = values
        is_missing = rows == UNLABELLED
        partly = np.flatnonzero(is_missing.any(axis=1) & ~is_missing.all(axis=1))
        if len(partly):
            missing = list(labels)[int(np.argmax(is_missing[partly[0]]))]
            raise DataError(
                f"split {split!r}, row {partly[0]}: column {missing!r} says nothing, while other "
                "labels of the row are known. Write 0 or 1, or leave out the row."
            )
        sets[split] = rows
        counts[split] = {
            name: int((rows[:, place] == 1).sum()) for place, name in enumerate(labels)
        }
    names = list(next(iter(columns.values())))
    return _checked(sets, counts, dict(zip(names, names, strict=True)), wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """The labels of a split with the row of each."""

    split: str
    column: EncodedColumn
    listed: ListedLabels
    rows: npt.NDArray[np.int64]  # of each label, int64
    is_unlabelled: npt.NDArray[np.bool_]  # bool `[N]`

    @classmethod
    def of(cls, split: str, listed: ListedLabels, column: EncodedColumn, mark: str | None) -> _Rows:
        rows = np.repeat(np.arange(len(listed.lengths)), listed.lengths)
        is_unlabelled = listed.is_missing.copy()
        if mark in column.names:
            marked = rows[column.indices == column.names.index(str(mark))]
            mixed = marked[listed.lengths[marked] > 1]
            if len(mixed):
                raise DataError(
                    f"split {split!r}, row {mixed[0]}: {mark!r}, which --unlabelled says is no "
                    "label, stands beside others. Write it alone, or leave it away."
                )
            is_unlabelled[marked] = True
        return cls(
            split=split,
            column=column,
            listed=listed,
            rows=rows,
            is_unlabelled=is_unlabelled,
        )

    def refuse_missing(self, *, is_marked: bool) -> None:
        """Refuse a missing list that nobody marked, and a missing or repeated label in a list."""
        missing = np.flatnonzero(self.listed.is_missing)
        if len(missing) and not is_marked and not self.is_unlabelled.all():
            raise DataError(
                f"split {self.split!r}, row {missing[0]}: the labels are missing ({len(missing)} "
                "rows in all). Write an empty list where no label applies, remove such rows, or "
                "pass --unlabelled '' to keep them as unlabelled."
            )
        absent = np.flatnonzero(self.column.indices == 0)  # NO_LABEL is the first of the names
        if len(absent):
            raise DataError(
                f"split {self.split!r}, row {self.rows[absent[0]]}: one of its labels is missing "
                f"(null, empty or NaN; {len(absent)} in all). Leave it out of the list."
            )

    def sets(self, labels: Sequence[str]) -> npt.NDArray[np.int8]:
        """Make the label sets, int8 `[N, C]`."""
        n_rows, n_classes = len(self.listed.lengths), len(labels)
        found = column_array(n_rows * n_classes, np.int8).reshape(n_rows, n_classes)
        found[:] = 0
        place = {label: code for code, label in enumerate(labels)}
        codes = np.array([place.get(name, -1) for name in self.column.names], np.int64)
        of_each = codes[self.column.indices]
        found[self.rows[of_each >= 0], of_each[of_each >= 0]] = 1  # the others are the mark
        found[self.is_unlabelled] = UNLABELLED
        twice = np.flatnonzero(
            ~self.is_unlabelled & (found.sum(axis=1, dtype=np.int64) < self.listed.lengths)
        )
        if len(twice):
            own = self.column.indices[self.rows == twice[0]]
            label = self.column.names[int(np.argmax(np.bincount(own)))]
            raise DataError(
                f"split {self.split!r}, row {twice[0]}: it has the label {label!r} twice "
                f"({len(twice)} such rows in all). Write each label of a text once."
            )
        return found


def _applies(
    split: str, name: str, column: pa.ChunkedArray, unlabelled: str | None
) -> npt.NDArray[np.int8]:
    """Read a column of 0 and 1 as int8 `[N]`, -1 where the mark for no label stands."""
    found = single.encoded(split, as_labels(f"split {split!r}", name, column))
    meaning = {label: _APPLIES.get(label.casefold()) for label in found.names}
    if unlabelled is not None:
        is_missing_marked = single.is_missing(unlabelled)
        meaning[single.NO_LABEL if is_missing_marked else unlabelled] = UNLABELLED
    codes = [meaning[label] for label in found.names]
    wrong = np.isin(found.indices, [place for place, code in enumerate(codes) if code is None])
    if wrong.any():
        row = int(np.argmax(wrong))
        value = found.names[found.indices[row]]
        raise DataError(
            f"split {split!r}, row {row}: column {name!r} holds {value!r}, and of several label "
            "columns each holds 0 or 1, or false or true. Correct it, or name one column with "
            "--label-column; --unlabelled says what stands for no label."
        )
    return np.array([code or 0 for code in codes], np.int8)[found.indices]


def _checked(
    sets: Mapping[str, npt.NDArray[np.int8]],
    counts: Mapping[str, Mapping[str, int]],
    called: Mapping[str, str],
    wanted: Collection[str],
) -> Labels:
    """Refuse label sets that cannot be used, and tell of splits that are left out."""
    known = {split: (one[:, :1] != UNLABELLED).any(axis=1) for split, one in sets.items()}
    if not wanted and not any(one.any() for one in known.values()):
        raise DataError("no row of any split has a label. Check --label-column.")
    if len(called) < 2:
        raise DataError(
            f"the labels have the classes {list(called.values())}; a classifier needs at least "
            "two. Check --label-column."
        )
    present = {split: {label: n for label, n in of.items() if n} for split, of in counts.items()}
    single.warn_of_doubtful(present, called)
    for split in sets:
        if not (known[split].any() or wanted):
            _log.info("Split '%s' has no label; it is left out, --split %s takes it.", split, split)
    codes = {split: np.full(len(one), UNLABELLED, np.int32) for split, one in sets.items()}
    return Labels(names=tuple(called.values()), codes=codes, sets=sets)
