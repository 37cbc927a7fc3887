"""bfloat16 weights multiplied in float32, on CPUs that are faster at it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from zoo import ZOO, save_animal

from llmembed.extract.fast.cpu import multiply_in_float32


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    return transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()


def blocks_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


@pytest.fixture(scope="module", params=ZOO)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_animal(request.param, tmp_path_factory.mktemp("zoo") / request.param)


def test_it_computes_what_float32_does_with_weights_rounded_to_bfloat16(folder: Path) -> None:
    """Nothing but the weights is rounded: every hidden state has the same bits."""
    token_ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    rounded = load(folder, torch.bfloat16).float()
    model = load(folder, torch.bfloat16)
    multiply_in_float32(model, blocks_of(model))
    with torch.inference_mode():
        expected = rounded(token_ids, output_hidden_states=True).hidden_states
        for _ in range(2):
            states = model(token_ids, output_hidden_states=True).hidden_states
            assert all(map(torch.equal, states, expected))


def test_weights_rest_in_bfloat16(folder: Path) -> None:
    """Before, after, and when memory runs out, blocks and token embeddings are in bfloat16."""
    model = load(folder, torch.bfloat16)
    large = torch.nn.ModuleList([blocks_of(model), model.get_input_embeddings()])
    before = {name: weight.clone() for name, weight in large.state_dict().items()}
    multiply_in_float32(model, blocks_of(model))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    handle = next(iter(blocks_of(model)[1].children())).register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError), torch.inference_mode():
        model(torch.tensor([[5, 6]]))
    handle.remove()
    for name, weight in large.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, before[name])
