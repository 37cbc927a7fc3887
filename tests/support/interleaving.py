"""Run several writers of one cache in one process, in an order that the test chooses.

Each actor runs in a thread of its own, and one at a time: it stops before every operation on the
file system, and goes on when the schedule says so. There is no time: who sleeps lets others go on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmembed.cache_format.writing import lock

OPERATIONS = ("open", "replace", "hardlink_to", "unlink", "iterdir")
"""Those of `Path` that change what others see, or see what others change."""
OF_OS = ("open",)
OF_REMOVAL = ("unlink", "rmdir", "scandir")
"""Those of `os` that a removal of folders makes besides."""
MOST_STEPS = 5000


class Actor(threading.Thread):
    """A function that is run step by step."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._act = act
        self._may_go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.sleeps, self.is_done = False, False
        self.result: Any = None
        self.start()

    def run(self) -> None:
        """Run the function as the schedule allows."""
        self._may_go.acquire()
        try:
            self.result = self._act()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.result = error
        self.is_done = True
        self._stopped.release()

    def step(self) -> None:
        """Let it do one operation."""
        self.sleeps = False
        self._may_go.release()
        self._stopped.acquire()

    def stop(self, *, sleeps: bool) -> None:
        """Wait, called by the actor itself, until it may go on."""
        self.sleeps = sleeps
        self._stopped.release()
        self._may_go.acquire()


def stop_here(*, sleeps: bool = False) -> None:
    """Let the schedule decide who goes on; what is no actor goes on at once."""
    actor = threading.current_thread()
    if isinstance(actor, Actor):
        actor.stop(sleeps=sleeps)


def interleave(acts: Sequence[Callable[[], Any]], turns: Sequence[int]) -> list[Any]:
    """Run the first actor for so many steps, then the second, and so on; at last each to its end.

    Args:
        acts: the actors.
        turns: steps of each turn; the last ones are to the end, or until the actor sleeps.

    Returns:
        What each returned or raised.
    """
    actors = [Actor(act) for act in acts]
    for turn, n_steps in enumerate(turns):
        actor = actors[turn % len(actors)]
        for _ in range(n_steps):
            if not (actor.is_done or actor.sleeps):
                actor.step()
    turn, n_left = len(turns), MOST_STEPS
    while not all(actor.is_done for actor in actors):
        actor = actors[turn % len(actors)]
        actor.sleeps = False
        while not (actor.is_done or actor.sleeps):
            actor.step()
            n_left -= 1
            assert n_left, "they wait for each other"
        turn += 1
    return [actor.result for actor in actors]


def count_steps(act: Callable[[], Any]) -> int:
    """Count the steps of an actor that is alone."""
    actor, n_steps = Actor(act), 0
    while not actor.is_done:
        actor.step()
        n_steps += 1
    if isinstance(actor.result, BaseException):
        raise actor.result
    return n_steps


@contextmanager
def stepwise(*more: str) -> Iterator[None]:
    """Let actors stop before every operation on the file system, and sleep without time.

    Args:
        more: further functions of `os`.
    """

    def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            stop_here()
            return function(*args, **options)

        return call

    clock = SimpleNamespace(sleep=lambda _: stop_here(sleeps=True), monotonic=lambda: 0.0)
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(Path, name, stopping(getattr(Path, name)))
        for name in (*OF_OS, *more):
            patch.setattr(os, name, stopping(getattr(os, name)))
        patch.setattr(lock, "time", clock)
        yield
