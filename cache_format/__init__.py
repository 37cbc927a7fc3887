"""What lies on disk, and nothing else: the cache's schema, writer and reader."""

from llmembed.cache_format.plan import Block, SplitPlan
from llmembed.cache_format.reader import Cache, Split, open_cache
from llmembed.cache_format.schema import DatasetInfo, SourceInfo, plan_bytes
from llmembed.cache_format.writer import CacheWriter

__all__ = [
    "Block",
    "Cache",
    "CacheWriter",
    "DatasetInfo",
    "SourceInfo",
    "Split",
    "SplitPlan",
    "open_cache",
    "plan_bytes",
]
