"""Cache -> fused features -> classifier."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmembed.train.config import AuditConfig, FitConfig, SweepConfig
from llmembed.train.fusions import register_fusion, register_head

if TYPE_CHECKING:
    from llmembed.train.fusions.mixing import Fusion
    from llmembed.train.runs.folder import load_run
    from llmembed.train.runs.run import Run
    from llmembed.train.verbs.auditing import run_audit
    from llmembed.train.verbs.comparing import compare_fusions
    from llmembed.train.verbs.estimator import LLMEmbedClassifier
    from llmembed.train.verbs.fitting import fit
    from llmembed.train.verbs.sweeping import run_sweep

_HOME = {
    "Fusion": "fusions.mixing",
    "LLMEmbedClassifier": "verbs.estimator",
    "Run": "runs.run",
    "compare_fusions": "verbs.comparing",
    "fit": "verbs.fitting",
    "load_run": "runs.folder",
    "run_audit": "verbs.auditing",
    "run_sweep": "verbs.sweeping",
}
__all__ = [
    "AuditConfig",
    "FitConfig",
    "Fusion",
    "LLMEmbedClassifier",
    "Run",
    "SweepConfig",
    "compare_fusions",
    "fit",
    "load_run",
    "register_fusion",
    "register_head",
    "run_audit",
    "run_sweep",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
