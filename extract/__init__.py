"""Text -> hidden states of a frozen backbone -> cache."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmembed.extract.backbones.models import register_model as register_model
    from llmembed.extract.backbones.recipe import Recipe as Recipe
    from llmembed.extract.config import ExtractConfig as ExtractConfig
    from llmembed.extract.engines.outcome import Extraction as Extraction
    from llmembed.extract.features.extractor import Extractor as Extractor
    from llmembed.extract.features.poolings import register_pooling as register_pooling
    from llmembed.extract.pipeline import extract as extract
    from llmembed.extract.recall import TextFeatures as TextFeatures

_HOME = {
    "ExtractConfig": "config",
    "Extraction": "engines.outcome",
    "Extractor": "features.extractor",
    "Recipe": "backbones.recipe",
    "TextFeatures": "recall",
    "extract": "pipeline",
    "register_model": "backbones.models",
    "register_pooling": "features.poolings",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is asked for."""
    if name not in _HOME:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
