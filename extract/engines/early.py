"""What a cache refuses before the model is looked for, so that nobody waits for that in vain.

Texts and labels are compared, and of a backbone what options and its name say; what its files say
is compared once they are read. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses

from llmembed.cache_format import CacheWriter, SourceInfo
from llmembed.common.errors import CacheLockedError
from llmembed.common.layers import parse_layers
from llmembed.extract.backbones.models import called
from llmembed.extract.config import ExtractConfig
from llmembed.extract.features.poolings import arrays_of
from llmembed.extract.texts.corpora import Corpus
from llmembed.extract.texts.prompts import pooling_of, resolve_prompts


def place_of(config: ExtractConfig, corpus: Corpus) -> str:
    """Say where the cache of a data set lies: a folder or a URL."""
    return config.cache or f"{corpus.name}.zarr"


def refuse_cache(config: ExtractConfig, corpus: Corpus, *, writes: bool) -> None:
    """Refuse a cache of other texts or another backbone, or one that another writer holds.

    Those who share a cache wait for its lock, once they have a backbone; they are not asked for it.

    Args:
        config: what to extract.
        corpus: the texts.
        writes: whether rows that are missing are to be written.

    Raises:
        CacheFormatError: something else than a cache is there, or one of a later version.
        CacheLockedError: rows are missing, and who writes shares nothing.
        CacheMismatchError: the cache is of other texts or another backbone.
    """
    with CacheWriter(
        place_of(config, corpus), dataset=corpus.dataset, overwrite=config.overwrite, dry_run=True
    ) as writer:
        for split, examples in corpus.splits.items():
            writer.add_split(split, text_hash=examples.text_hash, **examples.columns)
        source = _known_source(writer, config, corpus)
        if source is not None:
            writer.add_source(source)
        if not writes or config.rank is not None or config.engine == "ray":
            return
        try:
            writer.refuse_if_taken()
        except CacheLockedError:
            # Planned only now: a large cache takes a while, and hardly ever is one held.
            if source is None or _lacks_rows(writer, config, corpus, source):
                raise


def _known_source(writer: CacheWriter, config: ExtractConfig, corpus: Corpus) -> SourceInfo | None:
    """Give the source that goes on, as it would be if the files of the backbone were the same."""
    name, backbone = called(config.model)
    known = writer.sources.get(config.source or name)
    if known is None:
        return None
    asked = {"backbone": backbone, "template": config.template, "quantize": config.quantize}
    if config.compute_dtype != "auto":
        asked["compute_dtype"] = config.compute_dtype
    fingerprint = {**known.fingerprint, **asked}
    longest = fingerprint.get("max_length")
    if not isinstance(longest, int) or config.max_length < longest:  # a model only lowers it
        fingerprint["max_length"] = config.max_length
    if corpus.text_pair:
        fingerprint["text_pair"] = True
    else:
        fingerprint.pop("text_pair", None)
    return dataclasses.replace(known, fingerprint=fingerprint)


def _lacks_rows(
    writer: CacheWriter, config: ExtractConfig, corpus: Corpus, source: SourceInfo
) -> bool:
    prompts = resolve_prompts(config.prompts, corpus.labels)
    poolings = (*config.pooling, *map(pooling_of, prompts))
    layers = parse_layers(config.layers, source.n_layers, source.name)
    arrays = arrays_of(poolings, layers, source.n_layers)
    return any(
        writer.plan(split, source.name, arrays=arrays, dtype=config.dtype).blocks
        for split in corpus.splits
    )
