"""Texts packed behind each other, and blocks compiled: for GPUs, where both pay.

A packed pass computes no pad. It is used where a trial shows that the model keeps the texts apart:
one that ignores where texts begin, or carries a state from token to token, would mix them without
an error. A compiled block fuses everything between its products; it is compiled once for all blocks
of a model and for each number of positions, so there are few of those.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmembed.common.errors import LLMEmbedWarning
from llmembed.extract.backbones.load import Backbone
from llmembed.extract.fast.attention import (
    attends_by,
    compared,
    packed_texts,
    unpacked,
    use_packing,
)
from llmembed.extract.fast.graphs import Recorder
from llmembed.extract.features.batching import N_SHAPES
from llmembed.extract.features.forward import (
    Pooled,
    Tokenized,
    model_inputs,
    pool_layer,
    pooled_hidden_states,
    run_and_pool,
    run_showing,
    to_device,
)
from llmembed.extract.features.selfcheck import agree, allowed

SPANS = ("sliding_window", "local_attention", "attention_chunk_size")
"""Names that configurations give to how many tokens a layer sees at once."""


def packed_hidden_states(
    backbone: Backbone,
    texts: Tokenized,
    layers: Sequence[int],
    poolings: Sequence[str],
    *,
    n_positions: int | None = None,
    recorder: Recorder | None = None,
) -> Pooled:
    """Run texts packed behind each other, without a pad between them, and pool the wanted layers.

    No pooling may read pads or be the model's own. Positions beyond the tokens, up to
    `n_positions`, are filled with texts that nobody reads: a compiled block has one shape then.
    For a `recorder` the longest is rounded up, too, and so is the number of texts, by empty ones.
    """
    device, lengths = backbone.device, texts.n_tokens.astype(np.int64)
    longest, n_tokens = int(lengths.max()), int(lengths.sum())
    if recorder is not None:
        longest = _power_above(longest)
    fillers = _fillers((n_positions or n_tokens) - n_tokens, longest)
    if recorder is not None:
        n_texts = len(lengths) + len(fillers)
        fillers += [0] * (_power_above(n_texts + 1) - n_texts)
    bounds = np.cumsum([0, *lengths, *fillers])

    def joined(rows: Sequence[Sequence[int]]) -> Tensor:
        values = np.zeros(bounds[-1], dtype=np.int64)
        values[:n_tokens] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        return to_device(device, values[None])

    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))
    types = None if texts.types is None else joined(texts.types)
    inputs = model_inputs(backbone, joined(texts.ids), types) | {"attention_mask": None}
    inputs["position_ids"] = to_device(device, positions[None] + backbone.first_position)
    groups = []
    for group in _alike(lengths):
        index = bounds[: len(lengths)][group, None] + np.arange(lengths[group].max())  # [B, T]
        index = np.minimum(index, n_tokens - 1)
        groups.append((to_device(device, index), to_device(device, lengths[group])))

    def by_text(hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return ((hidden[0][at], n_real) for at, n_real in groups)

    on_device = to_device(device, bounds.astype(np.int32))
    if recorder is None:
        with packed_texts(on_device, longest):
            return run_and_pool(backbone, inputs, layers, poolings, by_text)

    def run(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        states: dict[int, Tensor] = {}
        given = inputs | {name: tensors[name] for name in inputs if name in tensors}
        with packed_texts(tensors["bounds"], longest):
            run_showing(backbone, given, layers, lambda at, x: states.update({at: x.clone()}))
        return states

    def use(states: dict[int, Tensor]) -> Pooled:
        parts = [pool_layer(backbone, at, by_text(x), poolings) for at, x in states.items()]
        return {name: feature for part in parts for name, feature in part.items()}

    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    tensors["bounds"] = on_device
    kind = (tuple(layers), longest, *(value.shape for value in tensors.values()))
    return recorder.run(kind, tensors, run, use)


def _power_above(n: int) -> int:
    """Round up to a power of two.

    >>> [_power_above(n) for n in (1, 2, 5)]
    [1, 2, 8]
    """
    return 1 << (n - 1).bit_length()


def _alike(lengths: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Cut texts into runs that are pooled at once: none is twice as long as another of its run.

    So all states that are padded for pooling are fewer than twice those of the texts.

    >>> [(group.start, group.stop) for group in _alike(np.array([9, 5, 4, 3, 1]))]
    [(0, 2), (2, 4), (4, 5)]
    """
    start, shortest, longest = 0, lengths[0], lengths[0]
    for at, length in enumerate(lengths):
        shortest, longest = min(shortest, length), max(longest, length)
        if longest >= 2 * shortest:
            yield slice(start, at)
            start, shortest, longest = at, length, length
    yield slice(start, len(lengths))


