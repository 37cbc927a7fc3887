"""Which rows train, which stop the training early, and which only give the final figures.

Early stopping watches a stratified share of the training split, drawn once from the seed, so that
several seeds are compared on the same rows; or the validation split, where there is one beside the
split that is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import Cache, Split
from llmembed.common.errors import ConfigError, DataError, warn
from llmembed.common.splits import TEST, TRAIN, VALIDATION, draw_share, split_name
from llmembed.train.config import Reading

HELD_OUT_FRACTION = 0.1

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

    @property
    def held_out(self) -> bool:
        """Whether the evaluation rows were held out of the training split."""
        return self.eval_split == self.train_split

    def record(self) -> dict[str, dict[str, str | int]]:
        """Say which rows were called what."""
        held_out = f" ({HELD_OUT_FRACTION:.0%} held out)" if self.held_out else ""
        return {
            "train": {"split": self.train_split, "n": len(self.train)},
            "validation": {
                "split": self.validation_split or self.train_split,
                "n": len(self.validation),
            },
            "eval": {"split": self.eval_split + held_out, "n": len(self.eval)},
        }


def choose_shares(cache: Cache, reading: Reading) -> Shares:
    """Divide the labelled rows of a cache.

    Raises:
        ConfigError: a split is unknown, or the validation share would be empty.
        DataError: the training rows have no label, or only one class.
    """
    if TRAIN not in cache.splits:
        raise ConfigError.unknown("split", TRAIN, cache.splits, "A fit trains on it.")
    split = cache[TRAIN]
    labels, train = np.asarray(split.labels, dtype=np.int64), labelled_rows(split)
    generator = np.random.default_rng(reading.seed)
    eval_split = _eval_split(cache, reading.eval_split)
    if eval_split == TRAIN:
        train, held_out = draw_stratified(labels, train, HELD_OUT_FRACTION, generator)
    else:
        held_out = labelled_rows(cache[eval_split])
    validation_split = _given_validation(cache, reading, eval_split)
    if validation_split is None:
        train, validation = draw_validation(labels, train, cache.labels, reading, generator)
    else:
        _check_classes(labels[train], cache.labels)
        validation = split.n_rows + _learnable(cache, validation_split, labels[train])
    shares = Shares(
        train=train,
        validation=validation,
        eval=held_out,
        train_split=TRAIN,
        eval_split=eval_split,
        validation_split=validation_split,
    )
    _warn_of_shared_texts(cache, shares)
    return shares


def draw_validation(
    labels: Rows,
    rows: Rows,
    names: Sequence[str],
    reading: Reading,
    generator: np.random.Generator,
) -> tuple[Rows, Rows]:
    """Divide rows, int64 `[n]`, into those trained on and those that early stopping watches.

    Few rows have no share to spare: unless one is asked for, all of them train, with one warning.

    Raises:
        ConfigError: the validation share that is asked for would be empty.
        DataError: there is only one class.
    """
    _check_classes(labels[rows], names)
    fraction = reading.val_fraction
    train, validation = draw_stratified(labels, rows, fraction, generator)
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
    elif fraction:
        _warn_of_single(labels[rows], names)
    return train, validation


def draw_stratified(
    labels: Rows, rows: Rows, fraction: float, generator: np.random.Generator
) -> tuple[Rows, Rows]:
    """Divide rows into those kept and those drawn, class by class and never a whole class.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 2])
    >>> _, drawn = draw_stratified(labels, np.arange(7), 0.4, np.random.default_rng(0))
    >>> labels[drawn].tolist()
    [0, 0, 1]
    """
    of_rows = labels[rows]
    shuffled = np.lexsort((generator.random(len(rows)), of_rows))
    is_drawn = draw_share(of_rows, fraction, shuffled, spared=1)
    return rows[~is_drawn], rows[is_drawn]


def draw_folds(
    labels: Rows, rows: Rows, n_folds: int, generator: np.random.Generator
) -> list[Rows]:
    """Divide rows into folds whose sizes, and sizes within each class, differ by at most one.

    >>> labels = np.array([0, 0, 0, 0, 1, 1])
    >>> folds = draw_folds(labels, np.arange(6), 2, np.random.default_rng(0))
    >>> [labels[fold].tolist() for fold in folds]
    [[0, 0, 1], [0, 0, 1]]
    """
    shuffled = np.lexsort((generator.random(len(rows)), labels[rows]))
    return [np.sort(rows[shuffled[fold::n_folds]]) for fold in range(n_folds)]


def labelled_rows(split: Split) -> Rows:
    """List the rows of a split that have a label; the others are left out with one warning."""
    rows = np.flatnonzero(np.asarray(split.labels) >= 0).astype(np.int64)
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
    known = np.unique(cache[TRAIN].labels)
    return name if np.isin(cache[name].labels, known[known >= 0]).any() else None


def _learnable(cache: Cache, name: str, trained: Rows) -> Rows:
    """List the rows of a validation split whose class is trained on: others never score well."""
    split = cache[name]
    rows = labelled_rows(split)
    known = np.isin(np.asarray(split.labels)[rows], trained)
    if not known.all():
        warn(
            f"split {name!r}: {len(rows) - int(known.sum())} of {len(rows)} rows have a class that "
            "no training row has, and are not watched."
        )
    return rows[known]


def _check_classes(labels: Rows, names: Sequence[str]) -> None:
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


def _warn_of_shared_texts(cache: Cache, shares: Shares) -> None:
    """Count the evaluation rows whose text is trained on: they flatter the figures."""
    given = shares.validation_split is not None
    trained = shares.train if given else np.concatenate([shares.train, shares.validation])
    seen = cache[shares.train_split].text_hash[trained]
    n_shared = int(np.isin(cache[shares.eval_split].text_hash[shares.eval], seen).sum())
    if n_shared:
        warn(
            f"{n_shared} of {len(shares.eval)} evaluation rows have a text that also stands in "
            "the training rows. They are evaluated like all others, so the figures may be too "
            "good; remove them from the data set to be sure."
        )
