"""How several features become one vector, and what stands on it.

The names and facts here need no torch; the classes are in the modules, one a family.
"""

from __future__ import annotations

from llmembed.train.fusions.registry import (
    AUTO,
    FUSIONS,
    HEADS,
    FusionSpec,
    HeadSpec,
    choices,
    register_fusion,
    register_head,
)

__all__ = [
    "AUTO",
    "FUSIONS",
    "HEADS",
    "FusionSpec",
    "HeadSpec",
    "choices",
    "register_fusion",
    "register_head",
]
