"""Packed passes and compiled blocks on a CPU, with a stand-in for torch's kernel for CUDA."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_model import toy_texts
from zoo import ZOO, save_animal

from llmembed.common.errors import ExtractionError
from llmembed.extract import Extractor, Recipe
from llmembed.extract.backbones.load import Backbone
from llmembed.extract.fast.attention import PACKED
from llmembed.extract.features import packing
from llmembed.extract.features.forward import Tokenized

TEXTS = toy_texts(40, longest=14)
MAX_LENGTH = 48
SST2 = [7, 9, 12, 9, 20, 11, 31, 3, 11, 14, 5, 20, 8, 7, 8, 3, 2, 7, 3, 33, 12, 26, 5, 10, 15, 12]
"""Tokens of its first texts."""
ALONE = {
    "gemma2": "its scores are capped, so transformers computes them itself",
    "gpt-oss": "its scores share their softmax with a sink, which its own code computes",
    "llama4": "its texts are cut into chunks",
    "qwen3-next": "it carries a state from token to token",
    "falcon": "it asks torch for attention by itself",
    "falcon-alibi": "it asks torch for attention by itself",
    "bloom": "it computes attention by itself",
    "mamba": "it carries a state from token to token",
    "deberta-v2": "it computes attention by itself",
    "deberta-v3": "it computes attention by itself",
}
"""Architectures that are never packed, and why."""


def by_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    *,
    causal: bool,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """What `varlen` promises, text by text."""
    found = torch.empty_like(query)
    for start, stop in itertools.pairwise(bounds.tolist()):
        assert stop - start <= longest
        hidden = torch.zeros(stop - start, stop - start, dtype=torch.bool)
        if causal:
            hidden |= torch.ones_like(hidden).triu(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window) | torch.ones_like(hidden).triu(window)
        one = (states[start:stop].transpose(0, 1)[None] for states in (query, key, value))
        attended = F.scaled_dot_product_attention(
            *one, attn_mask=~hidden, scale=scaling, enable_gqa=True
        )
        found[start:stop] = attended[0].transpose(0, 1)
    return found


def one_text(*what: Any, **how: Any) -> torch.Tensor:
    *states, bounds, _ = what
    whole = bounds[[0, -1]]
    return by_text(*states, whole, int(whole[1]), **how)


def whole_texts(*what: Any, **how: Any) -> torch.Tensor:
    return by_text(*what, **how | {"window": None})


def one_off(*what: Any, **how: Any) -> torch.Tensor:
    return by_text(*what, **how | {"window": how["window"] and how["window"] + 1})


def keys_of_the_first(query: Any, key: Any, value: Any, bounds: Any, *what: Any, **how: Any) -> Any:
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff())
    at = torch.arange(len(query)) - starts
    return by_text(query, key[at], value[at], bounds, *what, **how)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmembed.extract.fast.attention.varlen", by_text)


def extractor(folder: Path, **options: Any) -> Extractor:
    recipe = Recipe(
        model=str(folder), max_length=MAX_LENGTH, compute_dtype="float32", dtype="float32"
    )
    poolings = ["mean", "last", "first", "max", "weighted"]
    options = {"layers": range(5), "poolings": poolings, "token_budget": 100} | options
    return Extractor(recipe, device="cpu", **options)


def packed(folder: Path, **options: Any) -> Extractor:
    ours = extractor(folder, **options)
    ours._packs = packing.try_packing(ours.backbone, MAX_LENGTH)
    ours.n_lanes = 1  # as on a GPU
    return ours


@pytest.mark.parametrize("name", ZOO)
def test_a_model_is_packed_where_it_keeps_texts_apart(name: str, tmp_path: Path) -> None:
    """Features of packed texts are those of padded ones; who would mix texts is not packed."""
    ours = packed(save_animal(name, tmp_path))
    assert ours._packs == (name not in ALONE)
    expected = extractor(tmp_path).features(TEXTS)
    for key, feature in ours.features(TEXTS).items():
        distance = np.linalg.norm(feature - expected[key], axis=1)
        assert (distance / np.linalg.norm(expected[key], axis=1)).max() < 1e-5


def in_half(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    """The same model in another arithmetic, as on a GPU."""
    backbone.model.to(dtype)
    return dataclasses.replace(backbone, compute_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "bert", "modernbert"])
def test_a_kernel_that_is_wrong_is_found(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ignores where texts begin or end, or a window, or sees one token too far."""
    backbone = in_half(extractor(save_animal(name, tmp_path)).backbone, dtype)
    assert packing.try_packing(backbone, MAX_LENGTH)
    wrong = [one_text, keys_of_the_first]
    if name not in ("llama", "bert"):
        wrong += [whole_texts, one_off]
    for kernel in wrong:
        backbone.model.set_attn_implementation("sdpa")
        monkeypatch.setattr("llmembed.extract.fast.attention.varlen", kernel)
        assert not packing.try_packing(backbone, MAX_LENGTH), kernel.__name__
        assert backbone.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "opt"])
