"""What an extraction did, and how it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmembed.common.errors import ExtractionError, RowError
from llmembed.extract.engines.task import Task
from llmembed.extract.features.extractor import Way
from llmembed.extract.features.forward import Tokenized

HOPELESS = 32
"""Blocks that must not be stored, without one that may, after which an extraction stops."""


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
    """Rows that got the feature of an earlier row of their block with the same text."""
    seconds: float
    """Wall time of computing and writing."""
    is_share: bool
    """Whether only the blocks of one rank were to be done."""
    packed: bool | None
    """Whether texts were packed behind each other, without pads; None if nothing was computed."""
    compiled: bool | None
    """Whether blocks were compiled; None if nothing was computed."""
    cuda_graphs: bool | None
    """Whether passes were recorded as CUDA graphs; None if nothing was computed."""
    attention: str | None
    """What transformers calls the attention that ran; None if nothing was computed."""
    notes: tuple[str, ...]
    """What was decided or noticed and a user should know."""

    def describe(self) -> str:
        """Tell the outcome in a few lines."""
        rows = ", ".join(f"{split} {count:,}" for split, count in self.n_rows.items())
        layers = ", ".join(map(str, self.layers))
        what = f"{self.path}: {rows}; source {self.source}, layers {layers}"
        if not self.n_rows_computed:
            whole = "This rank's share" if self.is_share else "The cache"
            return "\n".join((f"{what}. {whole} is complete: nothing to do.", *self.notes))
        rate = self.n_tokens / self.seconds
        done = f"{self.n_rows_computed:,} rows, {self.n_tokens:,} tokens in {self.seconds:,.1f} s"
        return "\n".join((f"{what}.", f"{done} ({rate:,.0f} tokens/s).", *self.notes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What was done; counts of parts can be added."""

    n_rows_computed: int = 0
    n_tokens: int = 0
    n_truncated: int = 0
    n_empty: int = 0
    n_duplicates: int = 0
    left: tuple[str, ...] = ()
    """What keeps blocks of rows from being done."""
    ways: tuple[Way, ...] = ()
    """How passes were run, each way once."""

    @classmethod
    def of(cls, tokenized: Tokenized, n_computed: int) -> Counts:
        """Count a block of rows, of which some are duplicates and were not computed."""
        return cls(
            n_rows_computed=len(tokenized.ids),
            n_tokens=int(tokenized.n_tokens.sum()),
            n_truncated=tokenized.n_truncated,
            n_empty=tokenized.n_empty,
            n_duplicates=len(tokenized.ids) - n_computed,
        )

    def __add__(self, other: Counts) -> Counts:
        """Add field by field."""
        mine, more = vars(self), vars(other)
        total = {name: mine[name] + more[name] for name in mine if name != "ways"}
        return Counts(**total, ways=tuple(dict.fromkeys(self.ways + other.ways)))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Counts:
        """Read what `dataclasses.asdict` made, through JSON."""
        ways = tuple(Way(**way) for way in record["ways"])
        return cls(**{**record, "left": tuple(record["left"]), "ways": ways})

    def refuse_hopeless(self) -> None:
        """Stop early where no block can be done, with the first reason."""
        if len(self.left) >= HOPELESS and not self.n_rows_computed:
            tried = f"None of {len(self.left)} blocks could be stored, so no other was tried"
            raise ExtractionError(f"{self.left[0]} {tried}.")

    def refuse_left(self) -> None:
        """Name what keeps rows from being done, if there is any, once all others are."""
        if self.left:
            more = f" but those of {len(self.left) - 1} more failures" if self.left[1:] else ""
            raise RowError(
                f"{self.left[0]} All other blocks of rows{more} are done. Remove the cause and run "
                "the same command again."
            )


def summary(task: Task, counts: Counts, seconds: float) -> Extraction:
    """Tell what a call did for a task."""
    done = {name: n for name, n in vars(counts).items() if name not in ("left", "ways")}
    ways = counts.ways
    return Extraction(
        path=task.cache,
        source=task.source.name,
        layers=task.layers,
        poolings=task.poolings,
        n_rows={split: len(examples) for split, examples in task.corpus.splits.items()},
        seconds=seconds,
        is_share=task.rank is not None,
        packed=all(way.packed for way in ways) if ways else None,
        compiled=all(way.compiled for way in ways) if ways else None,
        cuda_graphs=all(way.cuda_graphs for way in ways) if ways else None,
        attention=", ".join(sorted({way.attention for way in ways})) or None,
        notes=tuple(_notes(task, counts)),
        **done,
    )


def _notes(task: Task, counts: Counts) -> list[str]:
    columns, notes = task.corpus.provenance, []
    if counts.n_rows_computed and "text_column" in columns:
        text, label = columns["text_column"], columns["label_column"]
        notes.append(f"Text from column {text!r}, label from {label!r}.")
    notes += task.corpus.notes
    notes += task.recipe.notes_on(counts.n_truncated, counts.n_empty)
    if counts.n_duplicates:
        notes.append(
            f"{counts.n_duplicates:,} texts repeat one of their block: they share a feature."
        )
    for reason in sorted({way.why_padded for way in counts.ways} - {""}):
        notes.append(f"Texts were padded, neither packed nor compiled: {reason}.")
    if any(way.prompts_share is False for way in counts.ways):
        notes.append(
            f"{task.recipe.found.name} read each text once for every prompt, which costs that many "
            "passes: what its tokens share is not plain attention to all before them."
        )
    if task.rank is not None:
        share = f"This was rank {task.rank.number} of {task.rank.world}."
        notes.append(f"{share} When all have ended: llmembed-cache finalize {task.cache}")
    return notes
