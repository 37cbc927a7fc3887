"""Attention by products against torch's own, and where it is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import toy_texts

from llmembed.extract import Extractor, Recipe
from llmembed.extract.fast import attention
from llmembed.extract.fast.attention import PRODUCTS, causal_attention


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
