"""Work beside the device: what overlaps, in which order, and where its errors come out."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from llmembed.extract.engines.blocks import one_ahead, one_behind

SOON = 30.0
"""Seconds after which a thread that should have run has not."""


def test_the_next_item_is_made_while_one_is_used() -> None:
    """Item 1 is made while the caller still holds item 0, and item 2 is not."""
    made = [threading.Event() for _ in range(3)]

    def make() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    items = one_ahead(make())
    assert next(items) == 0
    assert made[1].wait(SOON)
    assert not made[2].is_set()
    assert list(items) == [1, 2]


def test_an_error_in_making_an_item_comes_at_its_turn() -> None:
    """The items before it are given first."""

    def make() -> Iterator[int]:
        yield 0
        raise ValueError("the second")

    items = one_ahead(make())
    assert next(items) == 0
    with pytest.raises(ValueError, match="the second"):
        next(items)


def test_work_is_done_beside_the_caller_and_in_order() -> None:
    """The caller goes on while the first work waits for it; all is done when the block is left."""
    go, done = threading.Event(), []

    def first() -> None:
        assert go.wait(SOON)
        done.append(1)

    with one_behind() as do:
        do(first)
        assert not done
        go.set()
        do(lambda: done.append(2))
    assert done == [1, 2]


def fail() -> None:
    raise OSError("disk full")


def test_an_error_of_the_last_work_comes_out_when_the_block_is_left() -> None:
    """Nobody has to ask for it."""
    with pytest.raises(OSError, match="disk full"), one_behind() as do:
        do(fail)


def test_an_error_of_the_work_comes_out_at_the_next_work() -> None:
    """It is raised once, and the next work is not done."""
    done: list[int] = []
    with one_behind() as do:
        do(fail)
        with pytest.raises(OSError, match="disk full"):
            do(lambda: done.append(1))
    assert not done
