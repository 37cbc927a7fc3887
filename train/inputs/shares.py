"""Which rows train, which stop the training early, and which only give the final figures.

Early stopping watches a stratified share of the training split, drawn once from the seed, so that
several seeds are compared on the same rows; or the validation split, where there is one beside the
split that is evaluated. Rows of one group stay on one side of whatever is drawn. Training rows of
weight 0 are left out, as if they were not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import Cache, Split
from llmembed.common.errors import ConfigError, DataError, warn
from llmembed.common.splits import TEST, TRAIN, VALIDATION, draw_share, split_name
from llmembed.train.config import Reading
from llmembed.train.inputs.grouping import Groups, check_groups, deal_groups, draw_groups
from llmembed.train.inputs.sets import Targets, check_sets, strata_of, targets_of
from llmembed.train.measures import Floats

HELD_OUT_FRACTION = 0.1
_FOLDS, _FOLDS_OF_FEW, _FEW_ROWS = 5, 10, 2048

MOST_NAMED = 5
"""Rows that a warning names, of those that it counts."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Rows of each share; the shares are disjoint."""

    train: Rows  # int64 `[n]`, rows of the training split that are trained on
    # int64 `[n]`, rows that early stopping watches, if any. Those of a validation split are counted
    # on behind all rows of the training split.
    validation: Rows
    eval: Rows  # int64 `[n]`, rows of `eval_split`
    train_split: str  # split that the first two come from
    eval_split: str  # split that `eval` comes from: the training split where it is held out
    validation_split: str | None = None  # that of `validation`, where that is another one
    told: Mapping[str, Any] = field(default_factory=dict)  # of weights and groups, for the record

    @property
    def held_out(self) -> bool:
        """Whether the evaluation rows were held out of the training split."""
        return self.eval_split == self.train_split

    @property
    def seen(self) -> Rows:
        """Rows of the training split that train or stop the training, int64 `[n]`."""
        if self.validation_split is not None:
            return self.train
        return np.concatenate([self.train, self.validation])

    def record(self) -> dict[str, dict[str, Any]]:
        """Say which rows were called what."""
        held_out = f" ({HELD_OUT_FRACTION:.0%} held out)" if self.held_out else ""
        return {
            "train": {"split": self.train_split, "n": len(self.train), **self.told},
            "validation": {
                "split": self.validation_split or self.train_split,
                "n": len(self.validation),
            },
            "eval": {"split": self.eval_split + held_out, "n": len(self.eval)},
        }


def refuse_texts_alone(cache: Cache) -> None:
    """Refuse a cache without classes.

    Raises:
        DataError: it is one.
    """
    if not cache.labels:
        raise DataError(
            f"{cache.path} holds texts without classes, as a cache of LLMEmbedClassifier does, and "
            "here each text needs one. Fit in Python, LLMEmbedClassifier(cache="
            f"{str(cache.path)!r}).fit(texts, classes), or extract a data set that has a column of "
            "labels."
        )


def choose_shares(cache: Cache, reading: Reading) -> Shares:
    """Divide the labelled rows of a cache.

    Raises:
        ConfigError: a split is unknown, or the validation share would be empty.
        DataError: the training rows have no label, or only one class.
    """
    refuse_texts_alone(cache)
    if TRAIN not in cache.splits:
        raise ConfigError.unknown(
            f"{cache.path}: split",
            TRAIN,
            cache.splits,
            "A fit trains on it. Of a folder of files, rename the one with the rows to train on to "
            f"{TRAIN}.csv, then run llmembed-extract again; of other data sets, extract a split "
            "of that name.",
        )
    split = cache[TRAIN]
    targets, train = targets_of(split), _counted(split, reading)
    groups = None if reading.ignore_groups else split.groups
    generator = np.random.default_rng(reading.seed)
    eval_split = _eval_split(cache, reading.eval_split)
    if eval_split == TRAIN:
        strata = strata_of(targets, train)
        train, held_out = draw_stratified(strata, train, HELD_OUT_FRACTION, generator, groups)
    else:
        held_out = labelled_rows(cache[eval_split])
    validation_split = _given_validation(cache, reading, eval_split)
    if validation_split is None:
        train, validation = draw_validation(
            targets, train, cache.labels, reading, generator, groups
        )
    else:
        _check_classes(targets[train], cache.labels)
        validation = split.n_rows + _learnable(cache, validation_split, targets[train], reading)
    shares = Shares(
        train=train,
        validation=validation,
        eval=held_out,
        train_split=TRAIN,
        eval_split=eval_split,
        validation_split=validation_split,
        told=_of_weights(split, train, reading)
        | ({} if groups is None else {"n_groups": len(np.unique(groups[train]))}),
    )
    _warn_of_shared_texts(cache, shares)
    if groups is not None:
        _warn_of_shared_groups(cache, shares)
    return shares


