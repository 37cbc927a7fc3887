"""A request for features once it is checked: what to compute, of which texts, into which cache."""

from __future__ import annotations

import dataclasses

from llmembed.cache_format import DatasetInfo, SourceInfo
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.config import ExtractConfig
from llmembed.extract.texts.corpora import Corpus


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
