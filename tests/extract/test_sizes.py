"""How much is computed at a time: by sizes, halved where it does not fit, and doubled back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from toy_cache import as_options
from zoo import save_animal

from llmembed.common.errors import ConfigError, LLMEmbedWarning
from llmembed.extract import ExtractConfig, Extractor, Recipe
from llmembed.extract.cli import main
from llmembed.extract.engines import units, worker
from llmembed.extract.engines.outcome import Counts, summary
from llmembed.extract.engines.task import Task
from llmembed.extract.features import extractor
from llmembed.extract.features.extractor import Way
from llmembed.extract.features.sizes import TokenBudget, tokens_that_fit
from llmembed.extract.pipeline import prepare

LONG, SHORT = [[5] * 40, [6] * 20], [[6, 7]] * 40
"""One batch each of a budget of 80 tokens."""


def ours(folder: Path, **options: Any) -> Extractor:
    recipe = Recipe(model=str(folder), max_length=60, compute_dtype="float32", dtype="float32")
    options = {"layers": [2], "poolings": ["mean"], "token_budget": 80, "device": "cpu"} | options
    found = Extractor(recipe, **options)
    found.compute([[5]])  # the first batch is checked
    return found


def in_little_memory(
    found: Extractor, monkeypatch: pytest.MonkeyPatch, error: BaseException, *, longest: int
) -> None:
    """Let a batch with a text longer than that, and of more tokens, run out of memory."""
    run = found._run

    def fails(texts: Any, width: int) -> Any:
        if width > longest and len(texts.ids) > 1:
            raise error
        return run(texts, width)

    monkeypatch.setattr(found, "_run", fails)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB"),
        MemoryError("Unable to allocate 1.00 GiB for an array"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_kind_of_too_little_memory_halves_the_budget(
    error: BaseException, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class of CUDA's allocator, its driver's, a library's text, MPS's, and Python's own."""
    found = ours(llama)
    expected = found.compute(LONG)
    in_little_memory(found, monkeypatch, error, longest=20)
    with pytest.warns(LLMEmbedWarning, match="80 tokens a batch do not fit in the memory of cpu"):
        features = found.compute(LONG)
    assert found.token_budget == 40
    np.testing.assert_allclose(features["mean", 2], expected["mean", 2], rtol=1e-4, atol=1e-5)