def draw_validation(
    targets: Targets,
    rows: Rows,
    names: Sequence[str],
    reading: Reading,
    generator: np.random.Generator,
    groups: Groups | None = None,
) -> tuple[Rows, Rows]:
    """Divide rows, int64 `[n]`, into those trained on and those that early stopping watches.

    They are stratified by class, or by the rarest label of each.

    Groups, `[N]` as the labels, are kept whole. Few rows have no share to spare: unless one is
    asked for, all of them train, with one warning.

    Raises:
        ConfigError: the validation share that is asked for would be empty.
        DataError: there is only one class, or of several labels a text there is none.
    """
    _check_classes(targets[rows], names)
    fraction = reading.val_fraction
    train, validation = draw_stratified(strata_of(targets, rows), rows, fraction, generator, groups)
    if fraction and not len(validation):
        empty = f"a validation share of {fraction} of {len(train)} examples is empty"
        if reading.needs_share:
            raise ConfigError(
                f"{empty}. Pass a larger --val-fraction, or 0 to train all epochs without one."
            )
        warn(
            f"{empty}, so all of them train, for {reading.epochs} epochs, and the "
            "probabilities are not calibrated. Pass a larger --val-fraction, or more examples."
        )
    elif fraction and targets.ndim == 1:
        _warn_of_single(targets[rows], names)
    return train, validation


def draw_stratified(
    labels: Rows,
    rows: Rows,
    fraction: float,
    generator: np.random.Generator,
    groups: Groups | None = None,
) -> tuple[Rows, Rows]:
    """Divide rows into those kept and those drawn, class by class and never a whole class.

    With groups, `[N]` as the labels, as nearly so as whole groups allow.

    Raises:
        DataError: rows are to be drawn, and all are of one group.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 2])
    >>> _, drawn = draw_stratified(labels, np.arange(7), 0.4, np.random.default_rng(0))
    >>> labels[drawn].tolist()
    [0, 0, 1]
    """
    of_rows = labels[rows]
    if groups is not None and fraction:
        check_groups(groups[rows])
        is_drawn = draw_groups(of_rows, groups[rows], fraction, generator)
        return rows[~is_drawn], rows[is_drawn]
    shuffled = np.lexsort((generator.random(len(rows)), of_rows))
    is_drawn = draw_share(of_rows, fraction, shuffled, spared=1)
    return rows[~is_drawn], rows[is_drawn]


def usual_folds(n_rows: int) -> int:
    """Give the number of folds of so many rows, where none is asked for.

    A classifier of four fifths of few rows is less sure than the one of all: held out by five
    folds they would promise larger sets of labels than are needed (benchmarks/README.md).

    >>> usual_folds(3), usual_folds(2047), usual_folds(2048)
    (3, 10, 5)
    """
    return min(n_rows, _FOLDS_OF_FEW if n_rows < _FEW_ROWS else _FOLDS)


