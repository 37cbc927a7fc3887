"""Recorded passes: by a stand-in that spoils memory as a card does, and on a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zoo import save_animal

from llmembed.extract import Extractor, Recipe
from llmembed.extract.fast import attention, graphs
from llmembed.extract.fast.graphs import MOST_GRAPHS, Recorder, States
from llmembed.extract.features import packing
from llmembed.extract.features.extractor import Features

Rows = list[list[int]]
LAYERS = [0, 2, 4]


class Recordings:
    """Recordings that share memory: a replay spoils what all others gave, then computes anew."""

    def __init__(self) -> None:
        self.n_replayed, self._given = 0, list[torch.Tensor]()

    def record(self, run: Callable[[], States], device: Any, pool: Any) -> Any:
        assert pool == ("shared" if self._given else None)
        states = run()
        self._given += states.values()

        @torch.inference_mode()
        def replay() -> None:
            self.n_replayed += 1
            for tensor in self._given:
                tensor.fill_(torch.nan)
            for layer, computed in run().items():
                states[layer].copy_(computed)

        return replay, states, "shared"


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Recordings:
    stand_in = Recordings()
    monkeypatch.setattr(graphs, "record", stand_in.record)
    monkeypatch.setattr(attention, "varlen", attention.exact)
    return stand_in


def extractor(folder: Path, device: str = "cpu") -> Extractor:
    dtype = "float32" if device == "cpu" else "bfloat16"
    recipe = Recipe(model=str(folder), max_length=48, compute_dtype=dtype, dtype="float32")
    poolings = ["mean", "last", "first", "max"]
    return Extractor(recipe, layers=LAYERS, poolings=poolings, device=device, token_budget=64)


def recording(folder: Path) -> Extractor:
    """Packed on the CPU, with recorded passes."""
    ours = extractor(folder)
    ours._packs = packing.try_packing(ours.backbone, 48)
    assert ours._packs
    ours.n_lanes, ours._recorder = 1, ours._make_recorder()
    return ours


@pytest.fixture
def llama_4(tmp_path: Path) -> Path:
    return save_animal("llama", tmp_path / "llama")


def rows_of(seed: int) -> Rows:
    draw = np.random.default_rng(seed).integers
    return [draw(5, 90, size=n).tolist() for n in draw(2, 15, size=24)]


def check(found: Features, expected: Features, tolerance: float = 1e-5) -> None:
    for name, feature in found.items():
        distance = np.linalg.norm(feature - expected[name], axis=1)
        assert (distance / np.linalg.norm(expected[name], axis=1)).max() < tolerance, name


@pytest.mark.parametrize("animal", ["bert", "modernbert"])
def test_replayed_passes_give_what_padded_ones_give(
    animal: str, tmp_path: Path, recordings: Recordings
) -> None:
    """Other texts of other lengths each time: no state is read once the next pass has begun."""
    ours, padded = recording(save_animal(animal, tmp_path)), extractor(tmp_path)
    for seed in range(4):
        rows = rows_of(seed)
        check(ours.compute(rows), padded.compute(rows))
    assert recordings.n_replayed > 5
    assert ours.way.cuda_graphs


def test_the_number_of_recordings_is_bounded(recordings: Recordings) -> None:
    """What comes once is not recorded; of many kinds the first are, and the others stay right."""
    recorder = Recorder(torch.device("cpu"), 1e-4)

    def run(kind: int, value: float) -> float:
        given = {"ids": torch.full((1, kind), value)}
        return recorder.run(
            kind,
            given,
            lambda tensors: {1: 2 * tensors["ids"]},
            lambda states: float(states[1].sum()),
        )

    for turn in range(1, 5):
        for kind in range(1, 3 * MOST_GRAPHS):
            assert run(kind, float(turn)) == 2 * turn * kind
        assert recorder.n_recorded == (0 if turn == 1 else MOST_GRAPHS)


def raises(run: Any, device: Any, pool: Any) -> Any:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def stale(run: Callable[[], States], device: Any, pool: Any) -> Any:
    states = {layer: found + 1e-2 for layer, found in run().items()}
    return (lambda: None), states, None


def not_finite(run: Callable[[], States], device: Any, pool: Any) -> Any:
    states = {layer: found * torch.nan for layer, found in run().items()}
    return (lambda: None), states, None


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [(raises, "RuntimeError"), (stale, "it gave other"), (not_finite, "it gave other")],
)
def test_what_cannot_be_recorded_is_launched(
    stand_in: Any,
    reason: str,
    llama_4: Path,
    recordings: Recordings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error, or other hidden states than the launched pass: told once, features are right."""
    monkeypatch.setattr(graphs, "record", stand_in)
    ours, padded, rows = recording(llama_4), extractor(llama_4), rows_of(0)
    with pytest.warns(match=rf"could not be recorded as a CUDA graph \({reason}") as warned:
        found = [ours.compute(rows) for _ in range(3)]
    assert len(warned) == 1
    assert not ours.way.cuda_graphs
    for features in found:
        check(features, padded.compute(rows))


