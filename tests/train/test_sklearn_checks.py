from __future__ import annotations

from typing import Any

from number_classifier import NumberClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from llmembed.train import LLMEmbedClassifier

NOT_APPLICABLE = {
    "check_sample_weight_equivalence_on_dense_data": "a text is in one fold whatever its weight, "
    "copies of it are in several, so other strengths and temperatures are chosen; with both given, "
    "weights equal copies (test_weights.py)",
    "check_array_api_input": "texts are no arrays of numbers, so the array API is not served",
}
"""Checks of scikit-learn that the classifier doesn't pass, with the reason."""


@parametrize_with_checks(
    [
        NumberClassifier("none", 1, fusion="concat", head="ridge", accelerator="cpu"),
        NumberClassifier("none", 1, fusion="cooc", epochs=2, accelerator="cpu"),
    ],
    expected_failed_checks=lambda _: NOT_APPLICABLE,
)
def test_the_checks_of_scikit_learn(estimator: NumberClassifier, check: Any) -> None:
    """Solved or by gradient, a classifier of written numbers passes all checks but those listed."""
    check(estimator)


def test_texts_are_what_the_classifier_says_that_it_takes() -> None:
    """Its tags name a list of strings, so scikit-learn itself would skip all but one check."""
    tags = LLMEmbedClassifier().__sklearn_tags__()
    assert tags.input_tags.string
    assert not tags.input_tags.two_d_array
    assert tags.classifier_tags.multi_class
    assert tags.target_tags.required
