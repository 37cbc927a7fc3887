"""The classifier on numbers, for scikit-learn's checks, which know no texts.

A row of numbers is written as a text, and the stand-in for the backbone reads the numbers back from
it: all else, from the door for texts to the heads, is the classifier's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted, validate_data

from llmembed.train import LLMEmbedClassifier


class WrittenNumbers:
    """Gives the numbers that stand in texts as features of one layer."""

    def __init__(self, n_columns: int) -> None:
        self.source, self.hidden_size, self.arrays = "numbers", n_columns, [("mean", 1)]

    def in_blocks(self, texts: Sequence[str]) -> Iterator[dict[tuple[str, int], np.ndarray]]:
        rows = [[float(word) for word in text.split()] for text in texts]
        yield {("mean", 1): np.array(rows, dtype=np.float32)}


class NumberClassifier(LLMEmbedClassifier):
    """Takes numbers `[N, K]`."""

    def fit(
        self,
        X: Any,  # noqa: N803
        y: Any,
        sample_weight: Any = None,
        groups: Any = None,
    ) -> Self:
        return super().fit(self._written(X, reset=True), y, sample_weight, groups)

    def _scores(self, X: Any) -> Any:  # noqa: N803
        check_is_fitted(self)
        return super()._scores(self._written(X, reset=False))

    def _text_features(self, labels: Sequence[str]) -> Any:
        return WrittenNumbers(self.n_features_in_)

    def _written(self, X: Any, *, reset: bool) -> list[str]:  # noqa: N803
        numbers = validate_data(self, X, reset=reset, dtype=np.float64)
        return [" ".join(map(repr, row)) for row in numbers.tolist()]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = False
        tags.input_tags.two_d_array, tags.no_validation = True, False
        return tags
