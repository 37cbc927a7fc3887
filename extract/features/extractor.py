"""Texts in, features out: tokenise, batch, run, pool, round to the stored dtype.

Features stay on the device until all batches of a call are done, so that a GPU is never waited for
in between. One `Extractor` serves both the pipeline that fills a cache and the prediction of new
texts, so a text gets the same feature in both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmembed.common.errors import DataError, LLMEmbedWarning, ModelError, RowError
from llmembed.common.process import keep_freed_memory
from llmembed.extract.backbones.load import (
    Backbone,
    has_token_types,
    load_backbone,
    resolve_device,
)
from llmembed.extract.backbones.quiet import quiet
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.fast.lanes import Lanes
from llmembed.extract.fast.packing import compile_blocks, positions_of, try_packing
from llmembed.extract.features.batching import plan_batches, plan_packs
from llmembed.extract.features.forward import (
    SECOND,
    Pooled,
    packed_hidden_states,
    pooled_hidden_states,
    to_device,
)
from llmembed.extract.features.selfcheck import check_first_batch
from llmembed.extract.texts import describe_bad_text, fill

Features = dict[tuple[str, int], npt.NDArray[np.floating[Any]]]
"""(pooling, layer) -> float16 or float32 `[N, H]`."""

_TOKEN_BUDGET = {"cpu": 1024, "mps": 4096, "cuda": 16384}
"""Tokens a batch. On a CPU small batches stay in its caches; a GPU wants large ones. Where
weights are widened for each batch, twice as many: half the copies."""
_BATCH_COST = {"cpu": 32, "mps": 128, "cuda": 256}
"""Padded tokens that take as long as one batch more: reading the weights, starting kernels."""
_LANES = 2
"""Batches at a time on a CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenized:
    """Token ids of some texts."""

    ids: list[list[int]]
    """Token ids of each text, at least one."""
    n_truncated: int
    """Texts that were longer than `max_length`."""
    n_empty: int
    """Texts without any token, which got the one token described in `Recipe.empty_token`."""

    @property
    def n_tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of each text, int32 `[N]`."""
        return np.array([len(ids) for ids in self.ids], dtype=np.int32)

    def take(self, indices: npt.NDArray[np.int64]) -> list[list[int]]:
        """Token ids of some of the texts."""
        return [self.ids[index] for index in indices]


class Extractor:
    """A backbone with everything that decides what feature a text gets.

    Args:
        recipe: what to load and how to treat texts: a `Recipe`, or the mapping that a cache or a
            run recorded of one.
        layers: layers to compute.
        poolings: poolings to compute.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        token_budget: tokens a batch, pads included; None chooses for the device.
        spread: lay the backbone on all GPUs that this process sees.
        expected_fingerprint: identity that the recipe must still have, as a cache recorded it.
        compiled: compile the blocks on a GPU, which takes a minute and saves a part of all others.

    Raises:
        ModelError: the backbone cannot be loaded, or is no longer the one that was recorded.
    """

    def __init__(
        self,
        recipe: Recipe | Mapping[str, Any],
        *,
        layers: Sequence[int],
        poolings: Sequence[str],
        device: str = "auto",
        token_budget: int | None = None,
        spread: bool = False,
        expected_fingerprint: Mapping[str, Any] | None = None,
        compiled: bool = False,
    ) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_record(recipe)
        if expected_fingerprint is not None:
            _refuse_other(self.recipe, expected_fingerprint)
        self.layers = tuple(layers)
        self.poolings = tuple(poolings)
        on_device = resolve_device(device)
        if on_device.type == "cpu":
            keep_freed_memory()
        self.backbone = self._load(on_device, spread=spread)
        n_at_once = 2 if self.backbone.widens else 1
        self.token_budget = token_budget or n_at_once * _TOKEN_BUDGET[on_device.type]
        self.n_lanes = min(_LANES, torch.get_num_threads()) if self.backbone.shareable else 1
        one_gpu = on_device.type == "cuda" and not spread
        packable = one_gpu and not {"mean_padded", "pooler"} & {*self.poolings}
        self._packs = packable and try_packing(self.backbone, self.recipe.max_length)
        self._compiled = compiled and self._packs
        if self._compiled:
            compile_blocks(self.backbone)
        self._checked = False
        self._warned = False

    def _load(self, device: torch.device, *, spread: bool) -> Backbone:
        recipe = self.recipe
        return load_backbone(
            recipe.files,
            recipe.shape,
            n_kept=max(self.layers),
            device=device,
            compute_dtype=getattr(torch, recipe.compute_dtype),
            quantize=recipe.quantize,
            spread=spread,
            needs_pooler="pooler" in self.poolings,
            trust_remote_code=recipe.trust_remote_code,
        )

    def features(self, texts: Sequence[str]) -> Features:
        """Compute the features of texts; warn where some are cut or empty.

        Args:
            texts: N texts; an empty one is legal.

        Returns:
            (pooling, layer) -> float16 or float32 `[N, H]`, as the recipe's dtype says.

        Raises:
            DataError: a text is not valid Unicode.
            RowError: a feature is not finite, or does not fit the dtype.
        """
        tokenized = self.tokenize(texts)
        for note in self.recipe.notes_on(tokenized.n_truncated, tokenized.n_empty):
            warnings.warn(f"{self.recipe.found.name}: {note}", LLMEmbedWarning, stacklevel=2)
        return self.compute(tokenized.ids)

    def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Apply the template and the tokenizer.

        Raises:
            DataError: a text is not valid Unicode.
        """
        recipe = self.recipe
        typed = recipe.text_pair and has_token_types(recipe.shape.config)
        try:
            encoded = recipe.tokenizer(
                *fill(recipe.template, texts, text_pair=recipe.text_pair),
                truncation=True,
                max_length=recipe.max_length,
                return_attention_mask=False,
                return_token_type_ids=typed,
                verbose=False,
            )
        except (AttributeError, TypeError, UnicodeEncodeError) as error:
            raise DataError(describe_bad_text(texts)) from error
        ids = [row or [recipe.empty_token] for row in encoded["input_ids"]]
        if typed:
            ids = [
                [token + SECOND * kind for token, kind in zip(row, kinds, strict=False)]
                for row, kinds in zip(ids, encoded["token_type_ids"], strict=True)
            ]
        cut = [bool(row.overflowing) for row in encoded.encodings or ()]
        empty = sum(not row for row in encoded["input_ids"])
        return Tokenized(ids=ids, n_truncated=sum(cut), n_empty=empty)

    def plan(self, lengths: Sequence[int]) -> list[npt.NDArray[np.int64]]:
        """Group texts of these many tokens into batches, as `compute` does."""
        if self._packs:
            return plan_packs(lengths, self.token_budget)
        return plan_batches(lengths, self.token_budget, _BATCH_COST[self.backbone.device.type])

    def compute(
        self,
        token_ids: Sequence[Sequence[int]],
        on_batch: Callable[[int, int], None] | None = None,
        describe_row: Callable[[int], str] = "text {}".format,
    ) -> Features:
        """Compute the features of tokenised texts.

        Args:
            token_ids: token ids of N texts.
            on_batch: called after each batch with its number of texts and of real tokens.
            describe_row: names one of these texts in a message.

        Returns:
            (pooling, layer) -> float16 or float32 `[N, H]`.

        Raises:
            RowError: a feature is not finite, or does not fit the dtype; or a single text does
                not fit in memory.
            ExtractionError: the first batch gave other features than its texts alone.
        """
        wanted = self._wanted()
        shape = (len(token_ids), self.backbone.hidden_size)
        device = self.backbone.device
        features = {name: torch.empty(shape, device=device) for name in wanted}
        for batch, pooled in self._run_all(token_ids, wanted, describe_row):
            to_rows = to_device(device, batch)
            for name, feature in pooled.items():
                features[name].index_copy_(0, to_rows, feature)
            if on_batch is not None:
                on_batch(len(batch), sum(len(token_ids[index]) for index in batch))
        return _stored(features, getattr(torch, self.recipe.dtype), describe_row)

    def _wanted(self) -> list[tuple[str, int]]:
        """List the features to compute; a pooler exists at the last layer alone."""
        return [
            (pooling, layer)
            for layer in self.layers
            for pooling in self.poolings
            if pooling != "pooler" or layer == self.backbone.n_layers
        ]

    def _run_all(
        self,
        token_ids: Sequence[Sequence[int]],
        wanted: Sequence[tuple[str, int]],
        describe_row: Callable[[int], str],
    ) -> Iterator[tuple[npt.NDArray[np.int64], Pooled]]:
        """Run all batches, planned anew where memory runs out: indices of the texts, features."""
        padded_to = self.recipe.max_length if "mean_padded" in self.poolings else 0
        lengths = [max(padded_to, len(ids)) for ids in token_ids]

        def run(batch: npt.NDArray[np.int64]) -> Pooled | None:
            rows = [token_ids[index] for index in batch]
            return self._run_if_it_fits(rows, lengths[batch[0]], wanted)

        pending = self.plan(lengths)
        with quiet(), Lanes(self.n_lanes) as lanes:
            while pending:
                n_done = 0
                for pooled in lanes.in_order(run, pending, first_alone=not self._checked):
                    if pooled is None:
                        break
                    yield pending[n_done], pooled
                    n_done += 1
                pending = pending[n_done:]
                if pending:
                    pending = self._smaller(pending, lengths, describe_row)

    def _run_if_it_fits(
        self,
        rows: Sequence[Sequence[int]],
        width: int,
        wanted: Sequence[tuple[str, int]],
    ) -> Pooled | None:
        """Run a batch, the first one checked; None if there was too little memory for it."""
        try:
            pooled = self._run(rows, width)
            if not self._checked:
                # Texts alone have lengths that nothing is compiled for.
                eager: Any = torch.compiler.set_stance if self._compiled else contextlib.nullcontext
                with eager("force_eager"):
                    check_first_batch(self.backbone, self.recipe.files.name, rows, pooled, wanted)
                self._checked = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return pooled

    def _smaller(
        self,
        pending: Sequence[npt.NDArray[np.int64]],
        lengths: Sequence[int],
        describe_row: Callable[[int], str],
    ) -> list[npt.NDArray[np.int64]]:
        """Plan the pending batches again, for half of what the first of them took."""
        first, device = pending[0], self.backbone.device
        longest = lengths[first[0]]
        if len(first) == 1:
            message = (
                f"{describe_row(int(first[0]))}: its {longest:,} tokens alone do not fit in the "
                f"memory of {device}. Pass a smaller --max-length than {longest}, or --quantize."
            )
            raise RowError(message)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        n_positions = (
            sum(lengths[index] for index in first) if self._packs else len(first) * longest
        )
        budget = n_positions // 2
        if not self._warned:
            warnings.warn(
                f"{n_positions:,} tokens a batch do not fit in the memory of {device}: "
                f"going on with {budget:,}, or fewer if need be. Pass --token-budget to begin so.",
                LLMEmbedWarning,
                stacklevel=2,
            )
            self._warned = True
        self.token_budget = budget
        rest = np.concatenate(pending)
        return [rest[batch] for batch in self.plan([lengths[index] for index in rest])]

    def _run(self, rows: Sequence[Sequence[int]], width: int) -> Pooled:
        if self._packs:
            n_tokens = sum(map(len, rows))
            compiled = self._compiled and positions_of(n_tokens, self.token_budget)
            return packed_hidden_states(
                self.backbone, rows, self.layers, self.poolings, n_positions=compiled or n_tokens
            )
        padded = np.full((len(rows), width), self.recipe.pad_token, dtype=np.int64)  # [B, T]
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        device = self.backbone.device
        return pooled_hidden_states(
            self.backbone,
            to_device(device, padded),
            to_device(device, np.array([len(row) for row in rows])),
            self.layers,
            self.poolings,
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell the errors of CUDA (a class), MPS and the CPU (a text alone) from all others.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    True
    """
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("DefaultCPUAllocator: ", "MPS backend out of memory")
    )


def _stored(features: Pooled, dtype: torch.dtype, describe_row: Callable[[int], str]) -> Features:
    """Round features where they are, check that they are finite, and copy them to the host."""
    rounded = {name: feature.to(dtype) for name, feature in features.items()}
    finite = torch.stack([stored.isfinite().all() for stored in rounded.values()])
    on_host = {name: _to_host(stored) for name, stored in rounded.items()}
    for (name, stored), is_finite in zip(on_host.items(), finite.tolist(), strict=True):  # waits
        if not is_finite:
            raise RowError(_not_finite(name, features[name], stored, describe_row))
    return {name: stored.numpy() for name, stored in on_host.items()}


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy from a GPU into pinned memory without waiting."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _not_finite(
    name: tuple[str, int],
    feature: torch.Tensor,
    stored: torch.Tensor,
    describe_row: Callable[[int], str],
) -> str:
    row = int((~stored.isfinite().all(dim=1)).nonzero()[0])
    pooling, layer = name
    largest = float(feature[row].abs().max())
    where = f"{describe_row(row)}, layer {layer}, pooling {pooling}"
    if np.isfinite(largest):
        return (
            f"{where}: the feature holds {largest:.6g}, beyond float16's 65504. "
            "Pass --dtype float32."
        )
    return (
        f"{where}: the feature is not finite. Pass --compute-dtype float32 (float16 "
        "arithmetic overflows in many models), or leave this layer out."
    )


def _refuse_other(recipe: Recipe, expected: Mapping[str, Any]) -> None:
    found = recipe.fingerprint
    for key, value in expected.items():
        if found.get(key) != value:
            message = (
                f"the backbone {recipe.files.name} has {key} {found.get(key)!r}, but the features "
                f"were made with {value!r}. Use the same model files, or extract and fit again."
            )
            raise ModelError(message)
