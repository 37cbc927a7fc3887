"""Products of 8 bits: `--quantize fp8`, for GPUs that multiply float8 twice as fast as bfloat16.

Each row of a weight, and each token's row of activations, has a scale of its own that makes its
largest value the largest float8 (e4m3, 448), so a feature depends on its own text alone. Rows are
multiplied by torch's scaled product, which sums in float32 and gives bfloat16. A CPU has no such
product: it rounds alike and multiplies in float32, no faster than without.

A product whose widths are no multiples of 16, which GPUs do not take, stays as it is on every
device, and so does all that is no linear layer of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmembed.common.errors import ConfigError

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = 448.0
_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply float8: Ada; Hopper is 9.0."""
_STEP = 16


def refuse_without_float8(device: torch.device) -> None:
    """Refuse a device that neither multiplies float8 nor is a CPU.

    Raises:
        ConfigError: naming what the device has, and what to pass.
    """
    if device.type == "cpu":
        return
    has = "no float8"
    if device.type == "cuda" and torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found >= _CAPABILITY:
            return
        has = f"compute capability {found[0]}.{found[1]}"
    raise ConfigError(
        f"--quantize fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or more, and {device} "
        f"has {has}. Pass --quantize nf4 or int8, or --device cpu, which rounds alike."
    )


def multiply_in_float8(blocks: torch.nn.ModuleList) -> int:
    """Round the weights of the blocks' linear layers, and tell how many there are."""
    found = [
        (parent, name, child)
        for parent in blocks.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
        and not (child.in_features % _STEP or child.out_features % _STEP)
    ]
    for parent, name, linear in found:
        setattr(parent, name, Float8Linear(linear))
    return len(found)


class Float8Linear(torch.nn.Module):
    """A linear layer whose weight and input are rounded to float8, row by row."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = rounded(linear.weight.data)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that callers may pass
        """Multiply `[..., K]` to `[..., N]`, of the same dtype."""
        rows, scale = rounded(input.reshape(-1, input.shape[-1]))
        if rows.is_cuda:
            product = torch._scaled_mm(  # noqa: SLF001 - torch names it so since 2.5
                rows,
                self.weight.t(),
                scale_a=scale,
                scale_b=self.scale.t(),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        else:
            exact = F.linear(rows.float(), self.weight.float()) * scale * self.scale.t()
            product = exact.to(torch.bfloat16)
        product = product.to(input.dtype).view(*input.shape[:-1], -1)
        return product if self.bias is None else product + self.bias


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of `[M, K]` to float8 with its own scale, float32 `[M, 1]`.

    >>> values, scale = rounded(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    >>> (values.float() * scale).tolist()
    [[1.0, -2.0], [0.0, 0.0]]
    """
    rows = rows.float()
    largest = rows.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / _LARGEST, 1.0)
    return (rows / scale).to(_FLOAT8), scale
