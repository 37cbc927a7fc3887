"""Weights in the order in which a CPU multiplies them: oneDNN would reorder them for each batch.

With a batch on a thread of its own this reordering takes 5 to 7 % of a product in bfloat16. The
bits of a feature stay the same. torch has the operators for its own compiler and promises nothing
about them, so a model is left as it is where they are missing or give another answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmembed.common.process import return_freed_memory

_TYPICAL_ROWS = 1024
"""Tokens of a batch that the order is chosen for; any number can be multiplied."""


def onednn_multiplies_bfloat16() -> bool:
    """Tell whether oneDNN has products in bfloat16 here: a CPU or ONEDNN_MAX_CPU_ISA may lack them.

    The answer is True where this version of torch does not tell.
    """
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
    except AttributeError:
        return True


def pack_weights(blocks: torch.nn.ModuleList) -> None:
    """Reorder the weights of all linear layers of these blocks, in place, block by block.

    What a block's weights took is returned to the system before the next, so that the peak of
    memory is that of the weights and one block more.
    """
    for block in blocks:
        for linear in block.modules():
            if type(linear) is torch.nn.Linear and linear.weight.dtype == torch.bfloat16:
                packed = _pack(linear.weight)
                if packed is None:
                    return
                linear.weight.data = torch.empty(0, dtype=torch.bfloat16)
                linear.forward = _Product(packed, linear.bias)  # type: ignore[method-assign]
        return_freed_memory()


class _Product:
    """What a linear layer does, by a packed weight."""

    def __init__(self, packed: Tensor, bias: Tensor | None) -> None:
        self._packed, self._bias = packed, bias

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that callers may pass
        multiply: Any = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        product: Tensor = multiply(input, self._packed, self._bias, "none", [], "")
        return product


def _pack(weight: Tensor) -> Tensor | None:
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001
            weight.data, _TYPICAL_ROWS
        )
    except (AttributeError, RuntimeError, NotImplementedError):
        return None  # another version of torch, or a build without oneDNN
    return packed
