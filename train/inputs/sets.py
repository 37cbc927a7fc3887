"""Texts of several labels: what a fit is given of them, and what it cannot be fitted to.

Shares and folds are stratified by the rarest label of each row, a text without labels being of a
class of its own: the simple form of iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On
the stratification of multi-label data", 2011). Common labels divide evenly by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import Split
from llmembed.common.errors import ConfigError, DataError, listed, warn
from llmembed.train.config import Method
from llmembed.train.fusions import AUTO, HEADS

Targets = npt.NDArray[np.int64]
"""int64 `[N]`, classes, or `[N, C]`, 1 for the labels of a text; -1 where nothing is known."""


def targets_of(split: Split) -> Targets:
    """Give the labels of a split, one a text or several."""
    return np.asarray(split.labels if split.label_sets is None else split.label_sets, np.int64)


def strata_of(targets: Targets, rows: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
    """Give the class that each row counts as where rows are shared out, int64 `[N]`.

    Of several labels it is the rarest among those rows, None being all.

    >>> strata_of(np.array([[1, 0], [1, 1], [0, 0], [-1, -1]])).tolist()
    [0, 1, 2, -1]
    """
    if targets.ndim == 1:
        return targets
    counts = (targets[slice(None) if rows is None else rows] > 0).sum(axis=0)
    rarity = np.where(targets > 0, counts, len(targets) + 1)
    strata = np.where((targets > 0).any(axis=1), rarity.argmin(axis=1), targets.shape[1])
    return np.where((targets < 0).any(axis=1), -1, strata)


def check_sets(targets: Targets, names: Sequence[str]) -> None:
    """Refuse labels that no row has, and name those that say nothing.

    Args:
        targets: `[n, C]`, of the training rows.
        names: of the C labels.

    Raises:
        DataError: no row has a label.
    """
    n_rows, counts = len(targets), (targets > 0).sum(axis=0)
    if not counts.any():
        raise DataError(
            f"none of the {n_rows} training rows has any of the {len(names)} labels, so there is "
            "nothing to learn. Extract more examples, or check --label-column."
        )
    for n, said in ((0, "no training row and is never given"), (n_rows, "every training row")):
        found = [name for name, count in zip(names, counts, strict=True) if count == n]
        if found:
            warn(
                f"{len(found)} of {len(names)} labels: {listed(found)}; each stands at {said}, so "
                "nothing is learned of it."
            )


def weights_of_sets(class_weight: object) -> ConfigError:
    """Make the error for weights of classes, where a text may have several labels."""
    return ConfigError(
        f"class_weight {class_weight!r} would weigh texts by their one class, and here a text may "
        "have several labels, whose thresholds do what weights would. Leave it out."
    )


def check_method(method: Method, *, multilabel: bool) -> None:
    """Refuse what is not for the number of labels that a text may have.

    Raises:
        ConfigError: a threshold where each text has one label; a head or recipe that says which one
            where it may have several.
    """
    if not multilabel:
        if method.threshold is not None:
            raise ConfigError(
                f"--threshold {method.threshold:g} would do nothing: in {method.cache} each text "
                "has one label, which is the likeliest. Leave it out."
            )
        return
    if method.head != AUTO and (method.head == "lda" or HEADS[method.head].gives_probabilities):
        raise ConfigError(
            f"head {method.head!r} tells which one of all labels a text has, and in {method.cache} "
            "it may have several. Pass --head ridge, linear, mlp or auto"
            + (", and no --preset." if method.head == "paper" else ".")
        )
