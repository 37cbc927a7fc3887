"""What lies on disk, and nothing else: the cache's schema, writer and reader.

Names are imported when they are first used: every command lives below this package, and `--help`
should not wait for numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmembed.cache_format.layout.schema import DatasetInfo, SourceInfo
    from llmembed.cache_format.reader import Cache, Split, open_cache
    from llmembed.cache_format.writing import Block, CacheWriter, SplitPlan

__all__ = [
    "Block",
    "Cache",
    "CacheWriter",
    "DatasetInfo",
    "SourceInfo",
    "Split",
    "SplitPlan",
    "open_cache",
]

_HOMES = {
    "layout.schema": ("DatasetInfo", "SourceInfo"),
    "reader": ("Cache", "Split", "open_cache"),
    "writing": ("Block", "CacheWriter", "SplitPlan"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
