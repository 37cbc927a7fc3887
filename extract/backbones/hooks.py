"""Hooks that show the hidden states of a pass to whoever runs it, several passes at once.

They are put on the blocks once, since a hook that comes and goes while another thread is in the
model would be seen there. Which layers are shown, and to whom, belongs to the thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Show = Callable[[int, Tensor], None]
"""Takes a layer and its hidden states `[B, T, H]`."""

_shown: ContextVar[tuple[Collection[int], Show] | None] = ContextVar("shown", default=None)


def tap(blocks: torch.nn.ModuleList, n_layers: int) -> None:
    """Put the hooks on.

    Layer k is what enters block k + 1, since some models work between two blocks (DeBERTa-v2 has a
    convolution after the first); above the topmost block it is what leaves that block. Layer
    `n_layers`, which passes the final norm, is not seen here.

    Args:
        blocks: the blocks kept.
        n_layers: blocks of the whole model.
    """
    for layer, block in enumerate(blocks):
        block.register_forward_pre_hook(_entering(layer), with_kwargs=True)
    if len(blocks) < n_layers:
        blocks[-1].register_forward_hook(_leaving(len(blocks)))


@contextlib.contextmanager
def showing(layers: Collection[int], show: Show) -> Iterator[None]:
    """Show these layers of all passes of this thread meanwhile."""
    before = _shown.set((layers, show))
    try:
        yield
    finally:
        _shown.reset(before)


def _show(layer: int, hidden: Tensor) -> None:
    shown = _shown.get()
    if shown is not None and layer in shown[0]:
        shown[1](layer, hidden)


def _entering(layer: int) -> Callable[..., None]:
    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _show(layer, args[0] if args else kwargs["hidden_states"])

    return hook


def _leaving(layer: int) -> Callable[..., None]:
    def hook(_: torch.nn.Module, __: Any, output: Any) -> None:
        _show(layer, output[0] if isinstance(output, tuple) else output)

    return hook
