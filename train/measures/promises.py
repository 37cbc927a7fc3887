"""What held-out rows promise of one classifier; what they can't is refused in a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmembed.common.errors import ConfigError, warn
from llmembed.train.measures.doubt import (
    Bools,
    HeldOutRows,
    abstain_below,
    check_share,
    label_sets,
    largest_accuracy,
    rounded_down,
    rows_for_accuracy,
    rows_kept,
)
from llmembed.train.measures.metrics import Floats, Labels


@dataclass(frozen=True, kw_only=True)
class Promises:
    """The rules of `doubt`, for one classifier and in the words of who asks."""

    held_out: HeldOutRows
    """What the classifier said of rows held out of its training."""
    n_classes: int
    """C."""
    who: str
    """What the classifier is called: the run runs/r8-auto-0."""
    option: str
    """What asks for the promise: --abstain."""
    way: str
    """What holds more rows out: fit on more rows."""

    def abstain_below(self, accuracy: float) -> float:
        """Find the probability below which to abstain, so that answers are right with this share.

        Raises:
            ConfigError: `accuracy` is not between 0 and 1, or the held-out rows do not reach it.
        """
        meaning = "the share of answers that are to be right"
        accuracy = check_share(accuracy, self.option, meaning)
        found = abstain_below(self.held_out, accuracy)
        if found is None:
            n_rows, most = len(self.held_out.right), largest_accuracy(self.held_out)
            reached = f"{most:g} at most" if most else "too little for any share"
            needed = rows_for_accuracy(accuracy)
            few = f", and {accuracy:g} takes {needed:,} rows or more" if n_rows < needed else ""
            remedy = f"Pass a smaller share, or {self.way}" if most else self.way.capitalize()
            raise ConfigError(
                f"{self.option} {accuracy:g} is more than {self.who} reaches: of the rows "
                f"held out of its training it has {self.held_out.right.sum():,} of {n_rows:,} "
                f"right, and the surest of them show {reached}{few}. {remedy}."
            )
        return found

    def label_sets(self, proba: Floats, coverage: float, *, by_class: bool) -> Bools:
        """Say which labels are in the set of each row of probabilities `[N, C]`, bool `[N, C]`.

        A warning counts classes that are in every set for want of held-out rows, `by_class`.

        Raises:
            ConfigError: as `check_sets` does.
        """
        coverage = self.check_sets(coverage, by_class=by_class)
        few = [n for n in self._counts.tolist() if n < rows_kept(n, coverage)]
        if by_class and few:
            warn(
                f"{len(few)} of {self.n_classes} classes have too few held-out rows for "
                f"{self.option} {coverage:g} by class, and so are in every set. Pass a smaller "
                "share, or --conformal-by all, in Python by_class=False."
            )
        return label_sets(self.held_out, proba, coverage, by_class=by_class)

    def check_sets(self, coverage: float, *, by_class: bool) -> float:
        """Give a coverage as a plain number, and refuse one that the held-out rows can't show.

        Raises:
            ConfigError: `coverage` is not between 0 and 1, or there are too few held-out rows.
        """
        meaning = "the share of sets that are to hold the right label"
        coverage = check_share(coverage, self.option, meaning)
        n = len(self.held_out.label)
        most = int(self._counts.max()) if by_class else n
        if rows_kept(most, coverage) > most:
            of = "any class, by class" if by_class else "all classes"
            largest = f", of which {most:,} of one class" if by_class else ""
            reached = f"{largest}, which reach {rounded_down(most / (most + 1)):g} at most"
            needed = math.ceil(round(coverage / (1 - coverage), 6))
            raise ConfigError(
                f"{self.option} {coverage:g} takes {needed:,} "
                f"held-out rows, and {self.who} keeps fewer of {of}: {n:,} in all"
                f"{reached}. Pass a smaller share, or {self.way}."
            )
        return coverage

    @property
    def _counts(self) -> Labels:
        """Held-out rows of each class, int64 `[C]`."""
        return np.bincount(self.held_out.label, minlength=self.n_classes)
