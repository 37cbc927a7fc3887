"""A run's classifier as one ONNX graph, for services that have neither torch nor this package.

Standardisation, fusion, head and temperature are in the graph: features go in as they lie in a
cache, side by side in the order of the run's config.json, and probabilities come out. The model's
metadata names features and classes, and where a text may have several the thresholds of these. The
backbone is not part of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llmembed.common.errors import MissingPackageError
from llmembed.train.fusions.classifier import Classifier

INPUT, OUTPUT = "features", "probabilities"
_OPSET = 18


def check_can_export() -> None:
    """Raise a MissingPackageError where onnx or onnxscript is not installed."""
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError.of(package, "onnx", "--export onnx")


def onnx_of(classifier: Classifier, record: Mapping[str, Any]) -> bytes:
    """Give the ONNX model of a run: float32 `[N, F]` features in, `[N, C]` probabilities out.

    Raises:
        MissingPackageError: onnx or onnxscript is not installed.
    """
    check_can_export()
    width = sum(classifier.architecture.widths)
    thresholds = classifier.thresholds
    last = nn.Softmax(dim=1) if thresholds is None else nn.Sigmoid()
    model = to_onnx(nn.Sequential(classifier, last).eval(), width)
    for key in ("labels", "features"):
        model.metadata_props.add(key=key, value=json.dumps(record[key]))
    if thresholds is not None:
        model.metadata_props.add(key="thresholds", value=json.dumps(thresholds.tolist()))
    return bytes(model.SerializeToString())


def to_onnx(module: nn.Module, width: int) -> Any:
    """Trace a module that takes float32 `[N, F]` into an ONNX model, whatever N is."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # no advice to the exporter's developers on the user's screen
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            torch.inference_mode(),
        ):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (torch.zeros(2, width),),
                dynamo=True,
                opset_version=_OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    return program.model_proto
