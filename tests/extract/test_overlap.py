"""Work beside the device: what overlaps, in which order, and where its errors come out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_cache import tree

from llmembed.cache_format import CacheWriter
from llmembed.extract import ExtractConfig, Extractor, extract
from llmembed.extract.engines import blocks
from llmembed.extract.engines.blocks import one_ahead
from llmembed.extract.features import extractor

SOON = 30.0
"""Seconds after which a thread that should have run has not."""
N_BLOCKS = 5
"""Of the extraction that `settings` describes."""


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


class SlowDevice:
    """Done with a block when the next one is launched; till then its copies hold nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self._launched = [threading.Event() for _ in range(N_BLOCKS)]
        self._launch = Extractor.launch
        monkeypatch.setattr(Extractor, "launch", lambda *which: self.launch(*which))  # noqa: PLW0108
        monkeypatch.setattr(extractor, "_to_host", self.to_host)

    def launch(self, *arguments: Any) -> Any:
        number = sum(event.is_set() for event in self._launched)
        self.log.append(f"launch {number}")
        self._launched[number].set()
        return self._launch(*arguments)

    def to_host(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        number = sum(event.is_set() for event in self._launched) - 1
        copies = [torch.full_like(tensor, torch.nan) for tensor in tensors]

        def wait() -> None:
            if number < N_BLOCKS - 1:
                assert self._launched[number + 1].wait(SOON), f"{number + 1} waits for {number}"
            self.log.append(f"await {number}")
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor)

        return copies, wait


def test_a_block_is_launched_before_the_last_is_awaited(
    settings: dict[str, Any],
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slow device always has the next block; one is in flight, not more; bytes are the same."""
    device = SlowDevice(monkeypatch)
    extract(ExtractConfig(**settings, cache=str(tmp_path / "slow.zarr")))
    between = [what for n in range(1, N_BLOCKS) for what in (f"launch {n}", f"await {n - 1}")]
    assert device.log == ["launch 0", *between, f"await {N_BLOCKS - 1}"]
    assert tree(tmp_path / "slow.zarr") == whole


def test_who_launches_neither_plans_nor_returns_memory(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are planned by the thread that tokenises, memory is returned by that which writes."""
    places = set()
    plan = Extractor.plan

    def planned(*arguments: Any) -> Any:
        places.add(("plan", threading.current_thread().name))
        return plan(*arguments)

    def returned() -> None:
        places.add(("return", threading.current_thread().name))

    monkeypatch.setattr(Extractor, "plan", planned)
    monkeypatch.setattr(blocks, "return_freed_memory", returned)
    extract(ExtractConfig(**settings, cache=str(tmp_path / "c.zarr")))
    assert places == {("plan", "ahead_0"), ("return", "behind_0")}


@pytest.mark.parametrize("failing", [0, N_BLOCKS - 1])
def test_an_error_of_a_write_comes_out_and_ends_the_run(
    failing: int, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of the last block; blocks before are committed, later ones are not."""
    cache, write = tmp_path / "c.zarr", CacheWriter.write

    def full(writer: CacheWriter, plan: Any, block: Any, **what: Any) -> None:
        if block.start == plan.blocks[failing].start:
            raise OSError("disk full")
        write(writer, plan, block, **what)

    monkeypatch.setattr(CacheWriter, "write", full)
    with pytest.raises(OSError, match="disk full"):
        extract(ExtractConfig(**settings, cache=str(cache)))
    assert len(list(cache.glob(".llmembed/commits/**/*.json"))) == failing
