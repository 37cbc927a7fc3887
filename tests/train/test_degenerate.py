"""Training sets that leave a classifier little to go by: what comes out is finite and sensible."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from degenerate import TinySet, any_sets, identical, one_row_a_class, separable_sets, two_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmembed.cache_format.errors import ConfigError, LLMEmbedWarning
from llmembed.train import FitConfig
from llmembed.train.config import FIXED_FUSIONS, LEARNED_FUSIONS
from llmembed.train.data import data_in_memory
from llmembed.train.fitting import Outcome, train
from llmembed.train.select import Feature

HEADS = {fusion: ("ridge", "lda", "linear", "auto") for fusion in FIXED_FUSIONS}
BY_GRADIENT = [
    *((fusion, head) for fusion in LEARNED_FUSIONS for head in ("linear", "mlp")),
    *((fusion, "mlp") for fusion in FIXED_FUSIONS),
]
TINY = st.one_of(separable_sets(), any_sets())
OPTIONS = st.fixed_dictionaries(
    {
        "class_weight": st.sampled_from(["none", "balanced"]),
        "calibrate": st.sampled_from(["temperature", "none"]),
        "n_seeds": st.sampled_from([1, 2]),
        "seed": st.integers(0, 3),
    }
)
# A few in the suite, and all that another profile asks for: --hypothesis-profile=thousand.
FEW = settings(
    deadline=None, max_examples=8 if settings().max_examples == 100 else settings().max_examples
)


def fit_tiny(tiny: TinySet, **options: Any) -> tuple[Outcome, list[Tensor]]:
    """Fit, and give the probabilities of the training rows by each seed's classifier."""
    n_layers = 1 if options["fusion"] == "single" else tiny.x.shape[1]
    x = torch.from_numpy(tiny.x[:, :n_layers].reshape(len(tiny.y), -1).copy())
    features = [Feature("toy", "mean", layer, tiny.x.shape[2]) for layer in range(n_layers)]
    names = [f"class {k}" for k in range(tiny.n_classes)]
    config = FitConfig(cache="memory", accelerator="cpu", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LLMEmbedWarning)
        data = data_in_memory(config, x.clone(), tiny.y, names, features)
        outcome = train(config, data)
    layers = [feature.layer for feature in outcome.data.features]
    stored = torch.unflatten(x, 1, (n_layers, -1))[:, layers].flatten(1)
    with torch.inference_mode():
        logits = [one.classifier(stored).double() for one in outcome.trained]
    return outcome, [one.softmax(dim=1) for one in logits]


def check(tiny: TinySet, **options: Any) -> None:
    """Probabilities are finite and sum to 1, and those of separable rows are right."""
    outcome, probas = fit_tiny(tiny, **options)
    for trained, proba in zip(outcome.trained, probas, strict=True):
        assert proba.isfinite().all()
        torch.testing.assert_close(proba.sum(dim=1), torch.ones(len(proba), dtype=torch.float64))
        assert trained.val_loss is None or np.isfinite(trained.val_loss)
        if tiny.is_separable:
            assert proba.argmax(dim=1).tolist() == tiny.y.tolist()


@pytest.mark.parametrize("fusion", FIXED_FUSIONS)
@FEW
@given(tiny=TINY, options=OPTIONS, folds=st.sampled_from([0, 2, 3]), data=st.data())
def test_solved_heads_on_tiny_sets(
    fusion: str, tiny: TinySet, options: dict[str, Any], folds: int, data: st.DataObject
) -> None:
    """Whatever the rows, probabilities are finite and sum to 1; separable rows are right."""
    options |= {"fusion": fusion, "head": data.draw(st.sampled_from(HEADS[fusion]))}
    if folds > len(tiny.y):
        with pytest.raises(ConfigError, match=f"can't be divided into {folds} folds"):
            fit_tiny(tiny, folds=folds, **options)
    else:
        check(tiny, folds=folds, **options)


@FEW
@given(tiny=TINY, options=OPTIONS, case=st.sampled_from(BY_GRADIENT), data=st.data())
def test_heads_by_gradient_on_tiny_sets(
    tiny: TinySet, options: dict[str, Any], case: tuple[str, str], data: st.DataObject
) -> None:
    """Probabilities are finite and sum to 1; separable rows are right if all are trained on."""
    fusion, head = case
    options |= {"fusion": fusion, "head": head, "epochs": 40, "lr": 0.01}
    options["val_fraction"] = data.draw(st.sampled_from([0, None, 0.4]))
    if options["val_fraction"] != 0:
        tiny = dataclasses.replace(tiny, is_separable=False)
    try:
        check(tiny, **options)
    except ConfigError as error:
        assert "a validation share of 0" in str(error)  # is empty