def draw_folds(
    labels: Rows,
    rows: Rows,
    n_folds: int,
    generator: np.random.Generator,
    groups: Groups | None = None,
) -> list[Rows]:
    """Divide rows into folds whose sizes, and sizes within each class, differ by at most one.

    With groups, `[N]` as the labels, they differ by as little as whole groups allow.

    >>> labels = np.array([0, 0, 0, 0, 1, 1])
    >>> folds = draw_folds(labels, np.arange(6), 2, np.random.default_rng(0))
    >>> [labels[fold].tolist() for fold in folds]
    [[0, 0, 1], [0, 0, 1]]
    """
    if groups is not None:
        parts = [1 / n_folds] * n_folds
        fold_of = deal_groups(labels[rows], groups[rows], parts, generator)
        return [np.sort(rows[fold_of == fold]) for fold in range(n_folds)]
    shuffled = np.lexsort((generator.random(len(rows)), labels[rows]))
    return [np.sort(rows[shuffled[fold::n_folds]]) for fold in range(n_folds)]


def labelled_rows(split: Split) -> Rows:
    """List the rows of a split that have a label; the others are left out with one warning."""
    rows = np.flatnonzero(strata_of(targets_of(split)) >= 0).astype(np.int64)
    n_unlabelled = split.n_rows - len(rows)
    if not len(rows):
        raise DataError(
            f"none of the {split.n_rows} rows of split {split.name!r} has a label, so it can "
            "neither train nor evaluate. Extract it with --label-column, or name another split."
        )
    if n_unlabelled:
        warn(
            f"split {split.name!r}: {n_unlabelled} of {split.n_rows} rows have no label and are "
            "left out."
        )
    return rows


def weights_of_rows(split: Split, reading: Reading) -> Floats | None:
    """Give the weights of a split's rows, float64 `[N]`; None where all count alike."""
    stored = None if reading.ignore_weights else split.weights
    return None if stored is None else stored.astype(np.float64)


def _counted(split: Split, reading: Reading) -> Rows:
    """List the labelled rows of a split whose weight is above 0.

    Raises:
        DataError: there is none.
    """
    rows, weights = labelled_rows(split), weights_of_rows(split, reading)
    if weights is None:
        return rows
    kept = rows[weights[rows] > 0]
    if not len(kept):
        raise DataError(
            f"all {len(rows)} labelled rows of split {split.name!r} have weight 0, which leaves "
            "none to train on. Extract other weights with --weight-column, or pass "
            "--ignore-weights."
        )
    return kept


def _of_weights(split: Split, rows: Rows, reading: Reading) -> dict[str, Any]:
    """Sum up the weights of the training rows for the record; nothing where there are none."""
    weights = weights_of_rows(split, reading)
    if weights is None:
        return {}
    left_out = int(((weights == 0) & (np.asarray(split.labels) >= 0)).sum())
    low, high = float(weights[rows].min()), float(weights[rows].max())
    return {"weights": {"min": low, "max": high, "n_left_out": left_out}}


def _eval_split(cache: Cache, asked: str | None) -> str:
    if asked is None:
        return _named(cache, TEST) or _named(cache, VALIDATION) or TRAIN
    others = [name for name in cache.splits if name != TRAIN]
    if asked == TRAIN:
        raise ConfigError(
            f"--eval-split {TRAIN} would evaluate on the rows that are trained on. Pass one "
            f"of {', '.join(others) or 'the other splits (there is none)'}, or leave it out."
        )
    found = asked if asked in cache.splits else _named(cache, split_name(asked))
    if found is None and not others:
        raise ConfigError(
            f"--eval-split {asked} is not in {cache.path}, which has {TRAIN} alone. Leave it out, "
            f"and {HELD_OUT_FRACTION:.0%} of {TRAIN} are held out, or add the split with "
            "llmembed-extract."
        )
    if found is None:
        raise ConfigError.unknown("split", asked, others, "Pass one to --eval-split.")
    return found


def _named(cache: Cache, purpose: str) -> str | None:
    """Find the split of a purpose, whatever it is called."""
    if purpose in cache.splits:
        return purpose
    return next((name for name in cache.splits if split_name(name) == purpose), None)