def test_positions_that_run_on_are_found(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A model with learned positions is not packed if those of a text do not begin anew."""
    backbone = in_half(extractor(save_animal(name, tmp_path)).backbone, dtype)
    assert packing.try_packing(backbone, MAX_LENGTH)

    def run_on(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {key: value for key, value in kwargs.items() if key != "position_ids"}

    backbone.model.set_attn_implementation("sdpa")
    backbone.model.register_forward_pre_hook(run_on, with_kwargs=True)
    assert not packing.try_packing(backbone, MAX_LENGTH)


@pytest.mark.parametrize("name", ["mistral-window", "modernbert"])
def test_the_first_batch_is_checked_with_all_windows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trial did not see: texts alone keep their masks, though packed ones have none."""
    ours = packed(save_animal(name, tmp_path))
    monkeypatch.setattr("llmembed.extract.fast.attention.varlen", whole_texts)
    with pytest.raises(ExtractionError, match="of the first batch differs by"):
        ours.features(TEXTS)
    assert ours.backbone.model.config._attn_implementation == PACKED


def test_pairs_keep_their_token_types(bert: Path) -> None:
    """BERT tells the texts of a pair apart, packed or not."""
    recipe = Recipe(
        model=str(bert), max_length=40, compute_dtype="float32", dtype="float32", text_pair=True
    )
    ours = Extractor(recipe, layers=[2], poolings=["mean"], device="cpu", token_budget=50)
    pairs = [f"{a}\x1f{b}" for a, b in zip(TEXTS[:10], TEXTS[10:20], strict=True)]
    expected = ours.features(pairs)["mean", 2]
    ours._packs = packing.try_packing(ours.backbone, 40)
    assert ours._packs
    np.testing.assert_allclose(ours.features(pairs)["mean", 2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, on import
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_compiled_blocks_give_the_same(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a decoder and of an encoder are compiled, and features stay what they were."""
    from torch._dynamo.utils import counters

    # torch's own place does not tell what a process held to AVX2 compiled from what one with
    # AVX-512 did, and running the wrong one corrupts memory (torch 2.13).
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    texts = [text for n in (1, 40) for text in TEXTS[:n]]
    ours = packed(request.getfixturevalue(model), layers=[1, 2], token_budget=64)
    expected = ours.features(texts)
    torch._dynamo.reset()
    counters.clear()
    packing.compile_blocks(ours.backbone)
    ours._compiled = True
    found = ours.features(texts)
    assert counters["stats"]["unique_graphs"] > 1
    for name, feature in found.items():
        np.testing.assert_allclose(feature, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_each_number_of_positions_is_compiled_once(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all blocks together, also beyond torch's own limit of 8; none for a smaller budget."""
    graphs, sizes, run = [], set[int](), torch.compile

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append({size for one in inputs for size in getattr(one, "shape", ())})
        return graph.forward

    def noted(*what: Any, n_positions: int, **others: Any) -> Any:
        sizes.add(n_positions)
        return packing.packed_hidden_states(*what, n_positions=n_positions, **others)

    monkeypatch.setattr(torch, "compile", functools.partial(run, backend=counted))
    monkeypatch.setattr("llmembed.extract.features.extractor.packed_hidden_states", noted)
    ours = packed(llama, layers=[1, 2], token_budget=640)
    ours._compiled = True
    torch._dynamo.reset()
    packing.compile_blocks(ours.backbone)
    rows = [[5 + index % 90] * length for index, length in enumerate(SST2 * 2)]
    for n_rows in range(4, len(rows), 4):
        ours.compute(rows[:n_rows])
    # A block is cut at its attention, and behind it at a hook of transformers: at most four graphs.
    assert len(sizes) > 8
    assert sizes <= set().union(*graphs)
    assert len(graphs) <= 4 * len(sizes)
    ours.token_budget //= 2
    found = ours.compute(rows)
    assert len(graphs) <= 4 * len(sizes)
    assert {size % 20 for size in sizes if size > 20} == {0}
    expected = extractor(llama, layers=[1, 2]).compute(rows)
    for name, feature in found.items():
        np.testing.assert_allclose(feature, expected[name], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_compiled_runs_as_it_is(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning says so, and the features are right."""
    from torch._dynamo.exc import Unsupported

    def fails(forward: Any, **_: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            raise Unsupported("no compiler")

        return run

    ours = packed(llama, layers=[2])
    expected = ours.features(TEXTS)
    monkeypatch.setattr(torch, "compile", fails)
    packing.compile_blocks(ours.backbone)
    with pytest.warns(match=r"blocks could not be compiled \(Unsupported\) and run as they are"):
        found = ours.features(TEXTS)
    for name, feature in found.items():
        np.testing.assert_array_equal(feature, expected[name])


def test_a_packed_batch_is_halved_by_its_tokens(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long text among short ones, each as long to a padded batch: the budget still shrinks."""
    ours = packed(llama, layers=[2], token_budget=192)
    ours.features(TEXTS[:2])  # the check of the first batch
    texts = Tokenized(ids=[[5] * 40] + [[6, 7]] * 76)
    expected, run = ours.compute(texts), ours._run

    def run_in_little_memory(batch: Tokenized, width: int) -> Any:
        if batch.n_tokens.sum() > 60:
            raise torch.OutOfMemoryError
        return run(batch, width)

    monkeypatch.setattr(ours, "_run", run_in_little_memory)
    with pytest.warns(match="192 tokens a batch do not fit"):
        found = ours.compute(texts)
    assert ours.token_budget <= 60
    for name, feature in found.items():
        np.testing.assert_allclose(feature, expected[name], rtol=1e-4, atol=1e-5)
