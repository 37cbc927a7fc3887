"""Extract some rows of a cache again, and compare: `llmembed-cache verify --model`.

Hashes prove that the rows are those that were written; this proves that they were right, on this
machine, with these model files and these texts. Rows are found by the hash of their text, so the
data set may be in another order, or larger. Other batches, kernels and devices round differently:
the difference that the arithmetic explains is allowed, and said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import Cache, Split, open_cache
from llmembed.common.errors import CacheMismatchError, ConfigError, DataError
from llmembed.common.splits import split_name
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.features.extractor import Extractor
from llmembed.extract.features.selfcheck import allowed
from llmembed.extract.texts import DatasetOptions, Dialect
from llmembed.extract.texts.corpora import Corpus, load_corpus

_ROUNDING = {"float16": 1e-3, "float32": 0.0}
"""What storing adds to the relative difference of a row, twice the unit roundoff."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """An array whose stored rows are not those that extraction gives now."""

    array: str
    """split/source/pooling/layer."""
    row: int
    """The worst of the rows compared."""
    difference: float
    """Its ||stored - now|| / ||now||."""
    tolerance: float
    """What rounding explains."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recheck:
    """What `recheck` found."""

    source: str
    """The source compared."""
    n_rows: Mapping[str, int]
    """Rows compared, by split."""
    n_arrays: int
    """Arrays compared."""
    largest: float
    """Largest relative difference seen."""
    differences: tuple[Difference, ...]
    """Empty if all agree."""

    @property
    def document(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return dataclasses.asdict(self)

    def summary(self) -> list[str]:
        """Say in lines of text what was found."""
        rows = ", ".join(f"{split} {count}" for split, count in self.n_rows.items())
        what = f"{self.source}: {self.n_arrays} arrays extracted again for random rows ({rows})"
        return [
            f"{what}, largest difference {self.largest:.2g}",
            *(
                f"DIFFERS {one.array}: row {one.row} by {one.difference:.2g} (relative); rounding "
                f"explains {one.tolerance:.2g}"
                for one in self.differences
            ),
        ]


def recheck(
    path: str, *, model: str, dataset: str | None = None, n_rows: int = 16, seed: int = 0
) -> Recheck:
    """Extract random rows of each split again and compare them with what the cache holds.

    Args:
        path: folder or URL of the cache.
        model: alias, Hub id or folder of one of its backbones.
        dataset: where the texts are; None is where the cache says they came from.
        n_rows: rows a split.
        seed: seed of their choice.

    Raises:
        CacheMismatchError: the model is none of the cache's sources.
        DataError: the data set has none of the texts.
        ConfigError, DatasetNotFoundError, ModelError: the request cannot be served.
    """
    if n_rows < 1:
        raise ConfigError(f"rows is {n_rows}; at least 1 is needed. Pass --rows 16.")
    cache = open_cache(path)
    source, extractor = _extractor(cache, model)
    corpus = _corpus(cache, dataset)
    found: list[Difference] = []
    compared = {}
    for name in cache.splits:
        rows, texts = _choose(cache[name], corpus, n_rows, seed)
        compared[name] = len(rows)
        features = extractor.compute(extractor.tokenize(texts))
        found += _differences(cache[name], source, rows, features, extractor.recipe)
    return Recheck(
        source=source,
        n_rows=compared,
        n_arrays=len(found),
        largest=max((one.difference for one in found), default=0.0),
        differences=tuple(one for one in found if not one.difference <= one.tolerance),
    )


def _corpus(cache: Cache, dataset: str | None) -> Corpus:
    """Read the texts as the cache says that they were read."""
    origin = cache.dataset.provenance
    place = str(origin.get("origin", ""))
    found = dataset or (place if place and Path(place).exists() else cache.dataset.name)
    return load_corpus(
        DatasetOptions(
            found,
            config=None if Path(found).exists() else _recorded(origin, "config"),
            splits=cache.splits,
            text_column=_recorded(origin, "text_column"),
            label_column=_recorded(origin, "label_column"),
            unlabelled=_recorded(origin, "unlabelled"),
            label_separator=_recorded(origin, "label_separator"),
            dialect=Dialect.of(origin),
        )
    )


def _recorded(origin: Mapping[str, object], option: str) -> str | None:
    value = origin.get(option)
    return None if value is None else str(value)


def _extractor(cache: Cache, model: str) -> tuple[str, Extractor]:
    """Load the model, and name the source that it made."""
    differing = []
    for name, source in cache.sources.items():
        recipe = Recipe.from_record({**source.recipe, "model": model})
        fingerprint = recipe.fingerprint
        other = [key for key, value in source.fingerprint.items() if fingerprint.get(key) != value]
        if not other:
            arrays = [key for split in cache.splits for key in cache[split].arrays]
            poolings = sorted({pooling for of, pooling, _ in arrays if of == name})
            layers = sorted({layer for of, _, layer in arrays if of == name})
            return name, Extractor(recipe, layers=layers, poolings=poolings, prompts=source.prompts)
        differing.append(f"{name} (another {', '.join(other)})")
    raise CacheMismatchError(
        f"{model} is none of the sources of {cache.path}: {'; '.join(differing)}. Pass the model "
        "that one of them was made with."
    )


def _choose(
    split: Split, corpus: Corpus, n_rows: int, seed: int
) -> tuple[npt.NDArray[np.int64], list[str]]:
    name = split.name if split.name in corpus.splits else split_name(split.name)
    examples = corpus.splits[name]
    place = {int(text_hash): row for row, text_hash in enumerate(examples.text_hash)}
    known = np.flatnonzero(np.isin(split.text_hash, examples.text_hash))
    if not len(known):
        raise DataError(
            f"none of the texts of split {split.name!r} is in the data set. Pass the one that the "
            "cache was made from to --dataset."
        )
    rows = np.sort(np.random.default_rng(seed).permutation(known)[:n_rows])
    places = [place[int(text_hash)] for text_hash in split.text_hash[rows]]
    return rows, [examples.batch(slice(at, at + 1))[0] for at in places]


def _differences(
    split: Split,
    source: str,
    rows: npt.NDArray[np.int64],
    features: Mapping[tuple[str, int], npt.NDArray[Any]],
    recipe: Recipe,
) -> list[Difference]:
    found = []
    for (pooling, layer), feature in features.items():
        if split.arrays.get((source, pooling, layer)) != split.n_rows:
            continue  # not asked for, or not complete yet
        now = feature.astype(np.float64)
        stored = split.features(layer, source, pooling, rows).astype(np.float64)
        distance = np.linalg.norm(stored - now, axis=1) / np.linalg.norm(now, axis=1)
        worst = int(np.argmax(distance))
        tolerance = allowed(recipe.compute_dtype, recipe.quantize, pooling)
        found.append(
            Difference(
                array=f"{split.name}/{source}/{pooling}/layer_{layer:03d}",
                row=int(rows[worst]),
                difference=float(distance[worst]),
                tolerance=tolerance + _ROUNDING[recipe.dtype],
            )
        )
    return found
