"""bfloat16 weights on a CPU that multiplies float32 faster: each block is widened as it runs.

Intel CPUs without AMX multiply bfloat16 at half the speed of float32, and llama.cpp and others
widen the weights there. So do these hooks: weights rest in bfloat16, half the memory of float32;
a block's weights are copied into one float32 block shared by all just before it runs. The copy
costs about a tenth of the products, and features are closer to float32's than bfloat16 products'.

The table of token embeddings, half of a small model, rests in bfloat16 too: of it only the rows of
a batch's own tokens are widened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def multiply_in_float32(model: Any, blocks: torch.nn.ModuleList) -> None:
    """Make a bfloat16 model compute in float32, its large weights resting in bfloat16.

    Args:
        model: the backbone; norms and the like, outside its blocks, become float32.
        blocks: its blocks, run one at a time.
    """
    resting: set[Tensor] = {*blocks.parameters()}
    tokens = model.get_input_embeddings()
    if isinstance(tokens, torch.nn.Embedding):
        resting.add(tokens.weight)
        _widen_rows_while_running(tokens)
    for parameter in model.parameters():
        if parameter not in resting:
            parameter.data = parameter.data.float()
    widened: dict[tuple[str, torch.Size], Tensor] = {}
    for block in blocks:
        _widen_while_running(block, widened)


def _widen_rows_while_running(tokens: torch.nn.Embedding) -> None:
    """Look up in a float32 table of those tokens alone that a batch has.

    The kinds of embedding that scale what they look up scale it in float32 too.
    """
    table = tokens.weight.data
    tokens.padding_idx = None  # means something to gradients only, and must lie within the table

    def widen(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        token_ids, *others = arguments
        rows, places = torch.unique(token_ids, return_inverse=True)
        tokens.weight.data = table[rows].float()
        return (places, *others)

    def rest(*_: Any) -> None:
        tokens.weight.data = table

    tokens.register_forward_pre_hook(widen)
    tokens.register_forward_hook(rest, always_call=True)


def _widen_while_running(
    block: torch.nn.Module, widened: dict[tuple[str, torch.Size], Tensor]
) -> None:
    weights = {name: (parameter, parameter.data) for name, parameter in block.named_parameters()}
    for name, (_, weight) in weights.items():
        widened.setdefault((name, weight.shape), torch.empty(weight.shape))

    def widen(*_: Any) -> None:
        for name, (parameter, weight) in weights.items():
            parameter.data = widened[name, weight.shape].copy_(weight)

    def rest(*_: Any) -> None:
        for parameter, weight in weights.values():
            parameter.data = weight

    block.register_forward_pre_hook(widen)
    block.register_forward_hook(rest, always_call=True)
