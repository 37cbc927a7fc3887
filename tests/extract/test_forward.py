"""Features against the plain way: one text at a time through Hugging Face, all hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_model import N_LAYERS, toy_texts

from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.features.extractor import Extractor
from llmembed.extract.features.poolings import POOLINGS

pytestmark = pytest.mark.filterwarnings("ignore:.*(cut at 16 tokens|of the lone token)")

ALL_LAYERS = range(N_LAYERS + 1)
REAL_ONLY = [n for n in POOLINGS if POOLINGS[n].home and not POOLINGS[n].reads_pads]
TEXTS = toy_texts(23)


def recipe(folder: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "model": str(folder),
        "max_length": 16,
        "compute_dtype": "float32",
        "dtype": "float32",
    }
    return Recipe(**settings | changes)


def reference(folder: Path, text: str) -> list[np.ndarray]:
    """All hidden states of one text, float64 `[T, H]` a layer, by Hugging Face itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
        ).hidden_states
    return [layer[0].double().numpy() for layer in hidden]


def by_numpy(states: np.ndarray, pooling: str) -> np.ndarray:
    weights = np.arange(1, len(states) + 1)[:, None]
    return {
        "mean": lambda: states.mean(axis=0),
        "last": lambda: states[-1],
        "first": lambda: states[0],
        "max": lambda: states.max(axis=0),
        "weighted": lambda: (weights * states).sum(axis=0) / weights.sum(),
    }[pooling]()


def relative_error(feature: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(feature - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=["llama", "bert"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_features_equal_hugging_face_one_text_at_a_time(folder: Path, budget: int) -> None:
    """Every layer and pooling agrees to 1e-5, whatever else was in the batch."""
    extractor = Extractor(
        recipe(folder), layers=ALL_LAYERS, poolings=REAL_ONLY, token_budget=budget
    )
    features = extractor.features(TEXTS)
    for row, text in enumerate(TEXTS):
        for layer, states in enumerate(reference(folder, text)):
            for pooling in REAL_ONLY:
                expected = by_numpy(states, pooling)
                assert relative_error(features[pooling, layer][row], expected) < 1e-5


def test_the_paper_s_mean_equals_hugging_face_padded_to_max_length(folder: Path) -> None:
    """`mean_padded` is the mean over max_length positions of a padded, masked forward pass."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(
        TEXTS, truncation=True, max_length=16, padding="max_length", return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
        ).hidden_states
    features = Extractor(
        recipe(folder), layers=ALL_LAYERS, poolings=["mean_padded"], token_budget=64
    ).features(TEXTS)
    for layer in ALL_LAYERS:
        expected = hidden[layer].double().mean(dim=1).numpy()
        assert relative_error(features["mean_padded", layer], expected) < 1e-5


def test_the_pooler_is_the_model_s_own(bert: Path) -> None:
    """BERT's pooled output is stored at the last layer, beside other poolings."""
    extractor = Extractor(recipe(bert), layers=[1, N_LAYERS], poolings=["mean", "pooler"])
    features = extractor.features(TEXTS[:1])
    assert set(features) == {("mean", 1), ("mean", 3), ("pooler", 3)}
    model = transformers.AutoModel.from_pretrained(bert).eval()
    inputs = extractor.recipe.tokenizer(TEXTS[0], truncation=True, max_length=16)
    with torch.inference_mode():
        expected = model(torch.tensor([inputs["input_ids"]])).pooler_output
    assert relative_error(features["pooler", 3], expected.numpy()) < 1e-5


@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_a_cut_model_gives_what_the_whole_gives(folder: Path, layer: int) -> None:
    """Asking for one layer loads no block above it and changes no value."""
    cut = Extractor(recipe(folder), layers=[layer], poolings=["mean"])
    whole = Extractor(recipe(folder), layers=ALL_LAYERS, poolings=["mean"])
    assert len(cut.backbone.blocks) == max(layer, 1)
    np.testing.assert_array_equal(
        cut.features(TEXTS)["mean", layer], whole.features(TEXTS)["mean", layer]
    )


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(len(TEXTS))), budget=st.integers(1, 400))
def test_batch_order_and_composition_do_not_change_a_feature(
    folder: Path, order: list[int], budget: int
) -> None:
    """Any order of the texts and any budget gives each text the same feature to 1e-5."""
    extractor = Extractor(
        recipe(folder), layers=ALL_LAYERS, poolings=REAL_ONLY, token_budget=budget
    )
    shuffled = extractor.features([TEXTS[index] for index in order])
    extractor.token_budget = 1
    for name, alone in extractor.features(TEXTS).items():
        assert relative_error(shuffled[name], alone[order]) < 1e-5


def test_a_template_surrounds_the_text(llama: Path) -> None:
    """With a template a text gets the feature of the filled template."""
    plain = Extractor(recipe(llama), layers=[2], poolings=["mean"])
    framed = Extractor(recipe(llama, template="w1 {text} w2"), layers=[2], poolings=["mean"])
    np.testing.assert_array_equal(
        framed.features(["w5 w6"])["mean", 2], plain.features(["w1 w5 w6 w2"])["mean", 2]
    )


def test_an_empty_text_gets_the_feature_of_the_begin_token(llama: Path) -> None:
    """A text without tokens is computed as the lone begin-of-text token, and counted."""
    extractor = Extractor(recipe(llama), layers=[2], poolings=["mean"])
    tokenized = extractor.tokenize(["", "w1"])
    assert tokenized.ids == [[2], [6]]
    assert tokenized.n_empty == 1
    np.testing.assert_array_equal(
        extractor.features([""])["mean", 2], extractor.features(["[CLS]"])["mean", 2]
    )


def test_truncated_texts_are_counted(llama: Path) -> None:
    """A text longer than max_length is cut there and counted; one of that length is not."""
    extractor = Extractor(recipe(llama, max_length=4), layers=[1], poolings=["mean"])
    tokenized = extractor.tokenize(["w1 w2 w3 w4", "w1 w2 w3 w4 w5"])
    assert [len(ids) for ids in tokenized.ids] == [4, 4]
    assert tokenized.n_truncated == 1