def _fillers(n_positions: int, longest: int) -> list[int]:
    """Cut positions that nobody reads into texts no longer than the longest.

    >>> _fillers(7, 3)
    [3, 3, 1]
    """
    whole, rest = divmod(n_positions, longest)
    return [longest] * whole + [rest] * (rest > 0)


def try_packing(backbone: Backbone, max_length: int) -> bool:
    """Let the model run packed texts of up to `max_length` tokens, and tell whether it can.

    If it does not keep them apart, it is left as it is.
    """
    model: Any = backbone.model
    if attends_by(model) != "sdpa":
        return False
    use_packing(model)
    if keeps_apart(backbone, max_length):
        return True
    model.set_attn_implementation("sdpa")
    return False


def keeps_apart(backbone: Backbone, max_length: int, recorder: Recorder | None = None) -> bool:
    """Try whether a packed pass gives for each text what it gives for it alone.

    In each layer the kernel must give what attention within each text is, too.
    """
    texts = _trial_texts(backbone.model.config, max_length)
    wanted = ("mean", len(backbone.blocks))
    what = ([len(backbone.blocks)], ["mean"])
    tolerance = allowed(backbone.compute_dtype, backbone.quantize, "mean")
    with contextlib.suppress(RuntimeError, TypeError, ValueError, KeyError, IndexError):
        # What raises is an architecture, kernel or card that does not take packed texts.
        with unpacked(backbone.model):
            alone = [pooled_hidden_states(backbone, Tokenized(ids=[one]), *what) for one in texts]
        with compared() as differences:
            packed = packed_hidden_states(backbone, Tokenized(ids=texts), *what, recorder=recorder)
        return bool(max(differences) <= tolerance) and all(
            agree(packed[wanted][row], one[wanted][0], "mean", backbone)
            for row, one in enumerate(alone)
        )
    return False


def _trial_texts(config: Any, max_length: int) -> list[list[int]]:
    """Make texts to try a model with: one is twice as long as it sees at once, where it is cut.

    The tokens are no model's pad.
    """
    spans = [getattr(config, name, None) or max_length for name in SPANS]
    longer = [min(2 * span, max_length) for span in spans if span < max_length]
    draw = np.random.default_rng(0).integers
    return [draw(5, 16, size=n).tolist() for n in (7, *longer, 2, 4)]


def compile_blocks(backbone: Backbone) -> None:
    """Compile what a block does, when it first runs; if that fails, it runs as it is, and says so.

    Compiling takes up to a minute, once for each number of positions.
    """
    from torch._dynamo import config as dynamo

    # With torch's own limit, 8, all further ones would run as they are, in silence. Blocks with and
    # without a window may differ.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * N_SHAPES)
    # Hidden states are asked for once before: then transformers puts hooks on the blocks, and what
    # was compiled before that would be compiled again.
    some = torch.tensor([[5, 6, 7]], device=backbone.device)
    with torch.inference_mode():
        backbone.model(output_hidden_states=True, **model_inputs(backbone, some, None))
    failed: list[str] = []
    for block in backbone.blocks:
        block.forward = _or_eager(block.forward, failed)


def are_compiled(backbone: Backbone) -> bool:
    """Tell whether blocks that were to be compiled could be."""
    blocks: Any = backbone.blocks
    return not any(block.forward.failed for block in blocks)


def _or_eager(forward: Any, failed: list[str]) -> Any:
    """Compile what a block does; once one has `failed`, all others run as they are."""
    from torch._dynamo.exc import TorchDynamoException

    compiled: Any = torch.compile(forward, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        if failed:
            return forward(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            failed.append(type(error).__name__)
            warnings.warn(
                f"blocks could not be compiled ({failed[0]}) and run as they are, slower. Install "
                "a C++ compiler or report this architecture.",
                LLMEmbedWarning,
                stacklevel=2,
            )
            return forward(*args, **kwargs)

    run.failed = failed  # type: ignore[attr-defined]
    return run
