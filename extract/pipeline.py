"""The verb of this package: stream a data set through a frozen backbone into a cache.

Everything that can be refused is refused before anything is written: the cache is first planned
without writing, then the backbone is loaded, then blocks of rows are computed and committed one by
one. An interrupted run ends, once resumed, in the same bytes. Where several processes share the
work, one of them registers splits and arrays, and each then writes blocks of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from llmembed.cache_format import CacheWriter, SourceInfo, SplitPlan, open_cache
from llmembed.cache_format.tools import finalize
from llmembed.cache_format.writing.lock import PATIENCE_S
from llmembed.common.errors import (
    CacheFormatError,
    CacheLockedError,
    CacheNotFoundError,
    ConfigError,
)
from llmembed.common.layers import parse_layers
from llmembed.extract.backbones.load import resolve_compute_dtype, resolve_device
from llmembed.extract.backbones.models import find_model, lasting_name
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.config import ExtractConfig
from llmembed.extract.engines.blocks import extract_blocks
from llmembed.extract.engines.outcome import Counts, Extraction, summary
from llmembed.extract.engines.progress import Progress
from llmembed.extract.engines.ranks import blocks_of_rank
from llmembed.extract.engines.task import Task
from llmembed.extract.features.extractor import Extractor
from llmembed.extract.texts.corpora import Corpus, corpus_of

_COMPILE_FROM_ROWS = 100_000
"""A run of so many texts on a GPU outlasts the minute that compiling takes many times."""


def extract(
    config: ExtractConfig, *, corpus: Corpus | None = None, show_progress: bool = False
) -> Extraction:
    """Extract features into a cache, or add to it what is missing.

    Args:
        config: what to extract.
        corpus: texts in memory, which take the place of `config.dataset`.
        show_progress: show on stderr how far it is.

    Raises:
        ConfigError, DataError, ModelError: the request cannot be served; nothing was written.
        CacheMismatchError: the cache is of other texts or another backbone; nothing was written.
        CacheSpaceError: there is no room; nothing was written.
        RowError: rows have no feature that could be stored; all other blocks are committed.
        ExtractionError: the backbone is not what it should be; committed blocks stay.
    """
    task = prepare(config, corpus)
    plans, _ = plan_only(task)
    if not any(plan.blocks for plan in plans):
        if config.world is None:
            _finish(task, plans)
        return summary(task, Counts(), seconds=0.0)
    n_rows = sum(plan.n_rows_missing for plan in plans)
    if config.engine == "ray":
        from llmembed.extract.engines.ray_engine import extract_on_ray

        start = time.perf_counter()
        with Progress(n_rows, shown=show_progress) as progress:
            counts = extract_on_ray(task, layers_to_run(plans), progress.advance)
        counts.refuse_left()
        return summary(task, counts, seconds=time.perf_counter() - start)
    worth_compiling = n_rows >= _COMPILE_FROM_ROWS
    extractor = load_extractor(task, layers_to_run(plans), compiled=worth_compiling)
    start = time.perf_counter()
    with Progress(n_rows, shown=show_progress) as progress:
        counts = _extract_here(task, extractor, progress.advance)
    counts.refuse_left()
    return summary(task, counts, seconds=time.perf_counter() - start)


def _extract_here(task: Task, extractor: Extractor, on_batch: Callable[[int, int], None]) -> Counts:
    """Do the missing blocks in this process, as the only writer or as one rank of several."""
    config, counts = task.config, Counts()
    alone = config.world is None
    if not alone:
        register(task)
    shared = None if alone else f"rank-{config.rank}-of-{config.world}"
    with open_writer(task, shared=shared) as writer:
        for plan in make_plans(task, writer):
            counts += extract_blocks(
                task, writer, plan, extractor, on_batch=on_batch, look_back=alone
            )
            if alone:
                writer.finish(plan.split, plan.source)
    return counts


def _finish(task: Task, plans: list[SplitPlan]) -> None:
    """Do what an earlier run was kept from doing after its last block; mostly there is nothing."""
    with CacheWriter(task.cache, dataset=task.dataset, dry_run=True) as writer:
        if all(writer.is_finished(plan) for plan in plans):
            return
    if task.config.engine == "ray":
        finalize(task.cache, only_new=True)
        return
    with open_writer(task) as writer:
        for plan in make_plans(task, writer):
            writer.finish(plan.split, plan.source)


def prepare(config: ExtractConfig, corpus: Corpus | None = None) -> Task:
    """Resolve a configuration against the data set and the model, and refuse what cannot be."""
    corpus = corpus or corpus_of(config)
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
        model=lasting_name(config.model),
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
    with open_writer(task, dry_run=True) as writer:
        plans = make_plans(task, writer)
        writer.check_space(sum(plan.size_bytes for plan in plans))
        return plans, writer.free_bytes


def layers_to_run(plans: list[SplitPlan]) -> tuple[int, ...]:
    """List the layers that some block lacks."""
    missing = {layer for plan in plans for block in plan.blocks for _, layer in block.missing}
    return tuple(sorted(missing))


def load_extractor(
    task: Task,
    layers: tuple[int, ...],
    *,
    expected: Mapping[str, Any] | None = None,
    compiled: bool = False,
) -> Extractor:
    """Load the backbone up to the highest of these layers; refuse another than was expected."""
    return Extractor(
        task.recipe,
        layers=layers,
        poolings=task.poolings,
        device=task.config.device,
        token_budget=task.config.token_budget,
        spread=(task.config.gpus_per_worker or 0) > 1,
        expected_fingerprint=expected,
        compiled=compiled,
    )


def register(task: Task) -> None:
    """Make the cache ready for several writers; one of them does it, the others wait.

    Raises:
        CacheLockedError: if a writer that shares nothing is at work, and stays so for a minute.
    """
    patient_until = time.monotonic() + PATIENCE_S
    while task.config.overwrite or not _is_registered(task):
        try:
            with open_writer(task) as writer:
                make_plans(task, writer)
                writer.register()
                return
        except CacheLockedError:
            if time.monotonic() > patient_until:
                raise
            time.sleep(0.1)


def _is_registered(task: Task) -> bool:
    with open_writer(task, dry_run=True) as writer:
        make_plans(task, writer)
        return writer.is_registered


def open_writer(task: Task, *, dry_run: bool = False, shared: str | None = None) -> CacheWriter:
    """Make the writer of a task's cache, as a context manager."""
    return CacheWriter(
        task.cache,
        dataset=task.dataset,
        overwrite=task.config.overwrite,
        dry_run=dry_run,
        shared=shared,
    )


def make_plans(task: Task, writer: CacheWriter) -> list[SplitPlan]:
    """Plan every split, and keep the blocks of this rank if there are ranks."""
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
    config = task.config
    if config.rank is None or config.world is None:
        return plans
    return blocks_of_rank(plans, config.rank, config.world)
