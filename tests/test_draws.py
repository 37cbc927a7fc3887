"""Which rows are drawn: what caches and runs of earlier versions hold must be drawn again."""

from __future__ import annotations

import numpy as np
import pytest

from llmembed.common.splits import draw_share
from llmembed.extract.texts.corpora import stratified_rows
from llmembed.train.inputs.shares import draw_stratified

LABELS = np.arange(60) ** 2 % 7  # 9, 17, 17 and 17 rows of the classes 0, 1, 2 and 4


def test_a_limit_draws_the_rows_it_always_drew() -> None:
    """A cache that was made with --limit can be resumed and added to."""
    expected = [5, 7, 10, 13, 23, 24, 27, 28, 43, 53, 54, 55, 59]
    assert stratified_rows(LABELS.astype(np.int32), 13, seed=5).tolist() == expected


def test_a_share_of_the_rows_is_the_one_it_always_was() -> None:
    """A fit of the same seed watches the same rows."""
    _, drawn = draw_stratified(LABELS, np.arange(60), 0.2, np.random.default_rng(5))
    assert drawn.tolist() == [4, 7, 8, 19, 23, 26, 29, 31, 38, 42, 48, 50]


@pytest.mark.parametrize(("least", "spared"), [(1, 0), (0, 1)])
def test_rare_classes_are_drawn_or_spared(least: int, spared: int) -> None:
    """Each class has a row at least among those drawn, or among those that are left."""
    labels = np.array([0] * 20 + [1, 2])
    drawn = draw_share(labels, 0.5, np.arange(22), least=least, spared=spared)
    assert np.bincount(labels[drawn if least else ~drawn]).min() == 1
    assert drawn.sum() == 11