def _given_validation(cache: Cache, reading: Reading, eval_split: str) -> str | None:
    """Find a validation split that can stand for a share that no `--val-fraction` asks for."""
    name = _named(cache, VALIDATION)
    if not reading.val_fraction or reading.draws or name in {None, eval_split}:
        return None
    known = np.unique(strata_of(targets_of(cache[TRAIN])))
    return name if np.isin(strata_of(targets_of(cache[name])), known[known >= 0]).any() else None


def _learnable(cache: Cache, name: str, trained: Targets, reading: Reading) -> Rows:
    """List the rows of a validation split whose class is trained on: others never score well."""
    split = cache[name]
    rows = _counted(split, reading)
    if trained.ndim == 2:
        return rows
    known = np.isin(np.asarray(split.labels)[rows], trained)
    if not known.all():
        warn(
            f"split {name!r}: {len(rows) - int(known.sum())} of {len(rows)} rows have a class that "
            "no training row has, and are not watched."
        )
    return rows[known]


def _check_classes(labels: Targets, names: Sequence[str]) -> None:
    if labels.ndim == 2:
        check_sets(labels, names)
        return
    present = np.unique(labels)
    if len(present) == 1:
        raise DataError(
            f"all {len(labels)} training rows have the class {names[present[0]]!r}; a classifier "
            "needs at least two. Extract more examples, or check --label-column."
        )


def _warn_of_single(labels: Rows, names: Sequence[str]) -> None:
    single = [names[k] for k in np.flatnonzero(np.bincount(labels) == 1).tolist()]
    if single:
        listed = ", ".join(single[:5]) + (", ..." if len(single) > len(single[:5]) else "")
        warn(
            f"{len(single)} classes have one training example, which a validation share can't "
            f"watch: {listed}."
        )


def same_texts(cache: Cache, shares: Shares) -> tuple[Rows, Rows]:
    """Find the evaluation rows whose text is trained on, by its hash.

    Returns:
        Places in `shares.eval`, ascending, and the first row of the training split with the text of
        each, both int64 `[n]`.
    """
    seen = np.sort(shares.seen)
    known, first = np.unique(cache[shares.train_split].text_hash[seen], return_index=True)
    hashes = cache[shares.eval_split].text_hash[shares.eval]
    found = np.searchsorted(known, hashes).clip(max=len(known) - 1)
    places = np.flatnonzero(known[found] == hashes)
    return places, seen[first[found[places]]]


def _warn_of_shared_texts(cache: Cache, shares: Shares) -> None:
    """Count the evaluation rows whose text is trained on: they flatter the figures."""
    places, trained = same_texts(cache, shares)
    if len(places):
        pairs = zip(shares.eval[places[:MOST_NAMED]], trained, strict=False)
        (row, of_train), *others = pairs
        named = [f"row {row} of {shares.eval_split!r} is row {of_train} of {shares.train_split!r}"]
        named += [f"{row} is {of_train}" for row, of_train in others]
        named += ["..."] * (len(places) > MOST_NAMED)
        warn(
            f"{len(places)} of {len(shares.eval)} evaluation rows have a text that also stands in "
            f"the training rows: {', '.join(named)}. They are evaluated like all others, so the "
            "figures may be too good; remove them from the data set to be sure."
        )


def _warn_of_shared_groups(cache: Cache, shares: Shares) -> None:
    """Count the evaluation rows whose group is trained on, where the data set divides the rows."""
    trained, split = cache[shares.train_split].groups, cache[shares.eval_split]
    if shares.held_out or trained is None or split.groups is None:
        return
    of_rows = split.groups[shares.eval]
    seen = np.isin(of_rows, trained[shares.train])
    if seen.any():
        warn(
            f"{len(np.unique(of_rows[seen]))} groups stand in the training rows and in the "
            f"evaluation rows, in {int(seen.sum())} of {len(seen)} of these. They are evaluated "
            "like all others, so the figures may be too good; divide the data set by groups to be "
            "sure."
        )
