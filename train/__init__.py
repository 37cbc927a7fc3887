"""Cache -> fused features -> classifier."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmembed.train.config import FitConfig
from llmembed.train.sweep_config import SweepConfig

if TYPE_CHECKING:
    from llmembed.train.estimator import LLMEmbedClassifier
    from llmembed.train.fitting import fit
    from llmembed.train.runs.run import Run, load_run
    from llmembed.train.sweeping import run_sweep

_HOME = {
    "LLMEmbedClassifier": "estimator",
    "Run": "runs.run",
    "fit": "fitting",
    "load_run": "runs.run",
    "run_sweep": "sweeping",
}
__all__ = ["FitConfig", "LLMEmbedClassifier", "Run", "SweepConfig", "fit", "load_run", "run_sweep"]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
