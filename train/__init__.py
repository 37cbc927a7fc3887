"""Cache -> fused features -> classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmembed.train.config import FitConfig

if TYPE_CHECKING:
    from llmembed.train.fitting import fit
    from llmembed.train.run import Run, load_run

__all__ = ["FitConfig", "Run", "fit", "load_run"]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name == "fit":
        from llmembed.train import fitting

        return fitting.fit
    if name in {"Run", "load_run"}:
        from llmembed.train import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
