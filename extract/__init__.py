"""Text -> hidden states of a frozen backbone -> cache."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmembed.extract.config import ExtractConfig as ExtractConfig
    from llmembed.extract.extractor import Extractor as Extractor
    from llmembed.extract.outcome import Extraction as Extraction
    from llmembed.extract.pipeline import extract as extract
    from llmembed.extract.recall import TextFeatures as TextFeatures
    from llmembed.extract.recipe import Recipe as Recipe

_HOME = {
    "ExtractConfig": "config",
    "Extraction": "outcome",
    "Extractor": "extractor",
    "Recipe": "recipe",
    "TextFeatures": "recall",
    "extract": "pipeline",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is asked for."""
    if name not in _HOME:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
