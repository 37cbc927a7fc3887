"""Text -> hidden states of a frozen backbone -> cache."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmembed.extract.backbones.models import register_model
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.config import ExtractConfig
from llmembed.extract.features.poolings import register_pooling
from llmembed.extract.texts import register_dataset

if TYPE_CHECKING:
    from llmembed.extract.engines.outcome import Extraction
    from llmembed.extract.features.extractor import Extractor
    from llmembed.extract.pipeline import extract
    from llmembed.extract.recall import TextFeatures

_HOME = {
    "Extraction": "engines.outcome",
    "Extractor": "features.extractor",
    "TextFeatures": "recall",
    "extract": "pipeline",
}
__all__ = [
    "ExtractConfig",
    "Extraction",
    "Extractor",
    "Recipe",
    "TextFeatures",
    "extract",
    "register_dataset",
    "register_model",
    "register_pooling",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
