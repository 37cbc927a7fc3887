"""Features of texts that are in memory; with a cache, no text is computed twice.

A cache of this kind has no classes and grows by splits: the texts of one call that it does not know
yet become a split that is named by their hashes. So an interrupted call is resumed by the same
call, and splits that were never finished are not read. Texts are known by their 64-bit hash alone,
since a cache holds no texts. The price is many small files where texts come one by one: leave the
cache out there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from llmembed.cache_format import Cache, Split, open_cache
from llmembed.common.errors import (
    CacheLockedError,
    CacheMismatchError,
    CacheNotFoundError,
    DataError,
    LLMEmbedWarning,
    listed,
)
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.config import ExtractConfig
from llmembed.extract.features.extractor import BLOCK_TEXTS, Extractor, Features
from llmembed.extract.features.poolings import arrays_of
from llmembed.extract.pipeline import extract, resolve_recipe
from llmembed.extract.texts import describe_bad_text
from llmembed.extract.texts.corpora import Corpus, Examples
from llmembed.extract.texts.labels import UNLABELLED
from llmembed.extract.texts.prompts import pooling_of, resolve_prompts

_NAME = "texts"
Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]


class TextFeatures:
    """Makes features of texts by one backbone, and recalls them where a cache is given.

    It may be pickled: the backbone stays behind, and is loaded and compared again when needed.

    Args:
        config: how to extract; `dataset`, `source` and `limit` have no meaning here.

    Attributes:
        recipe: how the backbone is loaded and texts are treated.
        source: name of the backbone, made different for every fingerprint.
        arrays: (pooling, layer) of all features.
        hidden_size: H.
    """

    def __init__(self, config: ExtractConfig) -> None:
        self.recipe, self._layers = resolve_recipe(config, config.cache or "")
        self._fingerprint = self.recipe.fingerprint
        identity = json.dumps([self._fingerprint, self.recipe.dtype], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        self.source = f"{self.recipe.found.name}-{digest[:8]}"
        self.hidden_size = self.recipe.shape.hidden_size
        self._prompts = resolve_prompts(config.prompts)
        self._poolings = sorted({*config.pooling, *map(pooling_of, self._prompts)})
        if self._prompts:
            self.recipe.refuse_prompts(self._prompts)
        self.arrays = arrays_of(self._poolings, self._layers, self.recipe.shape.n_layers)
        self._config = dataclasses.replace(
            config, source=self.source, compute_dtype=self.recipe.compute_dtype
        )
        self._extractor: Extractor | None = None
        self._lock = threading.Lock()  # neither tokenizers nor models serve two threads at a time

    def __getstate__(self) -> dict[str, Any]:
        """Give plain values alone, and leave the backbone and the tokenizer behind."""
        plain = {
            "recipe": dataclasses.asdict(self.recipe),
            "_config": dataclasses.asdict(self._config),
        }
        state = {**self.__dict__, **plain, "_extractor": None}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build recipe and options from them, with a lock of its own."""
        built = {"recipe": Recipe(**state["recipe"]), "_config": ExtractConfig(**state["_config"])}
        self.__dict__.update(state | built, _lock=threading.Lock())

    def in_blocks(self, texts: Sequence[str]) -> Iterator[Features]:
        """Give the features of texts, each float16 or float32 `[n, H]`, some thousand at a time.

        With a cache all that it lacks is computed and stored first.

        Raises:
            DataError: a text is no string, or not valid Unicode.
            ModelError: the backbone is no longer the one it was.
            CacheMismatchError: the cache is that of a data set.
        """
        try:
            hashes = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in texts], "u8")
        except (AttributeError, UnicodeEncodeError) as error:
            raise DataError(describe_bad_text(texts)) from error
        if self._config.cache is None:
            yield from self._computed(texts)
            return
        held = self._holding(self._config.cache, hashes)
        fresh = _first_of_each(hashes, [split.text_hash[rows] for split, rows in held])
        if len(fresh):
            try:
                self._extend([texts[row] for row in fresh], hashes[fresh])
            except CacheLockedError as error:
                warnings.warn(f"{error} Computed without it.", LLMEmbedWarning, stacklevel=2)
                yield from self._computed(texts)
                return
            held = self._holding(self._config.cache, hashes)
        for start in range(0, len(hashes), BLOCK_TEXTS):
            yield self._gather(held, hashes[start : start + BLOCK_TEXTS])

    def _computed(self, texts: Sequence[str]) -> Iterator[Features]:
        with self._lock:
            if self._extractor is None:
                self._extractor = Extractor(
                    self.recipe,
                    layers=self._layers,
                    poolings=self._poolings,
                    prompts=self._prompts,
                    device=self._config.device,
                    token_budget=self._config.token_budget,
                    expected_fingerprint=self._fingerprint,
                )
            blocks = self._extractor.in_blocks(texts)
        while True:
            with self._lock:  # not while the caller has the block: he may never come back
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def _extend(self, texts: Sequence[str], hashes: Hashes) -> None:
        labels = np.full(len(texts), UNLABELLED, dtype=np.int32)
        examples = Examples(texts=pa.chunked_array([pa.array(texts)]), labels=labels)
        split = f"texts-{xxhash.xxh3_64_hexdigest(hashes.tobytes())}"
        corpus = Corpus(name=_NAME, labels=(), splits={split: examples}, provenance={})
        extract(self._config, corpus=corpus)

    def _holding(self, path: str, hashes: Hashes) -> list[tuple[Split, Rows]]:
        """List the finished splits of the cache, with the rows that hold some of these texts."""
        try:
            cache = open_cache(path)
        except CacheNotFoundError:
            return []
        _refuse_dataset(path, cache)
        wanted = [(self.source, pooling, layer) for pooling, layer in self.arrays]
        return [
            (split, np.flatnonzero(np.isin(split.text_hash, hashes)))
            for split in (cache[name] for name in cache.splits)
            if all(split.arrays.get(array) == split.n_rows for array in wanted)
        ]

    def _gather(self, held: Sequence[tuple[Split, Rows]], hashes: Hashes) -> Features:
        held = [(split, rows[np.isin(split.text_hash[rows], hashes)]) for split, rows in held]
        known = np.concatenate([split.text_hash[rows] for split, rows in held])
        order = np.argsort(known)
        chosen = order[np.searchsorted(known, hashes, sorter=order)]
        features = {}
        for pooling, layer in self.arrays:
            parts = [
                split.features(layer, self.source, pooling, rows, verify=True)
                for split, rows in held
            ]
            features[pooling, layer] = np.concatenate(parts)[chosen]
        return features


