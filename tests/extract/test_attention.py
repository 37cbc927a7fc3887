"""Attention by products against torch's own, and where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import toy_texts

from llmembed.common.errors import ModelError
from llmembed.extract import Extractor, Recipe
from llmembed.extract.fast import attention
from llmembed.extract.fast.attention import PRODUCTS, causal_attention, use_packing


def heads(n_texts: int, n_heads: int, n_tokens: int, width: int, seed: int) -> torch.Tensor:
    """Random `[B, n_heads, T, D]`, laid out as a model's projections are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_texts, n_tokens, n_heads, width, generator=generator).transpose(1, 2)


@settings(deadline=None, max_examples=60)
@given(
    n_texts=st.integers(1, 3),
    n_groups=st.integers(1, 3),
    a_group=st.integers(1, 4),
    n_tokens=st.integers(1, 300),
    width=st.sampled_from([1, 8, 20]),
    scaling=st.sampled_from([0.125, 1.0]),
)
def test_products_give_what_torch_gives(
    n_texts: int, n_groups: int, a_group: int, n_tokens: int, width: int, scaling: float
) -> None:
    """For any number of texts, tokens, heads and groups, to float32's rounding."""
    query = heads(n_texts, n_groups * a_group, n_tokens, width, seed=0)
    key, value = (heads(n_texts, n_groups, n_tokens, width, seed=seed) for seed in (1, 2))
    expected = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    found = causal_attention(query, key, value, scaling).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "kind", "expected"),
    [
        ("bfloat16", "llama", PRODUCTS),
        ("float32", "llama", "sdpa"),
    ],
)
def test_only_bfloat16_attends_by_products(
    dtype: str, kind: str, expected: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU fast at bfloat16; float32 keeps torch's kernel, which is as fast there."""
    monkeypatch.setattr("llmembed.extract.backbones.load.is_fast_at_bfloat16", lambda: True)
    recipe = Recipe(model=str(llama), max_length=16, compute_dtype=dtype, dtype="float32")
    ours = Extractor(recipe, layers=[2], poolings=["mean"], device="cpu")
    assert ours.backbone.model.config._attn_implementation == expected


def test_a_model_gives_the_same_by_products(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features in bfloat16 differ from those by torch's kernel by no more than bfloat16 rounds."""
    monkeypatch.setattr("llmembed.extract.backbones.load.is_fast_at_bfloat16", lambda: True)
    recipe = Recipe(model=str(llama), max_length=40, compute_dtype="bfloat16", dtype="float32")
    texts, called = toy_texts(50, longest=30), []
    ours = Extractor(recipe, layers=[3], poolings=["mean"], device="cpu")
    products = attention.causal_attention
    monkeypatch.setattr(
        attention, "causal_attention", lambda *given: called.append(1) or products(*given)
    )
    found = torch.from_numpy(ours.features(texts)["mean", 3])
    assert called
    ours.backbone.model.set_attn_implementation("sdpa")
    expected = torch.from_numpy(ours.features(texts)["mean", 3])
    assert float((found - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize(("name", "given"), [("gemma2", "softcap"), ("gpt-oss", "s_aux")])
def test_what_the_kernels_do_not_know_is_refused(name: str, given: str) -> None:
    """A cap or a sink that reaches them is never left out in silence."""
    animal = zoo.ZOO[name]
    config = getattr(transformers, animal.config)(**zoo._COMMON | animal.settings)
    model: Any = transformers.AutoModel.from_config(config)
    use_packing(model)
    with pytest.raises(ModelError, match=rf"hands '{given}' to its attention, which torch's"):
        model(torch.tensor([[5, 6, 7]]))


def for_each_head(
    query: Any, key: Any, value: Any, bounds: Any, _: Any, *rest: Any, scale: Any, window_size: Any
) -> torch.Tensor:
    """As torch 2.11 has it: token i meets those of its text from i - left to i + right."""
    assert key.shape == query.shape
    text = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    away = torch.arange(len(query)) - torch.arange(len(query))[:, None]
    left, right = (len(query) if side < 0 else side for side in window_size)
    meets = (text[:, None] == text) & (away >= -left) & (away <= right)
    states = (one.transpose(0, 1)[None] for one in (query, key, value))
    return F.scaled_dot_product_attention(*states, attn_mask=meets, scale=scale)[0].transpose(0, 1)


def by_group(query: Any, key: Any, value: Any, *rest: Any, enable_gqa: bool, **how: Any) -> Any:
    """As torch 2.13 has it."""
    assert enable_gqa == (key.shape != query.shape)
    a_group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(a_group, dim=1) for states in (key, value))
    return for_each_head(query, key, value, *rest, **how)


@pytest.mark.parametrize("kernel", [for_each_head, by_group])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("n_groups", [1, 4])
def test_torch_s_kernel_is_asked_for_what_the_model_means(
    kernel: Any, causal: bool, window: int | None, n_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of W tokens reaches W - 1 to the left, and to the right where not causal."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    query = heads(1, 4, 12, 8, seed=0)[0].transpose(0, 1)
    key, value = (heads(1, n_groups, 12, 8, seed=seed)[0].transpose(0, 1) for seed in (1, 2))
    bounds = torch.tensor([0, 7, 8, 12], dtype=torch.int32)
    how: Any = {"causal": causal, "scaling": 0.3, "window": window}
    found = attention.varlen(query, key, value, bounds, 7, **how)
    torch.testing.assert_close(found, attention.exact(query, key, value, bounds, 7, **how))
