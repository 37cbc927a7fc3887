"""A fixed piece of work to measure time in, so that figures of two machines can be compared.

Seconds differ from machine to machine and from hour to hour on a shared one. The yardstick is work
of the same kinds as a fit (products and a Cholesky factor of a Gram matrix, then small gradient
steps, which are all overhead) on one thread, in CPU seconds, so that waiting for a core doesn't
count. Caches and memory that others use up still do, in part in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

N_ROWS, WIDTH, N_CLASSES, N_STEPS = 1024, 768, 8, 150
_T = TypeVar("_T")


def cpu_seconds(work: Callable[[], _T]) -> tuple[float, _T]:
    """Do something and give the CPU seconds of this process with its result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def yardstick_s() -> float:
    """Do the fixed work once, and give its CPU seconds: 0.1 to 0.2 on a core of 2024."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return cpu_seconds(_work)[0]
    finally:
        torch.set_num_threads(n_threads)


def _work() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_ROWS, WIDTH, generator=generator)
    y = torch.randint(0, N_CLASSES, (N_ROWS,), generator=generator)
    gram = x.T @ x + torch.eye(WIDTH)
    for _ in range(4):
        torch.linalg.cholesky(gram)
    weight = torch.zeros(WIDTH, N_CLASSES, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    for step in range(N_STEPS):
        rows = torch.arange(128) + 128 * (step % (N_ROWS // 128))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x[rows] @ weight, y[rows]).backward()
        optimizer.step()
