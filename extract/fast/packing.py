"""Texts packed behind each other, and blocks compiled: for GPUs, where both pay.

A packed pass computes no pad. It is used where a trial shows that the model keeps the texts apart:
one that ignores where texts begin, or carries a state from token to token, lets them leak into each
other without an error. A compiled block fuses everything between its products; it is compiled once
for all blocks of a model and for each number of positions, so there are few of those.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from llmembed.common.errors import LLMEmbedWarning
from llmembed.extract.backbones.load import Backbone
from llmembed.extract.fast.attention import attends_by_sdpa, use_packing
from llmembed.extract.features.forward import (
    model_inputs,
    packed_hidden_states,
    pooled_hidden_states,
)
from llmembed.extract.features.selfcheck import allowed, arithmetic

_TRIAL = ((1, 2, 3, 4, 5, 6, 7), (5, 3), (7, 6, 5, 4))
"""Token ids of three texts."""
_SHARES = (8, 4, 2, 1)
"""A compiled pass has the budget's positions, or this part of it."""


def try_packing(backbone: Backbone, max_length: int) -> bool:
    """Let the model run packed texts, if it gives the same for them as for each alone.

    Args:
        backbone: its attention is changed where the answer is yes.
        max_length: tokens of the longest text to come.

    Returns:
        Whether it does.
    """
    if not attends_by_sdpa(backbone.model) or _narrowest_window(backbone) < 2 * max_length:
        return False
    use_packing(backbone.model)
    try:
        if _agrees(backbone):
            return True
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError):
        pass  # this architecture, kernel or card does not take packed texts
    model: Any = backbone.model
    model.set_attn_implementation("sdpa")
    return False


def _agrees(backbone: Backbone) -> bool:
    layers, device = [len(backbone.blocks)], backbone.device
    packed = packed_hidden_states(backbone, _TRIAL, layers, ["mean"])
    (feature,) = packed.values()
    for row, ids in enumerate(_TRIAL):
        alone = pooled_hidden_states(
            backbone,
            torch.tensor([ids], device=device),
            torch.tensor([len(ids)], device=device),
            layers,
            ["mean"],
        )
        (expected,) = alone.values()
        difference = float((feature[row] - expected[0]).norm() / expected.norm())
        kind = arithmetic(backbone.compute_dtype, backbone.quantize)
        if not difference <= allowed(kind, "mean"):
            return False
    return True


def _narrowest_window(backbone: Backbone) -> float:
    config: Any = backbone.model.config
    windows = [getattr(config, name, None) for name in ("sliding_window", "local_attention")]
    return min((window for window in windows if window), default=float("inf"))


def compile_blocks(backbone: Backbone) -> None:
    """Compile what a block does, when it first runs; if that fails, it runs as it is, and says so.

    Compiling takes up to a minute, once for each number of positions.
    """
    _let_transformers_hook(backbone)
    for block in backbone.blocks:
        block.forward = _or_eager(block.forward)


def _let_transformers_hook(backbone: Backbone) -> None:
    """Ask for hidden states, as the check of the first batch will.

    When first asked, transformers puts hooks on the blocks; those compiled before would be compiled
    again.
    """
    inputs = model_inputs(backbone, torch.tensor([_TRIAL[0]], device=backbone.device))
    with torch.inference_mode():
        backbone.model(output_hidden_states=True, **inputs)


def _or_eager(forward: Any) -> Any:
    from torch._dynamo.exc import TorchDynamoException

    compiled: Any = torch.compile(forward, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            warnings.warn(
                f"a block could not be compiled ({type(error).__name__}) and runs as it is, "
                "slower. Install a C++ compiler or report this architecture.",
                LLMEmbedWarning,
                stacklevel=2,
            )
            compiled = forward
            return forward(*args, **kwargs)

    return run


def positions_of(n_tokens: int, token_budget: int) -> int:
    """Round a number of tokens up to one of few numbers of positions.

    >>> [positions_of(n, 1000) for n in (3, 130, 500, 501, 1200)]
    [125, 250, 500, 1000, 1200]
    """
    sizes = [token_budget // share for share in _SHARES]
    return next((size for size in sizes if size >= n_tokens), n_tokens)
