"""The poolings by name, and what is to be known of each; read without importing torch.

A pooling makes one feature of the hidden states of a text. Register your own with
`register_pooling`; an installed package does it in the module that its entry point of the group
`llmembed.poolings`, named like the pooling, leads to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from llmembed.common.registry import Registry

_Function = TypeVar("_Function", bound=Callable[..., Any])
_OURS = "llmembed.extract.features.pooling"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolingSpec:
    """What is to be known of a pooling."""

    home: Callable[..., Any] | str | None
    """The function, or `module:name` of it; None takes the model's own `pooler_output`."""
    last_layer_only: bool = False
    """It exists at the model's last layer alone."""
    reads_pads: bool = False
    """It counts pads, so each text is padded to `max_length`."""
    smooth: bool = False
    """Rounding averages out in it, as in a mean over tokens; it is held to a closer check then."""


POOLINGS = Registry[PoolingSpec]("pooling", group="llmembed.poolings")

for _name, _spec in {
    "mean": PoolingSpec(home=f"{_OURS}:mean", smooth=True),
    "last": PoolingSpec(home=f"{_OURS}:last"),
    "first": PoolingSpec(home=f"{_OURS}:first"),
    "max": PoolingSpec(home=f"{_OURS}:largest"),
    "weighted": PoolingSpec(home=f"{_OURS}:position_weighted", smooth=True),
    "mean_padded": PoolingSpec(home=f"{_OURS}:mean_padded", smooth=True, reads_pads=True),
    "pooler": PoolingSpec(home=None, smooth=True, last_layer_only=True),
}.items():
    POOLINGS.register(_name, _spec)


def spec_of(pooling: str) -> PoolingSpec:
    """Give the facts of a pooling; that of a prompt has those of the pooling before its dot.

    >>> spec_of("last.it-was-64c6ad").home == spec_of("last").home
    True
    """
    return POOLINGS[pooling if pooling in POOLINGS else pooling.partition(".")[0]]


def register_pooling(name: str, **facts: bool) -> Callable[[_Function], _Function]:
    """Make a function a pooling; the facts are those of `PoolingSpec`, each False if not given.

    The function takes hidden states `[B, T, H]` of any floating dtype, padded on the right, the
    number of real tokens, int64 `[B]`, and which positions are real, bool `[B, T]`. It returns
    float32 `[B, H]`.

    Raises:
        ConfigError: the name stands for another pooling.
    """

    def register(function: _Function) -> _Function:
        POOLINGS.register(name, PoolingSpec(home=function, **facts))
        return function

    return register


def arrays_of(
    poolings: Iterable[str], layers: Iterable[int], n_layers: int
) -> list[tuple[str, int]]:
    """List the features (pooling, layer) that there are, of a model of `n_layers` layers.

    >>> arrays_of(["mean", "pooler"], [1, 12], n_layers=12)
    [('mean', 1), ('mean', 12), ('pooler', 12)]
    """
    layers = list(layers)
    return [
        (pooling, layer)
        for pooling in poolings
        for layer in layers
        if layer == n_layers or not spec_of(pooling).last_layer_only
    ]
