"""What makes a CPU fast: batches side by side, and weights in the form that it multiplies best."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmembed.common.process import return_freed_memory

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_TYPICAL_ROWS = 1024
"""Tokens of a batch that the order of weights is chosen for; any number can be multiplied."""


def in_lanes(
    work: Callable[[_Item], _Result], items: Iterable[_Item], n_lanes: int, *, first_alone: bool
) -> Iterator[_Result]:
    """Work on items in threads that share the cores, and give the results in order.

    All cores on one batch wait for each other after each operation. Two batches on half of the
    cores each wait for nothing: 1.07 to 1.17 times the speed on two cores.

    Work is at most `n_lanes` items ahead of what is taken; one lane is the caller's own thread.
    With `first_alone` the second item begins when the first is done. What the work raises comes out
    at the item's turn.

    >>> list(in_lanes(abs, [-1, 2, -3], 2, first_alone=True))
    [1, 2, 3]
    """
    if n_lanes == 1:
        yield from map(work, items)
        return
    n_threads = torch.get_num_threads()
    a_lane = max(1, n_threads // n_lanes)
    lanes = ThreadPoolExecutor(
        n_lanes, "lane", initializer=torch.set_num_threads, initargs=(a_lane,)
    )
    begun: deque[Future[_Result]] = deque()
    try:
        for item in items:
            begun.append(lanes.submit(work, item))
            if first_alone or len(begun) > n_lanes:
                first_alone = False
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        lanes.shutdown()
        torch.set_num_threads(n_threads)  # threads made later begin with this value


def is_fast_at_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 faster than float32.

    AMX does, and AMD's AVX512-BF16 (390 against 180 GFLOP/s on two cores). Intel's AVX512-BF16
    without AMX is half as fast as float32: 167 against 325 GFLOP/s.
    """
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    capable = "amx_bf16" in cpu or ("AuthenticAMD" in cpu and "avx512_bf16" in cpu)
    return capable and onednn_multiplies_bfloat16()


def onednn_multiplies_bfloat16() -> bool:
    """Tell whether oneDNN has products in bfloat16 here: a CPU or ONEDNN_MAX_CPU_ISA may lack them.

    The answer is True where this version of torch does not tell.
    """
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
    except AttributeError:
        return True


def reorder_weights(blocks: torch.nn.ModuleList) -> None:
    """Keep bfloat16 weights in the order in which oneDNN multiplies them: 1.08 times the speed.

    oneDNN would reorder them for each batch. Features stay the same bit for bit. torch promises
    nothing about these operators: where they are missing, the model is left as it is. The memory
    of a block's old weights is returned before the next block is reordered.
    """
    for block in blocks:
        for linear in block.modules():
            if type(linear) is torch.nn.Linear and linear.weight.dtype == torch.bfloat16:
                reordered = _reordered(linear.weight)
                if reordered is None:
                    return
                linear.weight.data = torch.empty(0, dtype=torch.bfloat16)
                linear.forward = _product(reordered, linear.bias)  # type: ignore[assignment,method-assign]
        return_freed_memory()


def _reordered(weight: Tensor) -> Tensor | None:
    try:
        reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001
            weight.data, _TYPICAL_ROWS
        )
    except (AttributeError, RuntimeError, NotImplementedError):
        return None  # another version of torch, or a build without oneDNN
    return reordered


def _product(reordered: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    multiply: Any = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001

    def forward(input: Tensor) -> Tensor:  # noqa: A002 - the name that callers may pass
        product: Tensor = multiply(input, reordered, bias, "none", [], "")
        return product

    return forward


def multiply_in_float32(model: Any, blocks: torch.nn.ModuleList) -> None:
    """Make a bfloat16 model compute in float32, its large weights resting in bfloat16.

    For CPUs that multiply float32 faster: 1.4 times the speed of bfloat16 products, at half the
    memory of a float32 model. Just before a block runs, its weights are copied into one float32
    block that all share, so blocks run one at a time. Of the table of token embeddings, half of a
    small model, only the rows of a batch's own tokens are widened. Norms and the like, outside the
    blocks, become float32.
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
    # Embeddings that scale what they look up scale it in float32 too.
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
