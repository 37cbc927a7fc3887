"""Text classification on the cached hidden states of a frozen language model.

The names of the Python API, imported when they are first used: `import llmembed` imports neither
torch nor scikit-learn. The function that extracts is `llmembed.extract.extract`, for
`llmembed.extract` is the package it lives in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmembed import cache_format as cache_format
    from llmembed import extract as extract
    from llmembed import train as train
    from llmembed.cache_format import open_cache as open_cache
    from llmembed.extract import ExtractConfig as ExtractConfig
    from llmembed.train import FitConfig as FitConfig
    from llmembed.train import LLMEmbedClassifier as LLMEmbedClassifier
    from llmembed.train import fit as fit
    from llmembed.train import load_run as load_run

    __version__: str

_HOME = {
    "ExtractConfig": "extract",
    "FitConfig": "train",
    "LLMEmbedClassifier": "train",
    "fit": "train",
    "load_run": "train",
    "open_cache": "cache_format",
}
_PACKAGES = ("cache_format", "extract", "train")
__all__ = ["__version__", *_HOME, *_PACKAGES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("llmembed-cache")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
