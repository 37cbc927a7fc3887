"""A request for features once it is checked: what to compute, of which texts, into which cache.

Whoever computes, here or elsewhere, is given a `Task`, and no options.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmembed.cache_format import CacheWriter, SourceInfo, SplitPlan
from llmembed.cache_format.writing.lock import PATIENCE_S
from llmembed.common.errors import CacheLockedError
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.features.extractor import Extractor
from llmembed.extract.features.poolings import arrays_of
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import Corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a process computes."""

    device: str = "auto"
    """Name of the device."""
    token_budget: int | None = None
    """Tokens a batch; None chooses for the device."""
    all_gpus: bool = False
    """Whether the backbone lies on all GPUs that the process sees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Which workers are asked for, and what they cannot know from the task."""

    address: str | None
    """Of the Ray to join; None starts one."""
    workers: int
    """At most so many."""
    gpus_per_worker: float | None
    """None is one where the cluster has any, else none."""
    on_cpu: bool
    """Whether workers are to compute on the CPU."""
    arithmetic_is_ours: bool
    """Whether the compute dtype was chosen for the device of this process."""
    texts: DatasetOptions
    """Which texts each worker is to read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
    """One of several processes that make the same plan, each of which does a part of the blocks.

    Nothing is agreed upon at run time: ranks that are started again find what is committed.
    """

    number: int
    """From 0 to `world` - 1."""
    world: int
    """How many ranks there are."""

    def part_of(self, plans: Sequence[SplitPlan]) -> list[SplitPlan]:
        """Keep every `world`-th block, counted over all splits whether done or not."""
        kept, n_before = [], 0
        for plan in plans:
            numbered = ((n_before + block.start // plan.block_rows, block) for block in plan.blocks)
            blocks = tuple(block for n, block in numbered if n % self.world == self.number)
            kept.append(dataclasses.replace(plan, blocks=blocks))
            n_before += -(-plan.n_rows // plan.block_rows)
        return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A checked request: what to compute, of which texts, into which cache."""

    corpus: Corpus
    recipe: Recipe
    source: SourceInfo
    """What the cache records of the recipe."""
    layers: tuple[int, ...]
    poolings: tuple[str, ...]
    cache: str
    """Folder or URL."""
    overwrite: bool = False
    """Whether the cache is replaced, if there is one."""
    placement: Placement = Placement()
    rank: Rank | None = None
    """Which part of the blocks is to be done; None is all of them."""
    groups: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each process of this machine that is to compute; none: this one."""

    def open_writer(self, *, dry_run: bool = False, shared: str | None = None) -> CacheWriter:
        """Make the writer of the cache, as a context manager."""
        return CacheWriter(
            self.cache,
            dataset=self.corpus.dataset,
            overwrite=self.overwrite,
            dry_run=dry_run,
            shared=shared,
        )

    def make_plans(self, writer: CacheWriter) -> list[SplitPlan]:
        """Plan every split, and keep the blocks of this rank if there are ranks."""
        writer.add_source(self.source)
        arrays = arrays_of(self.poolings, self.layers, self.source.n_layers)
        plans = []
        for split, examples in self.corpus.splits.items():
            writer.add_split(split, text_hash=examples.text_hash, **examples.columns)
            dtype = self.recipe.dtype
            plans.append(writer.plan(split, self.source.name, arrays=arrays, dtype=dtype))
        return plans if self.rank is None else self.rank.part_of(plans)

    def plan_only(self) -> tuple[list[SplitPlan], int | None]:
        """Plan without writing; refuse a cache that contradicts the task, or a disk without room.

        With the plans comes how many bytes are free where the cache lies, if that is known.
        """
        with self.open_writer(dry_run=True) as writer:
            plans = self.make_plans(writer)
            writer.check_space(sum(plan.size_bytes for plan in plans))
            return plans, writer.free_bytes

    def register(self) -> bool:
        """Make the cache ready for several writers; one of them does it, the others wait.

        Returns:
            Whether this process did it.

        Raises:
            CacheLockedError: a writer that shares nothing stays at work for a minute.
        """
        patient_until = time.monotonic() + PATIENCE_S
        while self.overwrite or not self._is_registered():
            try:
                with self.open_writer() as writer:
                    self.make_plans(writer)
                    writer.register()
                    return True
            except CacheLockedError:
                if time.monotonic() > patient_until:
                    raise
                time.sleep(0.1)
        return False

    def _is_registered(self) -> bool:
        with self.open_writer(dry_run=True) as writer:
            self.make_plans(writer)
            return writer.is_registered

    def load_extractor(
        self,
        layers: Sequence[int],
        *,
        expected: Mapping[str, Any] | None = None,
        n_rows: int = 0,
    ) -> Extractor:
        """Load the backbone up to the highest of these layers; refuse another than expected.

        `n_rows` are to be computed, in all.
        """
        return Extractor(
            self.recipe,
            layers=layers,
            poolings=self.poolings,
            prompts=self.source.prompts,
            **dataclasses.asdict(self.placement),
            expected_fingerprint=expected,
            n_rows=n_rows,
        )


def layers_to_run(plans: Sequence[SplitPlan]) -> tuple[int, ...]:
    """List the layers that some block lacks; where only token counts are lost, the cheapest."""
    missing = {layer for plan in plans for block in plan.blocks for _, layer in block.missing}
    return tuple(sorted(missing)) or (min(layer for plan in plans for _, layer in plan.arrays),)
