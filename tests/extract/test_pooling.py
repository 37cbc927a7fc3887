from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmembed.common.errors import ConfigError
from llmembed.extract import ExtractConfig, Extractor, Recipe, register_pooling
from llmembed.extract.features.pooling import pool
from llmembed.extract.features.poolings import POOLINGS

REAL_ONLY = [n for n in POOLINGS if POOLINGS[n].home and not POOLINGS[n].reads_pads]


def states(layer: int, n_tokens: int, width: int) -> torch.Tensor:
    """Hidden states `[1, width, 2]` whose value at token t is 100 * layer + t; pads hold NaN."""
    values = 100.0 * layer + torch.arange(1, width + 1)
    values[n_tokens:] = torch.nan
    return values[None, :, None].expand(1, width, 2).clone()


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("mean", 302.0), ("last", 303.0), ("first", 301.0), ("max", 303.0), ("weighted", 302 + 1 / 3)],
)
def test_poolings_give_the_values_of_arithmetic(pooling: str, expected: float) -> None:
    """Over states 301, 302, 303 each pooling is what one computes by hand, whatever pads hold."""
    feature = pool(states(3, 3, 5), torch.tensor([3]), [pooling])[pooling]
    torch.testing.assert_close(feature, torch.full((1, 2), expected))


def test_mean_padded_counts_the_pads() -> None:
    """The paper's mean reads every position, pads included."""
    padded = states(3, 3, 3)
    padded = torch.cat([padded, torch.zeros(1, 3, 2)], dim=1)
    feature = pool(padded, torch.tensor([3]), ["mean_padded"])["mean_padded"]
    torch.testing.assert_close(feature, torch.full((1, 2), 151.0))


@given(st.integers(1, 40), st.integers(0, 40), st.sampled_from(REAL_ONLY))
def test_padding_does_not_change_a_feature(n_tokens: int, n_pads: int, pooling: str) -> None:
    """Any number of pads on the right leaves a feature as it is."""
    hidden = torch.randn(1, n_tokens, 8, generator=torch.Generator().manual_seed(n_tokens))
    padded = torch.cat([hidden, torch.full((1, n_pads, 8), torch.inf)], dim=1)
    lengths = torch.tensor([n_tokens])
    alone, with_pads = (pool(states, lengths, [pooling])[pooling] for states in (hidden, padded))
    torch.testing.assert_close(alone, with_pads, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pooling", [*REAL_ONLY, "mean_padded"])
def test_half_precision_states_are_pooled_in_float32(pooling: str) -> None:
    """The sum of many bfloat16 states keeps float32's precision."""
    hidden = torch.full((1, 4096, 1), 1.0078125, dtype=torch.bfloat16)
    feature = pool(hidden, torch.tensor([4096]), [pooling])[pooling]
    torch.testing.assert_close(feature, torch.full((1, 1), 1.0078125))
    assert feature.dtype == torch.float32


@pytest.fixture
def poolings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poolings that are registered meanwhile."""
    monkeypatch.setattr(POOLINGS, "_specs", dict(POOLINGS._specs))


@pytest.mark.usefixtures("poolings")
def test_a_pooling_of_one_s_own_is_used_by_its_name(llama: Path) -> None:
    """What `register_pooling` decorates is computed as those built in, at its layers alone."""

    @register_pooling("top", last_layer_only=True)
    def top(hidden: torch.Tensor, n_tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return hidden.float().masked_fill(~real[..., None], -torch.inf).amax(dim=1)

    @register_pooling("width", reads_pads=True)
    def width(hidden: torch.Tensor, n_tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return torch.full((len(hidden), hidden.shape[2]), float(hidden.shape[1]))

    recipe = Recipe(model=str(llama), max_length=16, compute_dtype="float32", dtype="float32")
    poolings = ["max", "top", "width"]
    features = Extractor(recipe, layers=[1, 3], poolings=poolings).features(["w1", "w2 w3"])
    assert set(features) == {("max", 1), ("width", 1), ("max", 3), ("top", 3), ("width", 3)}
    np.testing.assert_array_equal(features["top", 3], features["max", 3])
    assert set(features["width", 1].ravel()) == {16.0}
    assert ExtractConfig(model="m", layers="1", pooling=("top",)).pooling == ("top",)
    with pytest.raises(ConfigError, match="pooling 'top' is registered already"):
        register_pooling("top")(width)


def test_a_pooling_that_does_not_exist_is_refused() -> None:
    """By its name, with one that is close."""
    with pytest.raises(ConfigError, match=r"pooling 'meen' does not exist; did you mean 'mean'\?"):
        ExtractConfig(model="m", layers="1", pooling=("meen",))
    assert [*POOLINGS] == ["mean", "last", "first", "max", "weighted", "mean_padded", "pooler"]
