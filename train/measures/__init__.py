"""How good a classifier is, and how sure."""

from llmembed.train.measures.calibration import calibrate, calibrate_trained, fit_temperature
from llmembed.train.measures.doubt import HeldOutRows
from llmembed.train.measures.metrics import Floats, Labels, summarise, wilson_interval

__all__ = [
    "Floats",
    "HeldOutRows",
    "Labels",
    "calibrate",
    "calibrate_trained",
    "fit_temperature",
    "summarise",
    "wilson_interval",
]
