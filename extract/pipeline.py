"""The verb of this package: stream a data set through a frozen backbone into a cache.

Everything that can be refused is refused before anything is written: the cache is first planned
without writing, then the backbone is loaded, then blocks of rows are computed and committed one by
one. A block is tokenised, batched and computed as a whole and on its own, so an interrupted run
ends, once resumed, in the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import (
    Block,
    CacheWriter,
    DatasetInfo,
    SourceInfo,
    SplitPlan,
    open_cache,
)
from llmembed.cache_format.errors import CacheFormatError, CacheNotFoundError, ConfigError
from llmembed.cache_format.layers import parse_layers
from llmembed.extract.backbone import resolve_compute_dtype, resolve_device
from llmembed.extract.config import ExtractConfig
from llmembed.extract.corpora import Corpus, load_corpus
from llmembed.extract.duplicates import first_occurrences, spread
from llmembed.extract.extractor import Extractor, Features, Tokenized
from llmembed.extract.overlap import OneBehind, one_ahead
from llmembed.extract.progress import Progress
from llmembed.extract.recipe import Recipe
from llmembed.extract.registry import find_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A checked request: what to compute, of which texts, into which cache."""

    corpus: Corpus
    recipe: Recipe
    layers: tuple[int, ...]
    poolings: tuple[str, ...]
    source: SourceInfo
    cache: str
    config: ExtractConfig

    @property
    def arrays(self) -> list[tuple[str, int]]:
        """(pooling, layer) of all arrays; the pooler belongs to the last layer alone."""
        last = self.recipe.shape.n_layers
        return [
            (pooling, layer)
            for pooling in self.poolings
            for layer in self.layers
            if pooling != "pooler" or layer == last
        ]

    @property
    def dataset(self) -> DatasetInfo:
        """What the cache records of the data set."""
        corpus = self.corpus
        return DatasetInfo(
            name=corpus.name, labels=corpus.labels, provenance=dict(corpus.provenance)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """What one call of `extract` did."""

    path: str
    """The cache."""
    source: str
    """Name of the backbone inside the cache."""
    layers: tuple[int, ...]
    """Layers that the cache now has, as asked for."""
    poolings: tuple[str, ...]
    """Poolings that the cache now has, as asked for."""
    n_rows: Mapping[str, int]
    """Examples of each split."""
    n_rows_computed: int
    """Rows computed by this call; 0 where the cache was complete."""
    n_tokens: int
    """Real tokens of those rows."""
    n_truncated: int
    """Texts of those rows that were cut at max_length."""
    n_empty: int
    """Texts without any token, which got the feature of one begin-of-text token."""
    n_duplicates: int
    """Rows that got the feature of an earlier row with the same text."""
    seconds: float
    """Wall time of computing and writing."""
    notes: tuple[str, ...]
    """What was decided or noticed and a user should know."""

    def describe(self) -> str:
        """Tell the outcome in a few lines."""
        rows = ", ".join(f"{split} {count:,}" for split, count in self.n_rows.items())
        layers = ", ".join(map(str, self.layers))
        what = f"{self.path}: {rows}; source {self.source}, layers {layers}"
        if not self.n_rows_computed:
            return f"{what}. The cache is complete: nothing to do."
        rate = self.n_tokens / self.seconds
        done = f"{self.n_rows_computed:,} rows, {self.n_tokens:,} tokens in {self.seconds:,.1f} s"
        return "\n".join((f"{what}.", f"{done} ({rate:,.0f} tokens/s).", *self.notes))


def extract(
    config: ExtractConfig, *, corpus: Corpus | None = None, show_progress: bool = False
) -> Extraction:
    """Extract features into a cache, or add to it what is missing.

    Args:
        config: what to extract.
        corpus: texts in memory, which take the place of `config.dataset`.
        show_progress: draw a progress bar on stderr.

    Raises:
        ConfigError, DataError, ModelError: the request cannot be served; nothing was written.
        CacheMismatchError: the cache is of other texts or another backbone; nothing was written.
        CacheSpaceError: there is no room; nothing was written.
        ExtractionError: a feature must not be stored; committed blocks stay and can be resumed.
    """
    task = prepare(config, corpus)
    plans, _ = plan_only(task)
    if not any(plan.blocks for plan in plans):
        return _summary(task, _Counts(), seconds=0.0)
    extractor = load_extractor(task, layers_to_run(plans))
    start = time.perf_counter()
    counts = _Counts()
    n_rows = sum(plan.n_rows_missing for plan in plans)
    with _writer(task) as writer, Progress(n_rows, shown=show_progress) as progress:
        for plan in _plan(task, writer):
            _extract_split(task, writer, plan, extractor, counts, progress)
            writer.finish(plan.split, plan.source)
    return _summary(task, counts, seconds=time.perf_counter() - start)


def prepare(config: ExtractConfig, corpus: Corpus | None = None) -> Task:
    """Resolve a configuration against the data set and the model, and refuse what cannot be."""
    corpus = corpus or load_corpus(
        config.dataset,
        config=config.config,
        splits=config.split,
        text_column=config.text_column,
        label_column=config.label_column,
        limit=config.limit,
        seed=config.seed,
    )
    cache = config.cache or f"{corpus.name}.zarr"
    recipe, layers = resolve_recipe(config, cache, text_pair=corpus.text_pair)
    return Task(
        corpus=corpus,
        recipe=recipe,
        layers=layers,
        poolings=config.pooling,
        source=SourceInfo(
            name=config.source or recipe.found.name,
            fingerprint=recipe.fingerprint,
            recipe=recipe.record,
            hidden_size=recipe.shape.hidden_size,
            n_layers=recipe.shape.n_layers,
        ),
        cache=cache,
        config=config,
    )


def resolve_recipe(
    config: ExtractConfig, cache: str, *, text_pair: bool = False
) -> tuple[Recipe, tuple[int, ...]]:
    """Find the backbone of a configuration, and the layers that are asked for.

    Args:
        config: the request.
        cache: where its features are.
        text_pair: whether the texts are pairs.
    """
    recipe = Recipe(
        model=config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        template=config.template,
        text_pair=text_pair,
        max_length=config.max_length,
        compute_dtype=_compute_dtype(config, cache),
        quantize=config.quantize,
        dtype=config.dtype,
    ).within_positions()
    name = recipe.found.name
    layers = parse_layers(config.layers, recipe.shape.n_layers, name)
    if "pooler" in config.pooling and layers[-1] != recipe.shape.n_layers:
        message = (
            f"--pooling pooler exists at the last layer of {name} only, and --layers "
            f"{config.layers} leaves it out. Add {recipe.shape.n_layers} to --layers."
        )
        raise ConfigError(message)
    return recipe, layers


def _compute_dtype(config: ExtractConfig, cache: str) -> str:
    """Resolve `auto`: what the cache has of this backbone goes on, else what suits the device."""
    if config.compute_dtype == "auto" and not config.overwrite:
        with contextlib.suppress(CacheNotFoundError, CacheFormatError):
            sources = open_cache(cache).sources
            name = config.source or find_model(config.model, config.revision).name
            if name in sources:
                return str(sources[name].recipe["compute_dtype"])
    device = resolve_device(config.device)
    return str(resolve_compute_dtype(config.compute_dtype, device)).removeprefix("torch.")


def plan_only(task: Task) -> tuple[list[SplitPlan], int | None]:
    """Plan without writing, and refuse a cache that contradicts the task or a disk without room.

    Returns:
        The plan of each split, and the bytes free where the cache lies, if that is known.
    """
    with _writer(task, dry_run=True) as writer:
        plans = _plan(task, writer)
        writer.check_space(sum(plan.size_bytes for plan in plans))
        return plans, writer.free_bytes


def layers_to_run(plans: list[SplitPlan]) -> tuple[int, ...]:
    """List the layers that some block lacks."""
    missing = {layer for plan in plans for block in plan.blocks for _, layer in block.missing}
    return tuple(sorted(missing))


def load_extractor(task: Task, layers: tuple[int, ...]) -> Extractor:
    """Load the backbone up to the highest of these layers."""
    return Extractor(
        task.recipe,
        layers=layers,
        poolings=task.poolings,
        device=task.config.device,
        token_budget=task.config.token_budget,
    )


def _writer(task: Task, *, dry_run: bool = False) -> CacheWriter:
    return CacheWriter(
        task.cache, dataset=task.dataset, overwrite=task.config.overwrite, dry_run=dry_run
    )


def _plan(task: Task, writer: CacheWriter) -> list[SplitPlan]:
    writer.add_source(task.source)
    plans = []
    for split, examples in task.corpus.splits.items():
        writer.add_split(split, labels=examples.labels, text_hash=examples.text_hash)
        plans.append(
            writer.plan(
                split,
                task.source.name,
                arrays=task.arrays,
                dtype=task.recipe.dtype,
            )
        )
    return plans


@dataclasses.dataclass
class _Counts:
    """What a call has done so far."""

    n_rows_computed: int = 0
    n_tokens: int = 0
    n_truncated: int = 0
    n_empty: int = 0
    n_duplicates: int = 0

    def add(self, tokenized: Tokenized, n_computed: int) -> None:
        """Count a block of rows, of which some are duplicates and were not computed."""
        self.n_rows_computed += len(tokenized.ids)
        self.n_tokens += int(tokenized.n_tokens.sum())
        self.n_truncated += tokenized.n_truncated
        self.n_empty += tokenized.n_empty
        self.n_duplicates += len(tokenized.ids) - n_computed


def _extract_split(
    task: Task,
    writer: CacheWriter,
    plan: SplitPlan,
    extractor: Extractor,
    counts: _Counts,
    progress: Progress,
) -> None:
    examples = task.corpus.splits[plan.split]
    originals = first_occurrences(examples)
    texts = (examples.batch(slice(block.compute_from, block.stop)) for block in plan.blocks)
    tokenized_blocks = one_ahead(map(extractor.tokenize, texts))
    with OneBehind() as writing:
        for block, tokenized in zip(plan.blocks, tokenized_blocks, strict=True):
            rows = np.arange(block.compute_from, block.stop)
            own = rows[originals[rows] == rows]
            features = extractor.compute(
                tokenized.take(own - rows[0]),
                on_batch=progress.advance,
                describe_row=_RowNames(plan.split, own),
            )
            writing.do(
                partial(
                    _write, task, writer, plan, block, tokenized.n_tokens, features, originals[rows]
                )
            )
            progress.advance(len(rows) - len(own), 0)
            counts.add(tokenized, n_computed=len(own))


def _write(
    task: Task,
    writer: CacheWriter,
    plan: SplitPlan,
    block: Block,
    n_tokens: npt.NDArray[np.int32],
    features: Features,
    originals: npt.NDArray[np.int64],
) -> None:
    rows = np.arange(block.compute_from, block.stop)
    writer.write(
        plan,
        block,
        n_tokens=n_tokens,
        features={
            key: spread(features[key], rows, originals, _earlier(task, plan, key))
            for key in block.missing
        },
    )


class _RowNames:
    """Names a computed text by its split and row, for messages."""

    def __init__(self, split: str, rows: npt.NDArray[np.int64]) -> None:
        self._split = split
        self._rows = rows

    def __call__(self, index: int) -> str:
        return f"split {self._split!r}, row {self._rows[index]}"


def _earlier(
    task: Task, plan: SplitPlan, key: tuple[str, int]
) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]:
    """Read rows of earlier blocks of one array, which are committed: blocks are done in order."""
    pooling, layer = key

    def read(rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        split = open_cache(task.cache)[plan.split]
        return split.features(layer, plan.source, pooling, rows, allow_partial=True)

    return read


def _summary(task: Task, counts: _Counts, seconds: float) -> Extraction:
    return Extraction(
        path=task.cache,
        source=task.source.name,
        layers=task.layers,
        poolings=task.poolings,
        n_rows={split: len(examples) for split, examples in task.corpus.splits.items()},
        seconds=seconds,
        notes=_notes(task, counts),
        **dataclasses.asdict(counts),
    )


def _notes(task: Task, counts: _Counts) -> tuple[str, ...]:
    columns, notes = task.corpus.provenance, []
    if "text_column" in columns:
        text, label = columns["text_column"], columns["label_column"]
        notes.append(f"Text from column {text!r}, label from {label!r}.")
    if counts.n_truncated:
        notes.append(f"{counts.n_truncated:,} texts were cut at {task.recipe.max_length} tokens.")
    if counts.n_empty:
        token = task.recipe.tokenizer.convert_ids_to_tokens(task.recipe.empty_token)
        notes.append(f"{counts.n_empty:,} empty texts got the feature of the lone token {token!r}.")
    if counts.n_duplicates:
        notes.append(f"{counts.n_duplicates:,} texts stood there before and share one feature.")
    return tuple(notes)
