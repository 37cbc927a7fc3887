"""What a fit reads: features, splits, weights, and what estimators are given."""

from llmembed.train.inputs.data import (
    Batch,
    FeatureBatches,
    FitData,
    columns_of,
    data_in_memory,
    load_data,
    load_each,
    read_features,
)
from llmembed.train.inputs.select import Feature
from llmembed.train.inputs.sets import strata_of, targets_of
from llmembed.train.inputs.shares import draw_folds, usual_folds
from llmembed.train.inputs.weighing import mean_loss, weights_of

__all__ = [
    "Batch",
    "Feature",
    "FeatureBatches",
    "FitData",
    "columns_of",
    "data_in_memory",
    "draw_folds",
    "load_data",
    "load_each",
    "mean_loss",
    "read_features",
    "strata_of",
    "targets_of",
    "usual_folds",
    "weights_of",
]
