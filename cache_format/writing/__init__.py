"""How blocks of rows get into a cache: register, plan, write, finish."""

from __future__ import annotations

from llmembed.cache_format.writing.columns import check_weights
from llmembed.cache_format.writing.lock import LOCK, SHARED, WriterLock, holders, refuse_if_held
from llmembed.cache_format.writing.plan import Block, SplitPlan
from llmembed.cache_format.writing.register import consolidate, consolidated_metadata
from llmembed.cache_format.writing.writer import CacheWriter, UnitWriter

__all__ = [
    "LOCK",
    "SHARED",
    "Block",
    "CacheWriter",
    "SplitPlan",
    "UnitWriter",
    "WriterLock",
    "check_weights",
    "consolidate",
    "consolidated_metadata",
    "holders",
    "refuse_if_held",
]
