"""How receipts of workers are collected, without workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from llmembed.common.errors import LLMEmbedWarning
from llmembed.extract.engines.outcome import Counts
from llmembed.extract.engines.units import collect


def toy_units(n_units: int) -> list[Any]:
    """Units of one block of ten rows."""
    starts = range(0, n_units * 10, 10)
    blocks = [SimpleNamespace(start=start, stop=start + 10) for start in starts]
    return [SimpleNamespace(split="train", blocks=[block]) for block in blocks]


def rounds(
    fails: Callable[[int, int], bool], seen: list[list[int]]
) -> Callable[[int, Mapping[int, Any]], Iterator[dict[str, Any]]]:
    """Answer for each unit; `fails` tells by its number and the round whether it fails."""

    def start_round(in_flight: int, pending: Mapping[int, Any]) -> Iterator[dict[str, Any]]:
        seen.append([])
        for number in pending:
            seen[-1].append(number)
            done = dataclasses.asdict(Counts(n_rows_computed=10))
            reason = f"store down for {number}" if fails(number, len(seen)) else ""
            yield {"number": number, "counts": done, "reason": reason, "warnings": []}

    return start_round


def test_a_unit_that_failed_is_handed_out_again() -> None:
    """What fails in the first round alone is done in the second, and nothing else is."""
    seen: list[list[int]] = []
    fails_once = rounds(lambda number, turn: number == 2 and turn == 1, seen)
    counts = collect(toy_units(5), fails_once, lambda *_: None)
    assert (counts, seen) == (Counts(n_rows_computed=50), [[0, 1, 2, 3, 4], [2]])


def test_a_unit_that_fails_each_time_is_named_with_its_reason() -> None:
    """It is tried in two rounds that bring nothing; then its rows are left."""
    seen: list[list[int]] = []
    named = "rows 20-30 of split 'train': store down for 2"
    with pytest.warns(LLMEmbedWarning, match=named):
        counts = collect(toy_units(5), rounds(lambda number, _: number == 2, seen), lambda *_: None)
    assert counts == Counts(n_rows_computed=40, left=(named,))
    assert seen == [[0, 1, 2, 3, 4], [2], [2]]


def test_where_all_fail_not_all_are_tried() -> None:
    """Two rounds end after 32 failures each; all units are counted, and the first ones named."""
    seen: list[list[int]] = []
    with pytest.warns(LLMEmbedWarning) as warned:
        counts = collect(toy_units(100), rounds(lambda *_: True, seen), lambda *_: None)
    assert [len(tried) for tried in seen] == [32, 32]
    assert (len(counts.left), len(warned)) == (100, 20)
