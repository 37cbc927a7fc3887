"""What an extraction would do, measured on a sample, with nothing written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np

from llmembed.cache_format import SplitPlan
from llmembed.extract.config import ExtractConfig
from llmembed.extract.engines.early import refuse_cache
from llmembed.extract.engines.task import Task, layers_to_run
from llmembed.extract.features.batching import padding_share
from llmembed.extract.features.extractor import Extractor
from llmembed.extract.features.forward import Tokenized
from llmembed.extract.pipeline import prepare
from llmembed.extract.texts.corpora import Corpus, load_corpus

_SAMPLE_ROWS = 4096
"""Rows a split that are tokenised for the statistics; a whole block has 1,024."""
_TIMED_BATCHES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractionPlan:
    """What `llmembed-extract --dry-run` prints."""

    path: str
    """Where the cache is or would be."""
    source: str
    """Name of the backbone inside the cache."""
    n_rows: Mapping[str, int]
    """Examples of each split."""
    n_rows_missing: int
    """Rows to compute."""
    n_rows_sampled: int
    """Rows that the following figures were taken from."""
    tokens: Mapping[str, float]
    """min, median, p95 and max tokens a text."""
    n_tokens: int
    """Tokens to compute, those of prompts included, scaled up from the sample."""
    n_truncated: int
    """Sampled texts that are longer than max_length."""
    padding_share: float
    """Share of computed positions that is padding, 0..1."""
    layers: tuple[int, ...]
    """Layers to store."""
    n_layers_run: int
    """Blocks that are loaded and run."""
    n_layers: int
    """Blocks of the whole model."""
    size_bytes: int
    """Bytes to write."""
    free_bytes: int | None
    """Bytes free where the cache lies; None for a remote store."""
    tokens_per_s: float
    """Measured speed of this machine; of several GPUs, that of one times their number."""
    seconds: float
    """Estimated time to compute."""
    notes: tuple[str, ...]
    """Several labels a text, weights and groups, where there are any."""

    def describe(self) -> str:
        """Tell the plan in a few lines."""
        rows = ", ".join(f"{split} {count:,}" for split, count in self.n_rows.items())
        tokens = ", ".join(f"{name} {value:,.0f}" for name, value in self.tokens.items())
        run = f"{self.n_layers_run} of {self.n_layers} blocks are run"
        free = "" if self.free_bytes is None else f" of {self.free_bytes / 1e9:,.2f} GB free"
        return "\n".join(
            (
                f"cache      {self.path}, source {self.source}",
                f"examples   {rows}; {self.n_rows_missing:,} rows to compute",
                f"sample     {self.n_rows_sampled:,} texts",
                f"tokens     {tokens} a text; about {self.n_tokens:,} in all",
                f"truncated  {self.n_truncated:,} of the sampled texts",
                f"padding    {self.padding_share:.1%} of the computed positions",
                f"layers     {', '.join(map(str, self.layers))}; {run}",
                f"to write   {self.size_bytes / 1e9:,.3f} GB{free}",
                f"time       about {self.seconds:,.0f} s at {self.tokens_per_s:,.0f} tokens/s",
                *self.notes,
            )
        )


def plan_extraction(config: ExtractConfig, *, corpus: Corpus | None = None) -> ExtractionPlan:
    """Plan an extraction, tokenise a sample and time a few batches of it.

    Arguments are those of `extract`; what it would refuse is refused here, a writer at work aside.
    """
    corpus = corpus or load_corpus(config.dataset_options)
    refuse_cache(config, corpus, writes=False)
    task = prepare(config, corpus)
    plans, free_bytes = task.plan_only()
    layers = layers_to_run(plans)
    extractor = task.load_extractor(layers or task.layers[:1])
    texts = _sample(task, plans)
    sample = extractor.tokenize(texts) if texts else Tokenized(ids=[])
    lengths = sample.n_tokens.tolist() or [0]
    n_rows_missing = sum(plan.n_rows_missing for plan in plans)
    computed = extractor.n_computed(np.array(lengths, dtype=np.int32))
    n_tokens = round(float(computed.mean()) * n_rows_missing)
    planned = extractor.prepare(sample)
    tokens_per_s = _measure(extractor, sample) * max(1, sum(map(bool, task.groups)))
    return ExtractionPlan(
        path=task.cache,
        source=task.source.name,
        n_rows={plan.split: plan.n_rows for plan in plans},
        n_rows_missing=n_rows_missing,
        n_rows_sampled=len(sample.ids),
        tokens={
            "min": float(min(lengths)),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": float(max(lengths)),
        },
        n_tokens=n_tokens,
        n_truncated=sample.n_truncated,
        padding_share=padding_share(planned.lengths, planned.batches),
        layers=task.layers,
        n_layers_run=max(layers, default=0),
        n_layers=task.source.n_layers,
        size_bytes=sum(plan.size_bytes for plan in plans),
        free_bytes=free_bytes,
        tokens_per_s=tokens_per_s,
        seconds=n_tokens / tokens_per_s if tokens_per_s else 0.0,
        notes=tuple(task.corpus.notes),
    )


def _sample(task: Task, plans: Sequence[SplitPlan]) -> list[str]:
    """Read the first missing rows of each split."""
    texts: list[str] = []
    for plan in plans:
        if plan.blocks:
            first = plan.blocks[0].compute_from
            texts += task.corpus.splits[plan.split].batch(slice(first, first + _SAMPLE_ROWS))
    return texts


def _measure(extractor: Extractor, sample: Tokenized) -> float:
    """Time batches of middling length, after one to warm up, in real tokens a second."""
    if not sample.ids:
        return 0.0
    batches = extractor.prepare(sample).batches
    middle = len(batches) // 2
    extractor.compute(sample.take(batches[middle]))
    timed = sample.take(np.concatenate(batches[middle : middle + _TIMED_BATCHES]))
    start = time.perf_counter()
    extractor.compute(timed)
    return int(extractor.n_computed(timed.n_tokens).sum()) / (time.perf_counter() - start)
