"""Fits by gradient, through Lightning, which is imported with `fit` alone."""

from __future__ import annotations

from llmembed.train.gradient.workspace import LOGS, check_logger, open_workspace

__all__ = ["LOGS", "check_logger", "open_workspace"]
