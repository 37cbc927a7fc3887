"""What the parts of `bench_gpu.py` share: the model, the texts, our way of loading it."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_extract import timed
from made_up import DATA_SETS, make_up_texts, n_words

from llmembed.extract import Extractor, Recipe


class Skipped(Exception):  # noqa: N818 - no error
    """A part cannot be measured here; says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """One model on one device."""

    folder: Path
    """The model's."""
    config: Any
    """The model's."""
    device: torch.device
    scratch: Path
    """A folder for what is written."""
    n_tokens: int
    """Tokens of the texts of each data set."""
    rounds: int
    """Times that all ways take their turn."""

    @property
    def n_layers(self) -> int:
        """Blocks of the whole model."""
        return int(self.config.num_hidden_layers)

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of ours and of the others: bfloat16, on a CPU float32."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @functools.cached_property
    def texts(self) -> Mapping[str, list[str]]:
        """The texts of each data set."""
        words = n_words(self.config)
        return {name: make_up_texts(one, self.n_tokens, words) for name, one in DATA_SETS.items()}

    @functools.cached_property
    def ids(self) -> Mapping[str, list[list[int]]]:
        """Their token ids."""
        return {name: self.ours.tokenize(texts).ids for name, texts in self.texts.items()}

    @functools.cached_property
    def ours(self) -> Extractor:
        """Our way on four layers, the last among them, warm on every data set."""
        return self.extractor(self.n_layers)

    def extractor(self, last: int, quantize: str | None = None) -> Extractor:
        """Load our way on quarters of the layers up to `last`, and run every data set once."""
        recipe = Recipe(
            model=str(self.folder),
            max_length=max(one.official_width for one in DATA_SETS.values()),
            compute_dtype=str(self.dtype).removeprefix("torch."),
            dtype="float32",
            quantize=quantize,
        )
        quarter = max(1, self.n_layers // 4)
        layers = sorted({*range(quarter, last, quarter), last})
        made = Extractor(recipe, layers=layers, poolings=["mean"], device=str(self.device))
        for texts in self.texts.values():
            made.features(texts)
        return made

    def few(self, name: str, share: float) -> list[list[int]]:
        """Take the first texts of a data set, which is in random order."""
        ids = self.ids[name]
        return ids[: max(4, int(share * len(ids)))]

    def by_turns(self, ways: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Time all ways in each round: seconds by name."""
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.rounds):
            for name, way in ways.items():
                seconds[name].append(timed(way)[0])
        return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of how many times more one took than the other."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
