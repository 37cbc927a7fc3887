"""Products of 8 bits: against rounding by hand, against torch's own, and where they are refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from toy_model import toy_texts
from zoo import ZOO, save_animal

from llmembed.common.errors import ConfigError, ModelError
from llmembed.extract import Extractor, Recipe
from llmembed.extract.backbones.float8 import Float8Linear, refuse_without_float8, rounded

TEXTS = toy_texts(20, longest=13)
E4M3 = np.array(
    sorted(
        {
            (-1.0) ** sign
            * (2.0**-9 * mantissa if not power else 2.0 ** (power - 10) * (8 + mantissa))
            for sign in (0, 1)
            for power in range(16)
            for mantissa in range(8)
            if (power, mantissa) != (15, 7)  # not a number
        }
    )
)
"""Every float8: 4 bits of exponent, 3 of mantissa (Micikevicius et al. 2022, table 1)."""


def nearest(rows: np.ndarray) -> np.ndarray:
    """Round each row to the nearest float8, to the even one of two, its largest to 448; float64."""
    scale = (np.abs(rows).max(axis=1, keepdims=True) / np.float32(448)).astype(np.float32)
    scaled = (rows / scale).astype(np.float64)
    at = np.clip(np.searchsorted(E4M3, scaled), 1, len(E4M3) - 1)
    to_below, to_above = scaled - E4M3[at - 1], E4M3[at] - scaled
    is_even = (at - 1 - np.flatnonzero(E4M3 == 0)) % 2 == 0  # counted from 0, where mantissas are
    goes_below = (to_below < to_above) | ((to_below == to_above) & is_even)
    return E4M3[np.where(goes_below, at - 1, at)] * scale


def extractor(folder: Path, quantize: str | None, compute_dtype: str = "float32") -> Extractor:
    recipe = Recipe(
        model=str(folder),
        max_length=16,
        compute_dtype=compute_dtype,
        dtype="float32",
        quantize=quantize,
    )
    return Extractor(recipe, layers=[2], poolings=["mean"], token_budget=64, device="cpu")


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    distance = np.linalg.norm(found - expected, axis=1)
    return float((distance / np.linalg.norm(expected, axis=1)).max())


def test_rows_are_rounded_to_the_nearest_float8() -> None:
    """By a table of all float8 values, each row by its own largest one, small or large."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 64, generator=generator) * 10.0 ** torch.arange(-25, 25)[:, None]
    values, scale = rounded(rows)
    found = values.double() * scale.double()
    np.testing.assert_allclose(found.numpy(), nearest(rows.numpy()), rtol=1e-6)
    assert values.dtype == torch.float8_e4m3fn
    assert (found - rows).norm() / rows.double().norm() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_that_of_the_rounded_factors(dtype: torch.dtype) -> None:
    """Summed in float32, scaled by row and column, given in bfloat16; the bias comes after."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).to(dtype)
    states = torch.randn(2, 7, 64, dtype=dtype)
    found = Float8Linear(linear)(states)
    assert (found.shape, found.dtype) == ((2, 7, 48), dtype)
    weight, bias = (linear.weight.detach().float().numpy(), linear.bias.detach().double().numpy())
    expected = nearest(states.reshape(14, 64).float().numpy()) @ nearest(weight).T + bias
    assert largest_difference(found.detach().double().numpy().reshape(14, 48), expected) < 4e-3


def test_the_product_is_torch_s_own_scaled_one() -> None:
    """What a GPU is asked for, asked of the CPU, gives the same to the last bit of bfloat16."""
    torch.manual_seed(0)
    linear = Float8Linear(torch.nn.Linear(64, 48, bias=False))
    states = torch.randn(14, 64)
    rows, scale = rounded(states)
    try:
        expected = torch._scaled_mm(
            rows,
            linear.weight.t(),
            scale_a=scale,
            scale_b=linear.scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    except RuntimeError as error:
        pytest.skip(f"this torch has no such product on a CPU: {error}")
    torch.testing.assert_close(linear(states), expected.float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "modernbert", "mixtral"])
def test_features_are_those_of_rounded_linear_layers(name: str, tmp_path: Path) -> None:
    """Each text alone through transformers, its linear layers rounded, gives the same to 1e-4."""
    ours = extractor(save_animal(name, tmp_path), "fp8")
    model: Any = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    kinds = {name: type(m) for name, m in ours.backbone.model.named_modules()}
    eights = [name for name, kind in kinds.items() if kind is Float8Linear]
    assert eights
    for path in eights:
        parent, _, child = path.rpartition(".")
        linear = copy.deepcopy(model.get_submodule(path))
        setattr(model.get_submodule(parent), child, Float8Linear(linear))
    expected = []
    with torch.inference_mode():
        for ids in ours.tokenize(TEXTS).ids:
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            expected.append(states[2][0].mean(dim=0).numpy())
    found = ours.features(TEXTS)["mean", 2]
    # A last bit that another batch rounds otherwise may cross to the next float8.
    distance = np.linalg.norm(found - np.stack(expected), axis=1)
    relative = distance / np.linalg.norm(expected, axis=1)
    assert np.median(relative) < 1e-4
    assert relative.max() < 0.1
    exact = extractor(tmp_path, None).features(TEXTS)["mean", 2]
    assert 1e-3 < largest_difference(found, exact) < 0.5


def test_the_fingerprint_tells_it(llama: Path) -> None:
    """A cache of fp8 refuses features of another arithmetic; bitsandbytes is not needed."""
    assert extractor(llama, "fp8").recipe.fingerprint["quantize"] == "fp8"


CARDS = {"cuda:0": (7, 5), "cuda:1": (8, 6), "cuda:2": (8, 9), "cuda:3": (9, 0)}


@pytest.mark.parametrize("name", [*CARDS, "mps"])
def test_a_device_without_such_products_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence says what the device has, and what to pass; Ada and Hopper are served."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARDS[str(device)])
    device = torch.device(name)
    if CARDS.get(name, (0, 0)) >= (8, 9):
        refuse_without_float8(device)
        return
    has = {"cuda:0": "compute capability 7.5", "cuda:1": "compute capability 8.6"}
    message = (
        f"--quantize fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or more, and {name} "
        f"has {has.get(name, 'no float8')}. Pass --quantize nf4 or int8, or --device cpu"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        refuse_without_float8(device)


def test_a_card_is_asked_before_the_weights_are_read(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal costs no loading."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    recipe = extractor(llama, "fp8").recipe
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)
    with pytest.raises(ConfigError, match=r"and cuda:0 has compute capability 7\.5"):
        Extractor(recipe, layers=[2], poolings=["mean"], device="cuda:0")


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    """GPT-2's products are of another class: nothing would be rounded, and that is said."""
    save_animal("gpt2", tmp_path / "gpt2", ZOO["gpt2"])
    message = r"gpt2 \(GPT2Model\) has no linear layers that --quantize fp8 could round"
    with pytest.raises(ModelError, match=message):
        extractor(tmp_path / "gpt2", "fp8")
