"""What splits are called, and how a share of their rows is drawn, class by class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TRAIN, VALIDATION, TEST = "train", "validation", "test"

_PURPOSES = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev", "eval"),
    TEST: ("test", "testing"),
}
_PURPOSE_OF = {name: purpose for purpose, names in _PURPOSES.items() for name in names}


def split_name(name: str) -> str:
    """Give the usual name of a split; one that has no usual purpose keeps its own.

    >>> split_name("dev"), split_name("Train"), split_name("fold-3")
    ('validation', 'train', 'fold-3')
    """
    return _PURPOSE_OF.get(name.lower(), name)


def draw_share(
    labels: npt.NDArray[np.integer],
    fraction: float,
    shuffled: npt.NDArray[np.int64],
    *,
    least: int = 0,
    spared: int = 0,
) -> npt.NDArray[np.bool_]:
    """Draw a share of the rows, such that each class keeps its share (largest remainders).

    Args:
        labels: class of each row, int `[N]`.
        fraction: of the rows, 0 to 1.
        shuffled: int64 `[N]`, the rows sorted by class, in random order within; the first go.
        least: rows to draw of every class, where the total has room for it.
        spared: rows to leave of every class.

    Returns:
        Whether each row is drawn, bool `[N]`.

    >>> labels = np.array([0, 0, 0, 0, 1, 2])
    >>> draw_share(labels, 0.5, np.arange(6), least=1).tolist()
    [True, False, False, False, True, True]
    >>> draw_share(labels, 0.5, np.arange(6), spared=1).tolist()
    [True, True, True, False, False, False]
    """
    _, of_rows, counts = np.unique(labels, return_inverse=True, return_counts=True)
    ideal, most = counts * fraction, counts - spared
    total = round(float(ideal.sum()))
    if total < least * len(counts):
        least = 0
    quotas = np.clip(np.floor(ideal), least, most).astype(np.int64)
    while quotas.sum() > total:  # what rare classes have at least comes from the largest
        quotas[np.argmax(np.where(quotas > least, quotas - ideal, -np.inf))] -= 1
    missing = np.where(quotas < most, quotas - ideal, np.inf)
    quotas[np.argsort(missing, kind="stable")[: total - quotas.sum()]] += 1
    quotas = np.minimum(quotas, most)
    rank = np.arange(len(labels)) - (np.cumsum(counts) - counts)[of_rows[shuffled]]
    is_drawn = np.zeros(len(labels), dtype=np.bool_)
    is_drawn[shuffled] = rank < quotas[of_rows[shuffled]]
    return is_drawn
