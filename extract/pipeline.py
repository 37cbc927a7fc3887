"""The verb of this package: stream a data set through a frozen backbone into a cache.

Here options become a `Task`, once; below, nobody sees them. Everything that can be refused is
refused before anything is written: first what the cache refuses of the texts, then the cache is
planned without writing, then the backbone is loaded, then blocks of rows are computed and committed
one by one. An interrupted run ends, once resumed, in the same bytes. Where several processes share
the work, one of them registers splits and arrays, and each then writes blocks of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmembed.cache_format import SourceInfo, SplitPlan, open_cache
from llmembed.common.errors import CacheFormatError, CacheNotFoundError, ConfigError
from llmembed.common.layers import parse_layers
from llmembed.common.progress import Steps
from llmembed.extract.backbones.load import resolve_compute_dtype, resolve_device
from llmembed.extract.backbones.models import called, lasting_name
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.config import ExtractConfig
from llmembed.extract.engines import ENGINES
from llmembed.extract.engines.devices import device_groups
from llmembed.extract.engines.early import place_of, refuse_cache
from llmembed.extract.engines.outcome import Counts, Extraction, summary
from llmembed.extract.engines.task import Cluster, Placement, Rank, Task
from llmembed.extract.features.poolings import POOLINGS
from llmembed.extract.texts.corpora import Corpus, load_corpus
from llmembed.extract.texts.prompts import pooling_of, resolve_prompts


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
        CacheLockedError: another writer is at work; nothing was written.
        CacheMismatchError: the cache is of other texts or another backbone; nothing was written.
        CacheSpaceError: there is no room; nothing was written.
        RowError: rows have no feature that could be stored; all other blocks are committed.
        ExtractionError: the backbone is not what it should be; committed blocks stay.
    """
    corpus = corpus or load_corpus(config.dataset_options)
    refuse_cache(config, corpus, writes=True)
    task = prepare(config, corpus)
    engine = importlib.import_module(ENGINES[config.engine])
    plans, _ = task.plan_only()
    if not any(plan.blocks for plan in plans):
        is_new = task.register()  # weights and groups may be, where no row is
        if task.rank is None and not _is_finished(task, plans):
            engine.finish(task)
        done = summary(task, Counts(), seconds=0.0)
        note = "What is new of the data set was added to its rows."
        return dataclasses.replace(done, notes=(*done.notes, note)) if is_new else done
    work = engine.begin(task, plans, _cluster(config))
    start = time.perf_counter()
    n_rows = sum(plan.n_rows_missing for plan in plans)
    with Progress(n_rows, shown=show_progress) as progress:
        counts = work(progress.advance)
    counts.refuse_left()
    return summary(task, counts, seconds=time.perf_counter() - start)


class Progress(Steps):
    """Rows that are done: of how many, rows/s, tokens/s and the time left."""

    def __init__(self, n_rows: int, *, shown: bool) -> None:
        super().__init__(n_rows, "rows", name="extracting", shown=shown)
        self._n_tokens = 0

    def advance(self, n_rows: int, n_tokens: int) -> None:
        """Count a batch that is done."""
        self._n_tokens += n_tokens
        self.count(n_rows, f"{self._n_tokens / self.elapsed_s:,.0f} tokens/s")


def prepare(config: ExtractConfig, corpus: Corpus | None = None) -> Task:
    """Resolve options against the data set and the model, and refuse what cannot be."""
    corpus = corpus or load_corpus(config.dataset_options)
    cache = place_of(config, corpus)
    recipe, layers = resolve_recipe(config, cache, text_pair=corpus.text_pair)
    prompts = resolve_prompts(config.prompts, corpus.labels)
    if prompts:
        recipe.refuse_prompts(prompts)
    rank = None
    if config.rank is not None and config.world is not None:
        rank = Rank(number=config.rank, world=config.world)
    groups: tuple[str, ...] = ()
    if config.engine == "local":
        groups = device_groups(config.devices, config.gpus_per_worker, config.device)
    return Task(
        corpus=corpus,
        recipe=recipe,
        source=SourceInfo(
            name=config.source or recipe.found.name,
            fingerprint=recipe.fingerprint,
            recipe=recipe.record,
            hidden_size=recipe.shape.hidden_size,
            n_layers=recipe.shape.n_layers,
            prompts=prompts,
        ),
        layers=layers,
        poolings=(*config.pooling, *map(pooling_of, prompts)),
        cache=cache,
        overwrite=config.overwrite,
        placement=Placement(
            device="cuda" if any(groups) else config.device,
            token_budget=config.token_budget,
            all_gpus=(config.gpus_per_worker or 0) > 1,
        ),
        rank=rank,
        groups=groups,
    )


def resolve_recipe(
    config: ExtractConfig, cache: str, *, text_pair: bool = False
) -> tuple[Recipe, tuple[int, ...]]:
    """Find the backbone that is asked for, and its layers; `cache` has its earlier features."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    known, device = _known_recipe(config, cache), resolve_device(config.device)
    compute_dtype = str(resolve_compute_dtype(config.compute_dtype, device)).removeprefix("torch.")
    if config.compute_dtype == "auto":  # what the cache has goes on
        compute_dtype = known.get("compute_dtype", compute_dtype)
    resolved = {
        "model": lasting_name(config.model),
        "text_pair": text_pair,
        "compute_dtype": compute_dtype,
        **{name: known.get(name) for name in ("torch", "transformers", "attention")},
    }
    given = {name: value for name, value in vars(config).items() if name in names}
    recipe = Recipe(**given | resolved).within_positions()
    name, last = recipe.found.name, recipe.shape.n_layers
    layers = parse_layers(config.layers, last, name)
    for pooling in config.pooling:
        if POOLINGS[pooling].last_layer_only and layers[-1] != last:
            raise ConfigError(
                f"--pooling {pooling} exists at the last layer of {name} only, and --layers "
                f"{config.layers} leaves it out. Add {last} to --layers."
            )
    return recipe, layers


def _known_recipe(config: ExtractConfig, cache: str) -> Mapping[str, Any]:
    """Read what the cache recorded of this backbone, if it is there and goes on."""
    if not config.overwrite:
        with contextlib.suppress(CacheNotFoundError, CacheFormatError):
            sources = open_cache(cache).sources
            name = config.source or called(config.model)[0]
            if name in sources:
                return sources[name].recipe
    return {}


def _cluster(config: ExtractConfig) -> Cluster:
    return Cluster(
        address=config.address,
        workers=config.workers,
        gpus_per_worker=config.gpus_per_worker,
        on_cpu=config.device.startswith("cpu"),
        arithmetic_is_ours=config.compute_dtype == "auto",
        texts=config.dataset_options,
    )


def _is_finished(task: Task, plans: Sequence[SplitPlan]) -> bool:
    with task.open_writer(dry_run=True) as writer:
        return all(writer.is_finished(plan) for plan in plans)
