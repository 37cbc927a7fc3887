"""Small jobs side by side, one thread each: a product of a few hundred rows gains little from two.

Products let go of the interpreter, so threads of one process do, and they share the features. A job
computes the same whether others run beside it or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


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
