"""What splits are called: one name for each purpose, whatever a data set calls it."""

from __future__ import annotations

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
