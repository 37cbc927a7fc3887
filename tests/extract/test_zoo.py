"""Every architecture against its own `output_hidden_states`, one text at a time, without pads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from toy_model import toy_texts
from zoo import N_LAYERS, ZOO, Animal, save_animal

from llmembed.common.errors import ExtractionError, ModelError
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.features.extractor import Extractor
from llmembed.extract.features.poolings import POOLINGS

TEXTS = toy_texts(6, longest=14)
REAL_ONLY = [n for n in POOLINGS if POOLINGS[n].home and not POOLINGS[n].reads_pads]
BY_NUMPY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda states: states.mean(axis=0),
    "last": lambda states: states[-1],
    "first": lambda states: states[0],
    "max": lambda states: states.max(axis=0),
    "weighted": lambda states: np.average(states, axis=0, weights=np.arange(1, len(states) + 1)),
}


def extractor(folder: Path, layers: Any, poolings: Any = ("mean",)) -> Extractor:
    recipe = Recipe(model=str(folder), max_length=48, compute_dtype="float32", dtype="float32")
    return Extractor(recipe, layers=layers, poolings=poolings, token_budget=128, device="cpu")


def reference(folder: Path, token_ids: list[list[int]]) -> Iterator[list[np.ndarray]]:
    """All hidden states of each text, float64 `[T, H]` a layer, by transformers alone, eagerly."""
    own_code = None if folder.name == "falcon-alibi" else "eager"  # its two ways differ by 2e-3
    model: Any = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=own_code
    ).eval()
    for row in token_ids:
        ids = torch.tensor([row])
        with torch.inference_mode():
            output = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
            states = list(output.hidden_states)
            if model.config.model_type == "mamba":  # tells block 1, ..., n, and n after the norm
                states = [model.get_input_embeddings()(ids), *states[:-2], states[-1]]
        yield [state[0].double().numpy() for state in states]


def relative_error(feature: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(feature - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=ZOO)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_animal(request.param, tmp_path_factory.mktemp("zoo") / request.param)


def test_every_layer_and_pooling_is_that_of_the_text_alone(folder: Path) -> None:
    """Whatever else is in the batch, float32 features agree with transformers to 1e-5."""
    ours = extractor(folder, range(N_LAYERS + 1), REAL_ONLY)
    token_ids = ours.tokenize(TEXTS).ids
    assert len(set(map(len, token_ids))) > 3
    features = ours.compute(token_ids)
    for row, states in enumerate(reference(folder, token_ids)):
        assert len(states) == N_LAYERS + 1
        for (pooling, layer), feature in features.items():
            assert relative_error(feature[row], BY_NUMPY[pooling](states[layer])) < 1e-5


@pytest.mark.parametrize("layer", [1, 3])
def test_a_cut_model_gives_the_layer_of_the_whole(folder: Path, layer: int) -> None:
    """Blocks above the wanted layer are not loaded, and the final norm does not touch it."""
    cut, whole = extractor(folder, [layer]), extractor(folder, range(N_LAYERS + 1))
    assert len(cut.backbone.blocks) == max(layer, 2 if folder.name == "deberta-v2" else 1)
    expected = whole.features(TEXTS)["mean", layer]
    assert relative_error(cut.features(TEXTS)["mean", layer], expected) < 1e-5


def test_a_model_that_also_sees_gives_its_text_decoder(tmp_path: Path) -> None:
    """Of Gemma 3 with a vision tower as deep as the cut, the blocks of the text are taken."""
    import zoo
    from toy_model import toy_tokenizer

    text = zoo._COMMON | ZOO["gemma3"].settings
    sight = {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={"hidden_size": 16, "intermediate_size": 32, **sight}
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    toy_tokenizer(special_tokens=False).save_pretrained(tmp_path)
    ours = extractor(tmp_path, [1, 2])
    token_ids = ours.tokenize(TEXTS).ids
    features = ours.compute(token_ids)
    assert (ours.backbone.n_layers, ours.backbone.causal) == (N_LAYERS, True)
    for row, states in enumerate(reference(tmp_path, token_ids)):
        for layer in (1, 2):
            expected = states[layer].mean(axis=0)
            assert relative_error(features["mean", layer][row], expected) < 1e-5


def test_layers_that_share_one_block_are_refused(tmp_path: Path) -> None:
    """ALBERT runs one block many times, so its layers have no block of their own."""
    albert = Animal("AlbertConfig", {"embedding_size": 8}, encoder=True)
    save_animal("albert", tmp_path, albert)
    with pytest.raises(ModelError, match=r"is a model of one block run many times \(albert\)"):
        extractor(tmp_path, [1])


def test_a_layer_of_another_width_is_refused(tmp_path: Path) -> None:
    """OPT may project its last hidden state to fewer columns, which one source cannot hold."""
    narrow = Animal(
        "OPTConfig", {"ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False}
    )
    save_animal("opt", tmp_path, narrow)
    with pytest.raises(ExtractionError, match=r"layer 4 is 8 wide, the others 16\. Leave it out"):
        extractor(tmp_path, [2, 4]).features(TEXTS)
    assert extractor(tmp_path, [2, 3]).features(TEXTS)["mean", 3].shape == (6, 16)
