"""Packed passes on a device that is not there: tensors on `meta` have shapes, no values.

What would wait for a value of the device (`item`, a condition, a mask as an index, a copy to the
host) is an error there, and every byte that a pass allocates can be counted. Fake tensors, which
say that they lie on `cuda`, need a torch built for CUDA, and transformers asks them less.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import N_LAYERS, ZOO, Animal

from llmembed.extract.backbones.load import Backbone, tap
from llmembed.extract.fast.attention import use_packing
from llmembed.extract.features.forward import Tokenized
from llmembed.extract.features.packing import packed_hidden_states
from llmembed.extract.features.poolings import POOLINGS

MODELS = {
    name: ZOO[name]
    for name in ("llama", "mistral", "mistral-window", "gemma", "gemma3", "bert", "modernbert")
} | {"llama-mha": Animal("LlamaConfig", {"num_key_value_heads": 2})}
SKEWED = [2048] + [12] * 1000
EVEN = [12] * (sum(SKEWED) // 12)
REAL_ONLY = [n for n in POOLINGS if POOLINGS[n].home and not POOLINGS[n].reads_pads]


class Counting(TorchDispatchMode):
    """Counts the bytes that are allocated, and names the kernels that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes, self.kernels = 0, set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.kernels.add(str(func))
        for tensor in made:
            if tensor.untyped_storage()._cdata not in known:
                self.n_bytes += tensor.untyped_storage().nbytes()
        return found


def backbone(animal: Animal) -> Backbone:
    config = getattr(transformers, animal.config)(
        **zoo._COMMON | {"max_position_embeddings": 4096} | animal.settings
    )
    with torch.device("meta"):
        model: Any = transformers.AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    tap(blocks, N_LAYERS)
    use_packing(model)
    return Backbone(
        model=model,
        blocks=blocks,
        n_layers=N_LAYERS,
        hidden_size=16,
        causal=not animal.encoder,
        device=torch.device("meta"),
        compute_dtype=torch.bfloat16,
        quantize=None,
        widens=False,
        shareable=False,
        first_position=0,
    )


def traced(ours: Backbone, lengths: list[int]) -> Counting:
    texts = Tokenized(ids=[[5] * length for length in lengths])
    with Counting() as counted:
        pooled = packed_hidden_states(ours, texts, range(N_LAYERS + 1), REAL_ONLY)
    assert {feature.shape for feature in pooled.values()} == {(len(lengths), 16)}
    assert {feature.device.type for feature in pooled.values()} == {"meta"}
    return counted


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_pass_waits_for_nothing_and_is_linear_in_its_tokens(name: str) -> None:
    """By the kernel for CUDA: one long text among 1,000 short ones costs what its tokens cost."""
    ours = backbone(MODELS[name])
    skewed, even = traced(ours, SKEWED), traced(ours, EVEN)
    assert "torch_attn._varlen_attn.default" in skewed.kernels
    assert skewed.n_bytes < 1.5 * even.n_bytes