def _refuse_dataset(path: str, cache: Cache) -> None:
    """Refuse a cache that an extraction of a data set made.

    Raises:
        CacheMismatchError: it is one.
    """
    if cache.dataset.name == _NAME and not cache.labels:
        return
    of_classes = "1 class" if len(cache.labels) == 1 else f"{len(cache.labels):,} classes"
    splits = listed(sorted(cache.splits)) or "none"
    raise CacheMismatchError(
        f"the cache {path} holds the data set {cache.dataset.name!r} ({of_classes}, splits: "
        f"{splits}), which llmembed-extract made, and cache= wants one of texts alone, which "
        "LLMEmbedClassifier makes. Pass a path where there is no cache yet, or fit on this one: "
        f"llmembed-fit --cache {path}, in Python fit(FitConfig(cache={path!r}))."
    )


def _first_of_each(hashes: Hashes, known: Sequence[Hashes]) -> Rows:
    """List the first row of each text that is not known.

    >>> _first_of_each(np.array([5, 7, 5, 9], "u8"), [np.array([9], "u8")]).tolist()
    [0, 1]
    """
    unknown = ~np.isin(hashes, np.concatenate([np.empty(0, np.uint64), *known]))
    rows = np.flatnonzero(unknown)
    return np.sort(rows[np.unique(hashes[rows], return_index=True)[1]])