def test_one_odd_batch_halves_the_budget_for_a_while(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts behind it are computed with half, those after them with all of it again."""
    found = ours(llama)
    in_little_memory(found, monkeypatch, torch.OutOfMemoryError(), longest=20)
    found.compute(SHORT)
    assert found.token_budget == 80
    with pytest.warns(LLMEmbedWarning, match="do not fit"):
        found.compute(LONG)
    assert found.token_budget == 40
    found.compute(SHORT)
    assert found.token_budget == 80


def test_batches_planned_for_another_budget_are_planned_again(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was planned before the budget was halved is not run as it was planned."""
    found = ours(llama)
    planned = found.prepare(found.tokenize(["w1 w2 w3"] * 30))
    found.token_budget = 20
    widest, run = [0], found._run

    def seen(texts: Any, width: int) -> Any:
        widest.append(len(texts.ids) * width)
        return run(texts, width)

    monkeypatch.setattr(found, "_run", seen)
    found.launch(planned)()
    assert 0 < max(widest) <= 20


def test_what_no_smaller_batch_makes_fit_is_one_sentence(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features that the host has no pinned memory for are told with the way out."""

    def full(_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: out of memory")

    found = ours(llama)
    monkeypatch.setattr(extractor, "_to_host", full)
    with pytest.raises(ConfigError, match=r"does not suffice\. toy-llama: pass fewer --layers or"):
        found.compute(SHORT)


@given(
    st.integers(1, 1 << 20),
    st.lists(st.integers(1, 1 << 21), min_size=1, max_size=40),
)
def test_a_budget_stays_within_the_first_and_runs_out_a_bounded_number_of_times(
    most: int, room_of_blocks: list[int]
) -> None:
    """It is the first one divided by a power of two; after three blocks it never rises again."""
    budget, n_disturbed, last = TokenBudget(most), 0, room_of_blocks[-1]
    for room in [*room_of_blocks, *[last] * 60]:
        before = budget.now
        while budget.now > max(1, room):
            budget.shrink(budget.now)
        n_disturbed += budget.now < before
        budget.end_block()
        assert budget.now in {max(1, most >> n) for n in range(22)}
    assert n_disturbed <= 3 + most.bit_length()
    assert budget.now <= max(1, last)


@given(st.integers(0, 1 << 40), st.integers(1, 10**11), st.integers(16, 16384), st.booleans())
def test_more_memory_is_never_fewer_tokens(
    free: int, n_parameters: int, hidden_size: int, whole: bool
) -> None:
    """A budget is a power of two within fixed bounds, and falls with what a token takes."""
    sizes = {"n_parameters": n_parameters, "hidden_size": hidden_size, "inner_size": hidden_size}
    itemsize = 4 if whole else 2
    chosen = tokens_that_fit(free, **sizes, itemsize=itemsize)
    assert chosen in {1 << n for n in range(10, 17)}
    assert chosen <= tokens_that_fit(2 * free, **sizes, itemsize=itemsize)
    assert chosen <= tokens_that_fit(free, **sizes, itemsize=2)


@pytest.mark.parametrize(("n_rows", "n_compiled"), [(0, 0), (10_000, 0), (10**9, 1)])
def test_blocks_are_compiled_where_the_run_outlasts_it(
    n_rows: int, n_compiled: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first texts decide by their tokens, and no later ones; who does not pack never does."""
    compiled: list[object] = []
    monkeypatch.setattr(extractor, "compile_blocks", compiled.append)
    monkeypatch.setattr(extractor, "are_compiled", lambda _: True)
    recipe = ours(llama).recipe
    for packs in (True, False):
        found = Extractor(recipe, layers=[2], poolings=["mean"], device="cpu", n_rows=n_rows)
        found._packs = packs
        for _ in range(2):
            found._compile_if_it_pays(np.array([], np.int32))
            found._compile_if_it_pays(np.array([10, 20], np.int32))
        assert found.way.compiled == (packs and bool(n_compiled))
    assert len(compiled) == n_compiled


def test_a_worker_knows_its_share_of_the_rows(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decides by them whether compiling pays."""
    config = ExtractConfig(**settings, cache=str(tmp_path / "c.zarr"), engine="ray")
    told: list[int] = []
    monkeypatch.setattr(Task, "load_extractor", lambda *_, n_rows, **__: told.append(n_rows))
    job = units.job_of(prepare(config), (3,), config.dataset_options, n_rows=150)
    worker.Worker(job)._open()
    assert told == [150]


def test_the_json_says_how_passes_were_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """On a CPU: padded, as they are, by torch's attention, without a note; of no pass, nothing."""
    options = as_options(settings)
    for expected in ((False, False, False, "sdpa"), (None, None, None, None)):
        result = CliRunner().invoke(main, [*options, f"--cache={tmp_path / 'c.zarr'}", "--json"])
        found = json.loads(result.stdout)
        names = ("packed", "compiled", "cuda_graphs", "attention")
        assert tuple(found[name] for name in names) == expected
        assert not any("padded" in note for note in found["notes"])


def test_why_a_gpu_pads_is_a_note_said_once(settings: dict[str, Any], tmp_path: Path) -> None:
    """Also where several workers say it; what one of them did not do was not done."""
    task = prepare(ExtractConfig(**settings, cache=str(tmp_path / "c.zarr")))
    packed = Way(packed=True, compiled=True, cuda_graphs=True, attention="llmembed-packed")
    padded = Way(
        packed=False, compiled=False, cuda_graphs=False, attention="sdpa", why_padded="of a trial"
    )
    counts = sum([Counts(ways=(way,)) for way in (padded, packed, padded)], Counts())
    told = summary(task, counts, 1.0)
    assert (told.packed, told.compiled, told.attention) == (False, False, "llmembed-packed, sdpa")
    assert told.notes.count("Texts were padded, neither packed nor compiled: of a trial.") == 1
    record = json.loads(json.dumps(dataclasses.asdict(counts)))
    assert Counts.from_record(record) == counts


@pytest.mark.parametrize(
    ("animal", "options", "reason"),
    [
        ("llama", {}, "in a trial"),  # a CPU has no kernel for packed texts
        ("llama", {"poolings": ["mean_padded"]}, "reads the pads"),
        ("bert", {"poolings": ["pooler"], "layers": [4]}, "pooling pooler"),
        ("bloom", {}, "its attention is 'eager'"),
    ],
)
def test_each_reason_to_pad_is_told(
    animal: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """By who asks for it: the poolings, the model's own attention, or a trial that failed."""
    save_animal(animal, tmp_path)
    recipe = Recipe(model=str(tmp_path), max_length=60, compute_dtype="float32", dtype="float32")
    what = {"layers": [2], "poolings": ["mean"], "device": "cpu"} | options
    found = Extractor(recipe, **what)
    assert reason in found._reason_to_pad(all_gpus=False, needs_pooler="pooler" in what["poolings"])
    assert "several GPUs" in found._reason_to_pad(all_gpus=True, needs_pooler=False)