def test_too_little_memory_gives_recordings_back(
    llama_4: Path, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their memory is free before the batch is tried again, halved."""
    ours = recording(llama_4)
    for seed in range(3):
        ours.compute(rows_of(seed))
    assert ours.way.cuda_graphs
    run, recorded = ours._run, list[bool]()

    def fails_once(texts: Any, width: int) -> Any:
        recorded.append(ours.way.cuda_graphs)
        if len(recorded) == 1:
            raise torch.OutOfMemoryError
        return run(texts, width)

    monkeypatch.setattr(ours, "_run", fails_once)
    recordings._given.clear()
    with pytest.warns(match="do not fit in the memory"):
        ours.compute(rows_of(7))
    assert recorded[:2] == [True, False]


def test_states_are_lent_while_no_other_pass_may_begin(recordings: Recordings) -> None:
    """Launched or replayed; what another thread asks for waits."""
    recorder, locked = Recorder(torch.device("cpu"), 1e-4), list[bool]()
    for value in range(4):
        given = {"ids": torch.tensor([[float(value)]])}
        recorder.run(
            "one kind",
            given,
            lambda tensors: {1: tensors["ids"].clone()},
            lambda states: locked.append(recorder._lock.acquire(blocking=False)),
        )
    assert recordings.n_replayed == 3  # once to compare
    assert locked == [False] * 4


def test_only_small_models_without_waits_are_recorded(
    llama_4: Path, recordings: Recordings
) -> None:
    """By their size beside the budget; int8 waits for its outliers, and a CPU launches nothing."""
    ours = recording(llama_4)
    assert extractor(llama_4)._recorder is None
    assert ours._make_recorder() is not None
    ours.token_budget = 10**9
    assert ours._make_recorder() is None
    ours.token_budget = 64
    ours.backbone = dataclasses.replace(ours.backbone, quantize="int8")
    assert ours._make_recorder() is None


def test_a_kernel_that_minds_empty_texts_is_found(
    llama_4: Path, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fill up the number of texts: without them nothing is recorded, which is told."""

    def spoilt(*what: Any, **how: Any) -> torch.Tensor:
        found = attention.exact(*what, **how)
        return found * (1 + bool((what[3].diff() == 0).any()))

    monkeypatch.setattr(attention, "varlen", spoilt)
    with pytest.warns(match=r"CUDA graph \(beside empty texts others had other features\)"):
        ours = recording(llama_4)
    rows = rows_of(0)
    check(ours.compute(rows), extractor(llama_4).compute(rows))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_card_replays_what_it_launched(llama_4: Path) -> None:
    """The real thing: features of bfloat16's accuracy, from passes that were replayed."""
    ours, plain = extractor(llama_4, "cuda"), extractor(llama_4)
    for seed in range(6):
        check(ours.compute(rows_of(seed)), plain.compute(rows_of(seed)), tolerance=0.3)
    assert ours.way.cuda_graphs
