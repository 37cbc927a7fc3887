"""Prompts behind a text: their names, and that each is computed as if it stood there alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from toy_model import toy_texts
from zoo import N_LAYERS, ZOO, save_animal

from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.features.extractor import Extractor
from llmembed.extract.texts.prompts import (
    pooling_of,
    resolve_prompts,
)

TEXTS = ["", *toy_texts(9, longest=14)]
PROMPTS = resolve_prompts(["w3 w4", "w3 w5 w6", "w7 w8", "w3 w4 w9 w10"])
NOT_SHARED = {  # what meets elsewhere than in full attention, or attends by code of its own
    *("mistral-window", "qwen2-window", "qwen3-next", "gemma2", "gemma3", "gpt-oss", "llama4"),
    *("falcon", "falcon-alibi", "bloom", "cohere2", "mamba"),
}
CAUSAL = [name for name in ZOO if not ZOO[name].encoder and name != "llama-bidirectional"]
BOTH_WAYS = [name for name in ZOO if name not in CAUSAL]


def extractor(folder: Path, **changes: Any) -> Extractor:
    recipe = {"max_length": 12, "compute_dtype": "float32", "dtype": "float32"}
    recipe |= {name: changes.pop(name) for name in [*changes] if name in recipe}
    options: dict[str, Any] = {
        "layers": range(N_LAYERS + 1),
        "poolings": ["mean", "last", *map(pooling_of, PROMPTS)],
        "prompts": PROMPTS,
        "token_budget": 96,
        "device": "cpu",
    }
    return Extractor(Recipe(model=str(folder), **recipe), **options | changes)


def last_states(folder: Path, rows: list[list[int]]) -> list[list[np.ndarray]]:
    """Hidden states of each row's last token, alone, `[H]` a layer, by transformers, eagerly."""
    own_code = None if folder.name == "falcon-alibi" else "eager"  # its two ways differ by 2e-3
    model: Any = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=own_code
    ).eval()
    found = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.inference_mode():
            output = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
            states = list(output.hidden_states)
            if model.config.model_type == "mamba":  # tells block 1, ..., n, and n after the norm
                states = [model.get_input_embeddings()(ids), *states[:-2], states[-1]]
        found.append([state[0, -1].double().numpy() for state in states])
    return found


def relative_error(feature: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(feature - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("animal", CAUSAL)
def test_a_prompt_is_that_of_the_text_with_it_alone(animal: str, tmp_path: Path) -> None:
    """Of every causal architecture, each prompt's features agree with transformers to 1e-5."""
    folder = save_animal(animal, tmp_path / animal)
    ours = extractor(folder)
    assert ours.way.prompts_share == (animal not in NOT_SHARED)
    tokenized = ours.tokenize(TEXTS)
    rows, features = tokenized.ids, ours.compute(tokenized)
    assert tokenized.n_truncated, "a text that is cut keeps its prompt"
    for name, prompt in PROMPTS.items():
        suffix = ours.recipe.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        expected = last_states(folder, [[*row, *suffix] for row in rows])
        for row, states in enumerate(expected):
            for layer, state in enumerate(states):
                feature = features[pooling_of(name), layer][row]
                assert relative_error(feature, state) < 1e-5, (prompt, layer, row)
