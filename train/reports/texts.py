"""The texts of a cache, where they still are: a cache and a run hold none.

The cache says where its data set came from. It is read from there again, never from the network,
and what is not the text that the cache has a hash of is not shown.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmembed.cache_format import Cache, Split, open_cache
from llmembed.common.errors import CacheError, LLMEmbedError, LLMEmbedWarning
from llmembed.train.runs.record import DAMAGE

if TYPE_CHECKING:
    from llmembed.extract.texts.corpora import Examples

MOST_ROWS = 200_000
"""Rows of all splits together, beyond which no report waits for them to be read."""


_RECORDED = ("config", "text_column", "label_column", "unlabelled", "label_separator")


class TextsNotFoundError(Exception):
    """Says in one clause why there are no texts; it is shared with a run, so it has no path."""


def find_texts(cache: Cache, splits: Sequence[str]) -> dict[str, list[str]]:
    """Read the texts of splits, in the order of their rows.

    Raises:
        TextsNotFoundError: they are not on this machine, are others by now, or too many.
    """
    n_rows = sum(cache[split].n_rows for split in splits)
    if n_rows > MOST_ROWS:
        raise TextsNotFoundError(f"there are {n_rows:,}, more than {MOST_ROWS:,}")
    from llmembed.extract.texts import DatasetOptions, Dialect

    known = cache.dataset.provenance
    place = _place(cache.dataset.name, known)
    with _from_this_machine():
        from llmembed.extract.texts.corpora import load_corpus

        try:
            recorded: dict[str, Any] = {name: known.get(name) for name in _RECORDED}
            options = DatasetOptions(
                place, splits=tuple(splits), dialect=Dialect.of(known), **recorded
            )
            corpus = load_corpus(options)
        except (LLMEmbedError, OSError, *DAMAGE) as error:  # a cache may record anything
            raise TextsNotFoundError(f"{Path(place).name} could not be read again") from error
    return {split: _those_of(corpus.splits[split], cache[split], place) for split in splits}


def _those_of(examples: Examples, split: Split, place: str) -> list[str]:
    """Pick the texts of a split by their hashes: each split may have had a limit of its own."""
    order = np.argsort(examples.text_hash)
    places = np.searchsorted(examples.text_hash, split.text_hash, sorter=order)
    rows = order[places.clip(max=len(order) - 1)] if len(order) else places
    if not len(order) or not np.array_equal(examples.text_hash[rows], split.text_hash):
        raise TextsNotFoundError(
            f"the texts of {split.name!r} in {Path(place).name} are others by now"
        )
    return list(examples.take(rows).texts.to_pylist())


def evaluated_texts(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """Read the texts of a run's evaluation split, from config.json and metrics.json.

    Raises:
        TextsNotFoundError: they, or the cache, are not on this machine, or are others by now.
    """
    place = config["fit"]["cache"]
    if "://" in place:  # the run may be a stranger's
        raise TextsNotFoundError("its cache is not on this machine")
    try:
        cache = open_cache(place)
        if cache.fingerprint != config["cache"]["fingerprint"]:
            raise TextsNotFoundError(f"{place} is another cache by now")
        split = metrics["splits"]["eval"]["split"].partition(" (")[0]
        return find_texts(cache, [split])[split]
    except CacheError as error:
        raise TextsNotFoundError(str(error).partition(". ")[0]) from error


def _place(name: str, known: Mapping[str, Any]) -> str:
    """Find what `--dataset` would be, of what is on this machine."""
    from llmembed.extract.texts import DATASETS

    origin = known.get("origin")
    if not isinstance(origin, str):
        raise TextsNotFoundError("the cache does not say where its texts came from")
    for alias in {name, origin} & {*DATASETS}:
        found = DATASETS[alias]
        if found.package == origin or (found.files and alias == origin):
            return alias
    if Path(origin).is_absolute():
        if os.path.exists(origin):  # noqa: PTH110 - False for a name that is too long
            return origin
        raise TextsNotFoundError(f"{Path(origin).name} is not where it was")
    from huggingface_hub.constants import HF_HOME

    kept = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    if not any(_squeezed(path.name) == _squeezed(origin) for path in kept.glob("*___*")):
        raise TextsNotFoundError(f"no copy of the data set {origin} is on this machine")
    import datasets  # noqa: F401 - where HF_HUB_OFFLINE is set, as below, it would stay offline

    return origin


def _squeezed(name: str) -> str:
    """Make a Hub id and the name of its folder alike, which has other cases and dashes."""
    return re.sub(r"[\W_]", "", name).lower()


@contextmanager
def _from_this_machine() -> Iterator[None]:
    """Keep the network out, and what reading tells who extracts."""
    from huggingface_hub import constants

    log, offline = logging.getLogger("llmembed.extract.texts"), constants.HF_HUB_OFFLINE
    level = log.level
    log.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LLMEmbedWarning)
            yield
    finally:
        log.setLevel(level)
        constants.HF_HUB_OFFLINE = offline
