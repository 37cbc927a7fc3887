"""A run's classifier as one ONNX graph, for services that have neither torch nor this package.

Standardisation, fusion, head and temperature are in the graph: features go in as they lie in a
cache, side by side in the order of the run's config.json, and probabilities come out. The model's
metadata names features and classes. The backbone is not part of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmembed.common.errors import MissingPackageError
from llmembed.train.fusions.classifier import Classifier

INPUT, OUTPUT = "features", "probabilities"
_OPSET = 18


class _Probabilities(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, features: Tensor) -> Tensor:
        probabilities: Tensor = self.classifier(features).softmax(dim=1)
        return probabilities


def check_can_export() -> None:
    """Refuse where a package is missing, before anything is trained.

    Raises:
        MissingPackageError: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError.of(package, "onnx", "--export onnx")


def onnx_of(classifier: Classifier, record: Mapping[str, Any]) -> bytes:
    """Give the ONNX model of a run: float32 `[N, F]` features in, `[N, C]` probabilities out.

    Args:
        classifier: the run's classifier.
        record: content of the run's config.json.

    Raises:
        MissingPackageError: onnx or onnxscript is not installed.
    """
    check_can_export()
    width = sum(classifier.architecture.widths)
    model = to_onnx(_Probabilities(classifier).eval(), width)
    for key in ("labels", "features"):
        model.metadata_props.add(key=key, value=json.dumps(record[key]))
    content: bytes = model.SerializeToString()
    return content


def to_onnx(module: nn.Module, width: int) -> Any:
    """Trace a module that takes float32 `[N, F]` into an ONNX model, whatever N is."""
    with _silence(), torch.inference_mode():
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
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's advice to its developers off the user's screen."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
