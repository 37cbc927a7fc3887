"""What makes small fits fast on a CPU, each with what it was measured to save.

    Dropout           a third of a step, which torch's own took
    pair_dots         a twelfth of a step of cooc on four features, a quarter on seven
    small_steps       a third of a step, and more beside another process
    map_on_cores      a product of a few hundred rows gains little from a second thread
    import_meanwhile  part of the 2 to 3 s of Lightning's import, of a fit of cooc that takes 13

Everything else is torch and Lightning as they are (benchmarks/LOG.md, 2026-11-26).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmembed.common.process import keep_freed_memory

_SMALL_STEP = 1 << 28  # multiply-adds, about 3 ms on one core
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Dropout(nn.Module):
    """Zeroes a share of the entries while training, and scales the rest up.

    torch's own draws a Bernoulli number an entry. Here one 64-bit number serves eight entries, so
    the share is rounded to a multiple of 1/256. MPS draws no such numbers, so the CPU does for it.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.threshold = round(share * 256)

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries of any shape."""
        if not self.training or self.threshold == 0:
            return x
        draws = x.device if x.device.type == "cuda" else "cpu"
        numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=draws)
        drawn = numbers.random_(-(2**63), None).to(x.device)
        drawn = drawn.view(torch.uint8)[: x.numel()].view(x.shape)
        return x * ((drawn >= self.threshold) * (256 / (256 - self.threshold)))


def pair_dots(phi: Tensor) -> Tensor:
    """Multiply all pairs of features, `[B, n, G, k]` -> `[B, P, G]`, in the order of `triu`.

    Matrices are n x k with n of 3 to 8, too small for batched products. Each feature is multiplied
    with those from itself on, without the copies that indexed pairs and their gradients need.
    """
    dots: Tensor = _PairDots.apply(phi)  # type: ignore[no-untyped-call]
    return dots


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Give operations one thread, and say how many there were."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield n_threads
    finally:
        torch.set_num_threads(n_threads)


def map_on_cores(
    call: Callable[[_Item], _Result], items: Iterable[_Item], device: torch.device
) -> Iterator[_Result]:
    """Call on each item, as many at a time as there are threads, and give the results in order.

    A call computes the same whether others run beside it or not.

    >>> list(map_on_cores(abs, [-1, -2], torch.device("cpu")))
    [1, 2]
    """
    if device.type != "cpu" or torch.get_num_threads() == 1:
        yield from map(call, items)
        return
    with one_thread_each() as n_threads:
        pool = ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield from pool.map(call, items)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def small_steps(device: torch.device, n_products: int) -> Iterator[None]:
    """Run steps of so few multiply-adds on one thread; others as they are.

    A step of 128 rows and 460,000 weights took 11 ms on one thread and 16-20 ms on two; with
    another process on the cores, two threads that waited for each other took up to 600 ms. Memory
    that a step frees is kept for the next one: a tenth of a step at the paper's size.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if device.type != "cpu" or n_products >= _SMALL_STEP:
        yield
        return
    with one_thread_each():
        yield


def import_meanwhile(module: str) -> None:
    """Import in a thread while something is solved, which leaves a core idle half of the time."""
    Thread(target=import_module, args=[module], daemon=True).start()


class _PairDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, phi: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(phi)
        return torch.cat([(phi[:, i : i + 1] * phi[:, i:]).sum(3) for i in range(phi.shape[1])], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Give `sum_j (g_ij + g_ji) phi_j` for each feature i."""
        (phi,), (grad,) = ctx.saved_tensors, grads
        n_pairs = list(range(phi.shape[1], 0, -1))
        total = torch.zeros_like(phi)
        for i, of_row in enumerate(torch.split(grad[..., None], n_pairs, dim=1)):
            total[:, i] += (of_row * phi[:, i:]).sum(dim=1)
            total[:, i:].addcmul_(of_row, phi[:, i : i + 1])
        return total
