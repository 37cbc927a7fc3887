"""What is done to whole caches: verify, finalize, convert, merge, copy, remove, describe."""

from __future__ import annotations

from llmembed.cache_format.tools.convert import convert
from llmembed.cache_format.tools.describe import describe, tree
from llmembed.cache_format.tools.maintenance import copy, merge
from llmembed.cache_format.tools.removal import parse_layers, remove
from llmembed.cache_format.tools.verify import (
    Part,
    Verification,
    finalize,
    require_sound,
    summary,
    verify,
)

__all__ = [
    "Part",
    "Verification",
    "convert",
    "copy",
    "describe",
    "finalize",
    "merge",
    "parse_layers",
    "remove",
    "require_sound",
    "summary",
    "tree",
    "verify",
]
