"""Beside the device: one thread tokenises the next block, another writes the last one.

Each is at most one block ahead or behind, so memory does not grow with the data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

T = TypeVar("T")


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Make each item in a thread while the one before it is used.

    Raises:
        Exception: whatever making an item raises, at the item's turn.

    >>> list(one_ahead(number * 10 for number in range(3)))
    [0, 10, 20]
    """
    coming_items = ([item] for item in items)
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(next, coming_items, None)
        while made := coming.result():
            coming = thread.submit(next, coming_items, None)
            yield made[0]


class OneBehind:
    """Does work in a thread, in order, while the caller goes on to the next.

    Used as a context manager; leaving it waits for the last work, after an error too.
    """

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "behind")
        self._last: Future[Any] | None = None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._raise_last()

    def do(self, work: Callable[[], Any]) -> None:
        """Wait for the work before, then begin this one.

        Raises:
            Exception: whatever the work before raised.
        """
        self._raise_last()
        self._last = self._thread.submit(work)

    def _raise_last(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()
