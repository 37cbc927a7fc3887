from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmembed.common.errors import ConfigError
from llmembed.common.layers import named_layers, parse_layers

BOUND = st.integers(-40, 40) | st.none()


@pytest.mark.parametrize(
    ("specification", "layers"),
    [
        ("8,16,24", (8, 16, 24)),
        ("24,8,8", (8, 24)),
        ("-1", (32,)),
        ("0", (0,)),
        ("last:3", (30, 31, 32)),
        ("all", tuple(range(33))),
        ("1:33:8, 0", (0, 1, 9, 17, 25)),
    ],
)
def test_a_specification_names_layers(specification: str, layers: tuple[int, ...]) -> None:
    """Numbers, negatives, ranges, `last:k` and `all` mean what the manual says, each layer once."""
    assert parse_layers(specification, 32, "llama2-7b") == layers


@given(BOUND, BOUND, st.integers(-5, 5).filter(bool))
def test_a_range_is_a_python_slice(start: int | None, stop: int | None, step: int) -> None:
    """`start:stop:step` selects from 0..n_layers as a Python slice does."""
    text = ":".join("" if bound is None else str(bound) for bound in (start, stop, step))
    expected = tuple(sorted(range(13)[slice(start, stop, step)]))
    if expected:
        assert parse_layers(text, 12, "toy") == expected
    else:
        with pytest.raises(ConfigError, match="does not exist in toy, which has 12 layers"):
            parse_layers(text, 12, "toy")


@pytest.mark.parametrize("specification", ["40", "-34", "last:40"])
def test_a_layer_out_of_range_is_refused_with_the_range(specification: str) -> None:
    """A layer that does not exist is named together with those that do."""
    message = "does not exist in llama2-7b, which has 32 layers (1-32; 0 is the embeddings)"
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_layers(specification, 32, "llama2-7b")


@pytest.mark.parametrize("specification", ["eight", "1:2:3:4", "last:", "1-4", "1::0"])
def test_what_is_no_layer_is_refused(specification: str) -> None:
    """Anything else is an error that quotes it."""
    with pytest.raises(ConfigError, match=re.escape(f"--layers has '{specification}'")):
        parse_layers(specification, 32, "llama2-7b")


def test_a_list_of_layers_is_refused() -> None:
    """Layers are a string in Python, too."""
    layers: Any = [8, 16]
    with pytest.raises(ConfigError, match=r"layers is \[8, 16\], no string\. Pass one, such as"):
        parse_layers(layers, 32, "llama2-7b")


def test_an_empty_specification_is_refused() -> None:
    """Commas alone name nothing."""
    with pytest.raises(ConfigError, match="--layers ',' names no layer"):
        parse_layers(",", 32, "llama2-7b")


@pytest.mark.parametrize(
    ("part", "layers"),
    [("-1", ()), ("-9", (24,)), ("last:2", (16, 24)), ("last:4", ()), ("9:", (16, 24))],
)
def test_numbers_name_layers_of_the_model_and_ranges_choose_among_the_cached(
    part: str, layers: tuple[int, ...]
) -> None:
    """With 8, 16, 24 of 32 layers cached, -1 is layer 32 and not there; `last:2` is 16 and 24."""
    assert named_layers(part, 32, [8, 16, 24]) == layers
