"""Texts in, features out: tokenise, batch, run, pool, round to the stored dtype.

Features stay on the device until all batches of a call are done, and who launches a call may launch
the next before its features are there, so a GPU is never waited for in between. One `Extractor`
serves both the pipeline that fills a cache and the prediction of new texts, so a text gets the same
feature in both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmembed.common.errors import DataError, LLMEmbedWarning, RowError
from llmembed.common.process import (
    full_float32,
    is_out_of_memory,
    keep_freed_memory,
    memory_told,
)
from llmembed.extract.backbones.load import has_token_types, load_backbone, quiet, resolve_device
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.fast.cpu import in_lanes
from llmembed.extract.fast.graphs import Recorder, tell_launched
from llmembed.extract.features.batching import (
    Batch,
    plan_batches,
    plan_packed,
    positions_of,
    step_of,
)
from llmembed.extract.features.branches import (
    Branches,
    branched_hidden_states,
    refuse_seeing_ahead,
    renamed,
    share_texts,
)
from llmembed.extract.features.forward import Pooled, Tokenized, pooled_hidden_states, to_device
from llmembed.extract.features.packing import (
    are_compiled,
    compile_blocks,
    keeps_apart,
    packed_hidden_states,
    try_packing,
)
from llmembed.extract.features.poolings import arrays_of, spec_of
from llmembed.extract.features.selfcheck import allowed, check_first_batch
from llmembed.extract.features.sizes import (
    TokenBudget,
    compiling_pays,
    recording_pays,
    tokens_that_fit,
)
from llmembed.extract.texts import describe_bad_text, fill
from llmembed.extract.texts.prompts import pooling_of
from llmembed.extract.texts.templates import is_unicode

Features = dict[tuple[str, int], npt.NDArray[np.floating[Any]]]
"""(pooling, layer) -> float16 or float32 `[N, H]`."""

_TOKEN_BUDGET = {"cpu": 1024, "mps": 4096}
"""Tokens a batch. On a CPU small batches stay in its caches. Where weights are widened for each
batch, twice as many: half the copies."""
_BATCH_COST = {"cpu": 32, "mps": 128, "cuda": 256}
"""Padded tokens that take as long as one batch more: reading the weights, starting kernels."""
_LANES = 2
"""Batches at a time on a CPU."""
BLOCK_TEXTS = 4096
"""Texts in memory that are launched together; of 4 layers of width 4,096 they take 268 MB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """Texts that are ready to be computed."""

    texts: Tokenized
    lengths: list[int]
    """Positions that each text takes in a padded batch."""
    token_budget: int
    """What the batches were planned for."""
    batches: list[Batch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How a process ran its passes, for who looks where the speed went."""

    packed: bool
    """Texts were packed behind each other, without pads."""
    compiled: bool
    """Blocks were compiled."""
    cuda_graphs: bool
    """Passes were recorded as CUDA graphs and replayed."""
    attention: str
    """What transformers calls the attention that ran."""
    prompts_share: bool | None = None
    """Texts were read once for all prompts, not once for each; None where there are none."""
    why_padded: str = ""
    """Why a GPU computed pads, if one did."""


class Extractor:
    """A backbone with everything that decides what feature a text gets.

    Args:
        recipe: what to load and how to treat texts: a `Recipe`, or the mapping that a cache or a
            run recorded of one.
        layers: layers to compute.
        poolings: poolings to compute, those of prompts too.
        prompts: suffixes by name, as a cache or a run recorded them of the source.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        token_budget: tokens a batch, pads included; None chooses for the device, on a GPU by the
            memory that is free beside the weights.
        all_gpus: lay the backbone on all GPUs that this process sees.
        expected_fingerprint: identity that the recipe must still have, as a cache recorded it.
        n_rows: texts to come, in all; for many a GPU's blocks are compiled, which takes a minute.

    Raises:
        ModelError: the backbone cannot be loaded, or is no longer the one that was recorded.
    """

    def __init__(
        self,
        recipe: Recipe | Mapping[str, Any],
        *,
        layers: Sequence[int],
        poolings: Sequence[str],
        prompts: Mapping[str, str] = MappingProxyType({}),
        device: str = "auto",
        token_budget: int | None = None,
        all_gpus: bool = False,
        expected_fingerprint: Mapping[str, Any] | None = None,
        n_rows: int = 0,
    ) -> None:
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_record(recipe)
        recipe.refuse_other(expected_fingerprint or {})
        recipe.warn_of_other_versions()
        self.recipe, self.layers, self.poolings = recipe, tuple(layers), tuple(poolings)
        prompts = {n: text for n, text in prompts.items() if pooling_of(n) in self.poolings}
        self._branches = Branches.of(recipe, prompts) if prompts else None
        self._plain = [name for name in poolings if name not in map(pooling_of, prompts)]
        on_device, specs = resolve_device(device), [spec_of(name) for name in poolings]
        if on_device.type == "cpu":
            keep_freed_memory()
        needs_pooler = any(spec.home is None for spec in specs)
        self._pads_all = any(spec.reads_pads for spec in specs)
        self.backbone = load_backbone(
            recipe.files,
            recipe.shape,
            n_kept=max(layers),
            device=on_device,
            compute_dtype=getattr(torch, recipe.compute_dtype),
            quantize=recipe.quantize,
            all_gpus=all_gpus,
            needs_pooler=needs_pooler,
            trust_remote_code=recipe.trust_remote_code,
        )
        self._shares = self._share_texts(all_gpus)
        self._budget = TokenBudget(token_budget or self._suitable_budget())
        self._step = step_of(self.token_budget)
        self.n_lanes = min(_LANES, torch.get_num_threads()) if self.backbone.shareable else 1
        self._why_padded = ""
        if on_device.type == "cuda":
            self._why_padded = self._reason_to_pad(all_gpus, needs_pooler)
        self._packs = on_device.type == "cuda" and not self._why_padded
        self._recorder = self._make_recorder() if self._packs else None
        self._n_rows, self._compiled = n_rows, False
        self._checked = self._warned = False

    @property
    def token_budget(self) -> int:
        """Tokens a batch: what was asked for, or less while that does not fit."""
        return self._budget.now

    @token_budget.setter
    def token_budget(self, n_tokens: int) -> None:
        self._budget = TokenBudget(n_tokens)

    @property
    def way(self) -> Way:
        """How passes are run."""
        return Way(
            packed=self._packs,
            compiled=self._compiled and are_compiled(self.backbone),
            cuda_graphs=self._recorder is not None and self._recorder.n_recorded > 0,
            attention=self._attention,
            prompts_share=None if self._branches is None else self._shares,
            why_padded=self._why_padded,
        )

    @property
    def _attention(self) -> str:
        return str(getattr(self.backbone.model.config, "_attn_implementation", None) or "eager")

    def _suitable_budget(self) -> int:
        backbone, device = self.backbone, self.backbone.device
        if device.type != "cuda":
            return (2 if backbone.widens else 1) * _TOKEN_BUDGET[device.type]
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        inner = getattr(backbone.model.config, "intermediate_size", None)
        return tokens_that_fit(
            free + kept,
            n_parameters=self._n_parameters,
            hidden_size=backbone.hidden_size,
            inner_size=inner if isinstance(inner, int) else 4 * backbone.hidden_size,
            itemsize=backbone.compute_dtype.itemsize,
        )

    @property
    def _n_parameters(self) -> int:
        return sum(one.numel() for one in self.backbone.blocks.parameters())

    def _make_recorder(self) -> Recorder | None:
        """Let passes be recorded where they are short, but for int8, whose products wait."""
        backbone = self.backbone
        sizes = {"n_parameters": self._n_parameters, "n_blocks": len(backbone.blocks)}
        if backbone.quantize == "int8" or not recording_pays(self.token_budget, **sizes):
            return None
        # Tokens, which nothing has averaged.
        tolerance = allowed(backbone.compute_dtype, backbone.quantize, "last")
        recorder = Recorder(backbone.device, tolerance)
        if keeps_apart(backbone, self.recipe.max_length, recorder):
            return recorder
        tell_launched("beside empty texts others had other features")
        return None

    def _share_texts(self, all_gpus: bool) -> bool:
        """Let the model read each text once for all prompts, if there are any, and if it can."""
        if self._branches is None:
            return False
        refuse_seeing_ahead(self.backbone, self.recipe.files.name)
        if all_gpus or self._pads_all:
            return False
        with quiet(), full_float32():
            return share_texts(self.backbone, self._branches, self.recipe.max_length)

    def _reason_to_pad(self, all_gpus: bool, needs_pooler: bool) -> str:
        """Let the model run packed texts, or say why it does not."""
        reasons = {
            "its blocks lie on several GPUs": all_gpus,
            "prompts read the keys of padded texts": self._shares,
            "a pooling that was asked for reads the pads": self._pads_all,
            "pooling pooler is a part of the model": needs_pooler,
            f"its attention is {self._attention!r}, not 'sdpa'": self._attention != "sdpa",
        }
        for reason, holds in reasons.items():
            if holds:
                return reason
        if try_packing(self.backbone, self.recipe.max_length):
            return ""
        return "in a trial it did not give for packed texts what it gives for each alone"

    def features(self, texts: Sequence[str]) -> Features:
        """Compute the features of texts; warn where some are cut or empty.

        Of N texts they are float16 or float32 `[N, H]`, as the recipe's dtype says. An empty text
        is legal.

        Raises:
            DataError: a text is not valid Unicode.
            RowError: a feature is not finite, or does not fit the dtype.
        """
        blocks = [*self.in_blocks(texts)] or [self.compute([])]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def in_blocks(self, texts: Sequence[str]) -> Iterator[Features]:
        """Compute the features of texts as `features` does, some thousand texts at a time.

        However many texts there are, no more than two such blocks are held at a time: on a GPU one
        is launched before the features of the last are there.
        """
        if not all(isinstance(text, str) and is_unicode(text) for text in texts):
            raise DataError(describe_bad_text(texts))
        n_truncated = n_empty = 0
        launched: list[Callable[[], Features]] = []
        for start in range(0, len(texts), BLOCK_TEXTS):
            tokenized = self.tokenize(texts[start : start + BLOCK_TEXTS])
            n_truncated += tokenized.n_truncated
            n_empty += tokenized.n_empty
            name = partial(_text_name, start)
            launched.append(self.launch(self.prepare(tokenized), describe_row=name))
            if len(launched) > 1:
                yield launched.pop(0)()
        yield from (features() for features in launched)
        for note in self.recipe.notes_on(n_truncated, n_empty):
            warnings.warn(f"{self.recipe.found.name}: {note}", LLMEmbedWarning, stacklevel=2)

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
        cuts = [bool(row.overflowing) for row in encoded.encodings or ()]
        return Tokenized(
            ids=[row or [recipe.empty_token] for row in encoded["input_ids"]],
            types=[row or [0] for row in encoded["token_type_ids"]] if typed else None,
            is_cut=cuts or [False] * len(texts),
            n_empty=sum(not row for row in encoded["input_ids"]),
        )

    def plan(self, lengths: Sequence[int]) -> list[Batch]:
        """Group texts of these many tokens into batches, as `compute` does."""
        if self._packs:
            return plan_packed(lengths, self.token_budget, self._step)
        return plan_batches(lengths, self.token_budget, _BATCH_COST[self.backbone.device.type])

    def prepare(self, texts: Tokenized) -> Planned:
        """Plan the batches of tokenised texts, in any thread: the device is not needed."""
        lengths, budget = self._lengths(texts.n_tokens), self.token_budget
        batches = self.plan(lengths)
        return Planned(texts=texts, lengths=lengths, token_budget=budget, batches=batches)

    def _lengths(self, n_tokens: npt.NDArray[np.int32]) -> list[int]:
        """Give the positions that texts of so many tokens take in a padded batch."""
        shortest, behind = self.recipe.max_length if self._pads_all else 0, 0
        if self._branches is not None:
            behind = len(self._branches.paths) if self._shares else self._branches.longest
        return [max(shortest, n) + behind for n in n_tokens.tolist()]

    def n_computed(self, n_tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Count the tokens that are computed for texts of so many, those of prompts included."""
        computed = n_tokens.astype(np.int64)
        if self._branches is None:
            return computed
        if self._shares:
            return computed + len(self._branches.paths)
        begin, suffixes = self._branches.begin(computed), self._branches.suffixes.values()
        return computed * bool(self._plain) + sum(begin + len(ids) for ids in suffixes)

    def compute(
        self,
        texts: Tokenized | Sequence[Sequence[int]],
        on_batch: Callable[[int, int], None] = lambda *_: None,
        describe_row: Callable[[int], str] = "text {}".format,
    ) -> Features:
        """Compute the features of tokenised texts: `launch` and wait.

        `texts` may be token ids alone. (pooling, layer) -> float16 or float32 `[N, H]`.
        """
        texts = texts if isinstance(texts, Tokenized) else Tokenized(ids=texts)
        return self.launch(self.prepare(texts), on_batch, describe_row)()

    def launch(
        self,
        planned: Planned,
        on_batch: Callable[[int, int], None] = lambda *_: None,
        describe_row: Callable[[int], str] = "text {}".format,
    ) -> Callable[[], Features]:
        """Have the features of texts computed; on a GPU they are not waited for.

        Args:
            planned: N texts.
            on_batch: called for each batch with its number of texts and of real tokens.
            describe_row: names one of these texts in a message.

        Returns:
            What waits for the features, in any thread: (pooling, layer) -> float16 or float32
            `[N, H]`. It raises RowError: a feature is not finite, or does not fit the dtype.

        Raises:
            RowError: a single text does not fit in memory.
            ExtractionError: the first batch gave other features than its texts alone.
        """
        device, n_tokens = self.backbone.device, planned.texts.n_tokens
        shape = (len(n_tokens), self.backbone.hidden_size)
        self._compile_if_it_pays(n_tokens)
        with memory_told(f"{self.recipe.found.name}: pass fewer --layers or --pooling at a time."):
            features = {name: torch.empty(shape, device=device) for name in self._wanted()}
            for batch, pooled in self._run_all(planned, describe_row):
                rows = to_device(device, batch)
                for name, feature in pooled.items():
                    features[name].index_copy_(0, rows, feature)
                on_batch(len(batch), int(n_tokens[batch].sum()))
            self._budget.end_block()
            return _stored(features, getattr(torch, self.recipe.dtype), describe_row)

    def _compile_if_it_pays(self, n_tokens: npt.NDArray[np.int32]) -> None:
        """Decide it once, by the first texts."""
        if self._n_rows and len(n_tokens):
            n_expected = float(n_tokens.mean()) * self._n_rows
            self._compiled = self._packs and compiling_pays(n_expected, self._n_parameters)
            self._n_rows = 0
            if self._compiled:
                compile_blocks(self.backbone)

    def _wanted(self) -> list[tuple[str, int]]:
        wanted = arrays_of(self.poolings, self.layers, self.backbone.n_layers)
        return sorted(wanted, key=lambda array: array[1])

    def _run_all(
        self, planned: Planned, describe_row: Callable[[int], str]
    ) -> Iterator[tuple[Batch, Pooled]]:
        """Run all batches, planned anew where memory runs out: indices of the texts, features."""
        lengths, pending = planned.lengths, planned.batches
        if planned.token_budget != self.token_budget:
            pending = self.plan(lengths)

        def run(batch: Batch) -> Pooled | None:
            return self._run_if_it_fits(planned.texts.take(batch), lengths[batch[0]])

        # Muting costs a short text a tenth of its time; after its first pass int8 alone talks.
        talks = self.recipe.quantize is not None or not self._checked
        with quiet() if talks else contextlib.nullcontext(), full_float32():
            while pending:
                n_done, n_lanes = 0, min(self.n_lanes, len(pending))  # all cores on a lone batch
                for pooled in in_lanes(run, pending, n_lanes, first_alone=not self._checked):
                    if pooled is None:
                        break
                    yield pending[n_done], pooled
                    n_done += 1
                pending = pending[n_done:]
                if pending:
                    pending = self._smaller(pending, lengths, describe_row)

    def _run_if_it_fits(self, texts: Tokenized, width: int) -> Pooled | None:
        """Run a batch, the first one checked; None if there was too little memory for it."""
        try:
            pooled = self._run(texts, width)
            if not self._checked:
                # Texts alone have lengths that nothing is compiled for.
                eager: Any = torch.compiler.set_stance if self._compiled else contextlib.nullcontext
                with eager("force_eager"):
                    name, wanted = self.recipe.files.name, self._wanted()
                    behind = self._behind(texts)
                    check_first_batch(self.backbone, name, texts, pooled, wanted, behind)
                self._checked = True
        except MemoryError:
            return None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return pooled

    def _behind(self, texts: Tokenized) -> dict[str, Tokenized]:
        """Put each prompt behind each text, by the pooling that it makes."""
        if self._branches is None:
            return {}
        return {name: self._branches.behind(texts, name) for name in self._branches.suffixes}

    def _run(self, texts: Tokenized, width: int) -> Pooled:
        if self._branches is not None and self._shares:
            what = (self.backbone, texts, self.layers, self._plain, self._branches)
            width -= len(self._branches.paths)
            return branched_hidden_states(*what, width=width, pad=self.recipe.pad_token)
        behind = 0 if self._branches is None else self._branches.longest
        pooled = self._run_texts(texts, self._plain, width - behind) if self._plain else {}
        for name, prompted in self._behind(texts).items():
            pooled |= renamed(self._run_texts(prompted, ["last"], width), name)
        return pooled

    def _run_texts(self, texts: Tokenized, poolings: Sequence[str], width: int) -> Pooled:
        what = (self.backbone, texts, self.layers, poolings)
        if not self._packs:
            return pooled_hidden_states(*what, width=width, pad=self.recipe.pad_token)
        n_tokens = int(texts.n_tokens.sum())
        few_sizes = self._compiled or self._recorder is not None
        n_positions = positions_of(n_tokens, self._step) if few_sizes else n_tokens
        return packed_hidden_states(*what, n_positions=n_positions, recorder=self._recorder)

    def _smaller(
        self, pending: Sequence[Batch], lengths: Sequence[int], describe_row: Callable[[int], str]
    ) -> list[Batch]:
        """Plan the pending batches again, for half of what the first of them took."""
        first, device = pending[0], self.backbone.device
        longest = lengths[first[0]]
        if len(first) == 1:
            raise RowError(
                f"{describe_row(int(first[0]))}: its {longest:,} tokens alone do not fit in the "
                f"memory of {device}. Pass a smaller --max-length than {longest}, or --quantize."
            )
        if self._recorder is not None:
            self._recorder.forget()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        n_positions = len(first) * longest
        if self._packs:
            n_positions = sum(lengths[index] for index in first)
        self._budget.shrink(n_positions)
        if not self._warned:
            warnings.warn(
                f"{n_positions:,} tokens a batch do not fit in the memory of {device}: "
                f"going on with {self.token_budget:,}, or fewer if need be. Pass --token-budget to "
                "begin so.",
                LLMEmbedWarning,
                stacklevel=2,
            )
            self._warned = True
        rest = np.concatenate(pending)
        return [rest[batch] for batch in self.plan([lengths[index] for index in rest])]


def _text_name(start: int, index: int) -> str:
    return f"text {start + index}"


def _stored(
    features: Pooled, dtype: torch.dtype, describe_row: Callable[[int], str]
) -> Callable[[], Features]:
    """Round features and copy them to the host; what is returned waits, and sees them finite."""
    largest = torch.stack([feature.abs().amax(dim=1) for feature in features.values()])
    names, rounded = list(features), [feature.to(dtype) for feature in features.values()]
    on_host, wait = _to_host([largest, *rounded])

    def stored() -> Features:
        wait()
        largest, *values = on_host
        for name, of_rows in zip(names, largest, strict=True):
            refused = (~of_rows.to(dtype).isfinite()).nonzero()
            if len(refused):
                row = int(refused[0])
                raise RowError(f"{describe_row(row)}, {_not_finite(name, float(of_rows[row]))}")
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}

    return stored


def _to_host(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Copy tensors of one device; from a GPU they are there once what is returned too was called.

    A GPU copies into pinned memory, after all that it was given before.
    """
    device = tensors[0].device
    if device.type != "cuda":
        return [tensor.cpu() for tensor in tensors], lambda: None
    pinned = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors]
    for copy, tensor in zip(pinned, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    # Who waits leaves its core to who launches.
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))
    return pinned, copied.synchronize


def _not_finite(name: tuple[str, int], largest: float) -> str:
    pooling, layer = name
    if np.isfinite(largest):
        what = f"the feature holds {largest:.6g}, beyond float16's 65504. Pass --dtype float32."
    else:
        what = (
            "the feature is not finite. Pass --compute-dtype float32 (float16 arithmetic overflows "
            "in many models), or leave this layer out."
        )
    return f"layer {layer}, pooling {pooling}: {what}"
