"""What `llmembed-fit`, `llmembed-sweep` and `llmembed-audit` can be told, and what it comes to.

Options are checked here, once, but for what only the cache knows. `FitConfig.plan` resolves them
into a `Plan`, which is all that the rooms below see.

The defaults of heads and gradient fits were chosen by cross-validation on training splits of real
features; while the stack under `auto` and `cooc` was designed, test figures stood beside the
held-out ones (benchmarks/LOG.md).
"""

from llmembed.train.config.audit import AuditConfig
from llmembed.train.config.fit import FitConfig
from llmembed.train.config.plan import PRESETS, Method, Plan, Reading, Training
from llmembed.train.config.sweep import SweepConfig

__all__ = [
    "PRESETS",
    "AuditConfig",
    "FitConfig",
    "Method",
    "Plan",
    "Reading",
    "SweepConfig",
    "Training",
]
