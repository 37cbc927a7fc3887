"""Prompts behind each text: the text is read once, and each prompt from its keys and values.

The tokens of all prompts are a tree that hangs behind a text: a token sees the text and those
before it in its own prompt, and prompts that begin alike share their beginning. Texts are columns
of a batch as ever, padded on the right; the tree stands in the columns behind, at positions that go
on where the text ends. So every product of the model is over texts and prompts together, and only
attention knows of the tree. What comes out is, up to rounding, what the text with that prompt
behind it gives alone.

That needs a model whose tokens meet in attention only, by position and causally. Where a trial
shows that it is not so, each prompt is computed with its text before it, as a text of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llmembed.extract.backbones.load import Backbone, has_token_types, keeps_positions
from llmembed.extract.backbones.recipe import Recipe, no_prompts_behind
from llmembed.extract.fast.attention import (
    PRODUCTS,
    attends_by,
    branched_texts,
    unpacked,
    use_branches,
)
from llmembed.extract.features.forward import (
    Pooled,
    Tokenized,
    model_inputs,
    pool_layer,
    pooled_hidden_states,
    run_showing,
    to_device,
)
from llmembed.extract.features.packing import SPANS
from llmembed.extract.features.selfcheck import agree
from llmembed.extract.texts.prompts import pooling_of

_CARRIED = ("mamba", "ssm_", "linear_", "conv_", "recurrent", "rwkv")
"""How settings begin of layers that carry something from token to token beside attention."""
_ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
_TRIED_LENGTHS = (7, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branches:
    """The tokens of prompts, and the tree that they make; P nodes."""

    suffixes: Mapping[str, tuple[int, ...]]
    """Pooling -> token ids of its prompt."""
    n_closing: int
    """Special tokens that close each text, which a prompt stands before."""

    @classmethod
    def of(cls, recipe: Recipe, prompts: Mapping[str, str]) -> Self:
        """Tokenise prompts, by name."""
        suffixes = {pooling_of(name): recipe.suffix(prompt) for name, prompt in prompts.items()}
        return cls(suffixes=suffixes, n_closing=recipe.n_closing)

    @functools.cached_property
    def paths(self) -> list[tuple[int, ...]]:
        """Each node by the tokens that lead to it and its own."""
        begun = (ids[:n] for ids in self.suffixes.values() for n in range(1, len(ids) + 1))
        return list(dict.fromkeys(begun))

    @functools.cached_property
    def ends(self) -> dict[str, int]:
        """Pooling -> the node of its prompt's last token."""
        places = {path: node for node, path in enumerate(self.paths)}
        return {pooling: places[ids] for pooling, ids in self.suffixes.items()}

    @functools.cached_property
    def sees(self) -> npt.NDArray[np.bool_]:
        """Which node sees which: those on its path, `[P, P]`."""
        paths = self.paths
        return np.array([[path[: len(other)] == other for other in paths] for path in paths])

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.suffixes.values()))

    def begin(self, lengths: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Tell before which token of texts of these lengths the prompts stand."""
        return np.maximum(lengths - self.n_closing, 0) if self.n_closing else lengths

    def behind(self, texts: Tokenized, pooling: str) -> Tokenized:
        """Put one prompt behind each text."""
        ids, suffix = [], self.suffixes[pooling]
        for row, stop in zip(texts.ids, self.begin(texts.n_tokens), strict=True):
            ids.append([*row[:stop], *suffix])
        types = texts.types
        if types is not None:
            rows = zip(types, ids, strict=True)
            types = [[*row, *[row[-1]] * len(suffix)][: len(new)] for row, new in rows]
        return Tokenized(ids=ids, types=types)


def branched_hidden_states(
    backbone: Backbone,
    texts: Tokenized,
    layers: Sequence[int],
    poolings: Sequence[str],
    branches: Branches,
    *,
    width: int,
    pad: int = 0,
) -> Pooled:
    """Run one batch with the prompts behind each text, and pool the wanted layers.

    Texts are padded on the right to `width` tokens. The model must `share_texts`.
    """
    device, lengths = backbone.device, texts.n_tokens.astype(np.int64)
    begin, n_tokens = branches.begin(lengths), to_device(backbone.device, lengths)
    table = np.full((len(lengths), width), pad, dtype=np.int64)  # [B, T]
    for index, row in enumerate(texts.ids):
        table[index, : len(row)] = row
    nodes = np.array([path[-1] for path in branches.paths])
    depths = np.array([len(path) - 1 for path in branches.paths])
    columns = np.arange(width)
    ids = np.hstack([table, np.broadcast_to(nodes, (len(lengths), len(nodes)))])
    positions = np.hstack([np.broadcast_to(columns, table.shape), begin[:, None] + depths])
    shape = (len(lengths), 1, len(nodes))
    sees = np.concatenate(
        [
            np.broadcast_to((columns < begin[:, None])[:, None, None], (*shape, width)),
            np.broadcast_to(branches.sees, (*shape, len(nodes))),
        ],
        axis=-1,
    )
    inputs = model_inputs(backbone, to_device(device, ids), None) | {"attention_mask": None}
    inputs["position_ids"] = to_device(device, positions + backbone.first_position)
    pooled: Pooled = {}

    def keep(layer: int, hidden: Tensor) -> None:
        if poolings:
            group = (hidden[:, :width], n_tokens)
            pooled.update(pool_layer(backbone, layer, [group], poolings))
        for pooling, node in branches.ends.items():
            pooled[pooling, layer] = hidden[:, width + node].float()

    with branched_texts(width, to_device(device, sees)):
        run_showing(backbone, inputs, layers, keep)
    return pooled


def refuse_seeing_ahead(backbone: Backbone, name: str) -> None:
    """Refuse a model in which a token sees those behind it, tried where it does not say so.

    Raises:
        ConfigError: a prompt behind a text is none there.
    """
    if backbone.causal:
        return
    texts = [Tokenized(ids=[[5, 6, 7, last]]) for last in (8, 9)]
    layers = [len(backbone.blocks)]
    first, other = (pooled_hidden_states(backbone, text, layers, ["first"]) for text in texts)
    if not all(agree(first[key], other[key], "first", backbone) for key in first):
        raise no_prompts_behind(name)


def share_texts(backbone: Backbone, branches: Branches, max_length: int) -> bool:
    """Let the model read each text once for all its prompts, and tell whether it can.

    If it does not give what texts with their prompts give alone, it is left as it is.
    """
    model: Any = backbone.model
    before = attends_by(model)
    if before not in ("sdpa", PRODUCTS) or not _meets_in_attention_only(
        backbone, max_length + branches.longest
    ):
        return False
    use_branches(model)
    if _gives_the_same(backbone, branches):
        return True
    model.set_attn_implementation(before)
    return False


def _meets_in_attention_only(backbone: Backbone, n_tokens: int) -> bool:
    """Tell whether tokens of texts that long meet in full causal attention, and nowhere else."""
    config: Any = backbone.model.config
    kinds = getattr(config, "layer_types", None) or ()
    spans = [getattr(config, name, None) or n_tokens for name in SPANS]
    settings = [name for name, value in vars(config).items() if value]
    return (
        backbone.causal
        and not has_token_types(config)
        and keeps_positions(config)
        and min(spans) >= n_tokens
        and set(kinds) <= _ATTENTIONS
        and not any(name.startswith(_CARRIED) for name in settings)
    )


def _gives_the_same(backbone: Backbone, branches: Branches) -> bool:
    draw = np.random.default_rng(0).integers
    texts = Tokenized(ids=[draw(5, 16, size=n).tolist() for n in _TRIED_LENGTHS])
    layers = [*range(1, len(backbone.blocks) + 1)]
    with contextlib.suppress(RuntimeError, TypeError, ValueError, KeyError, IndexError):
        # What raises is an architecture that takes no positions, or another attention.
        width = max(_TRIED_LENGTHS)
        shared = branched_hidden_states(backbone, texts, layers, ["last"], branches, width=width)
        alone = dict(_alone(backbone, texts, layers, branches))
        return all(
            # Rounding has not gone far in the first layer, where a wrong mask would show.
            agree(feature, shared[pooling, layer][row], "mean" if layer == 1 else "last", backbone)
            for (pooling, layer, row), feature in alone.items()
        )
    return False


def _alone(
    backbone: Backbone, texts: Tokenized, layers: Sequence[int], branches: Branches
) -> Iterator[tuple[tuple[str, int, int], Tensor]]:
    """Compute texts, and each with each prompt, one at a time: (pooling, layer, row) -> `[H]`."""
    with unpacked(backbone.model):
        for row in range(len(texts.ids)):
            text = texts.take(np.array([row]))
            of = {name: branches.behind(text, name) for name in branches.suffixes} | {"last": text}
            for pooling, one in of.items():
                for (_, layer), feature in pooled_hidden_states(
                    backbone, one, layers, ["last"]
                ).items():
                    yield (pooling, layer, row), feature[0]


def renamed(pooled: Pooled, pooling: str) -> Pooled:
    """Name features of texts that have a prompt behind them by that prompt."""
    return {(pooling, layer): feature for (_, layer), feature in pooled.items()}
