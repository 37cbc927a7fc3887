"""How good a classifier is, and how sure."""

from llmembed.train.measures.calibration import (
    calibrate,
    calibrate_labels,
    calibrate_trained,
    fit_temperature,
)
from llmembed.train.measures.doubt import HeldOutRows
from llmembed.train.measures.metrics import Floats, Labels, summarise, wilson_interval
from llmembed.train.measures.sets import (
    Sets,
    decided,
    find_thresholds,
    likeliest_first,
    names_of,
    share_right,
    summarise_sets,
)

__all__ = [
    "Floats",
    "HeldOutRows",
    "Labels",
    "Sets",
    "calibrate",
    "calibrate_labels",
    "calibrate_trained",
    "decided",
    "find_thresholds",
    "fit_temperature",
    "likeliest_first",
    "names_of",
    "share_right",
    "summarise",
    "summarise_sets",
    "wilson_interval",
]
