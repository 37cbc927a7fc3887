"""A run's folder: what a fit leaves behind, and all that a prediction needs.

    config.json          options, cache fingerprint, sources and their recipes, labels, versions
    model.safetensors    standardisation, fusion and head
    metrics.json         the figures
    predictions.parquet  row, label, predicted and a probability a class, of the evaluation rows
    report.html          one page for people
    logs/                losses by epoch, where the fit is by gradient
    model.onnx           the classifier as an ONNX graph, where `--export onnx` asks for it

It is written beside its place and renamed, so that no half-written run can be met. A run of ours
at the same place is replaced; anything else there is refused. Loading trusts nothing: no pickle is
ever read, and weights are compared in name and shape before any memory is taken for them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmembed.cache_format.errors import RunFormatError, RunNotFoundError
from llmembed.train.classifier import Architecture, Classifier, Trained
from llmembed.train.config import FitConfig
from llmembed.train.metrics import Floats
from llmembed.train.report import report_page
from llmembed.train.select import Feature

if TYPE_CHECKING:
    from llmembed.train.data import FitData

FORMAT = 1
CONFIG_FILE, MODEL_FILE, METRICS_FILE = "config.json", "model.safetensors", "metrics.json"
PREDICTIONS_FILE, ONNX_FILE = "predictions.parquet", "model.onnx"
REPORT_FILE = "report.html"
_PICKLED = ("*.pt", "*.pth", "*.ckpt", "*.bin", "*.pkl", "*.joblib")
_PACKAGES = ("llmembed-cache", "torch", "lightning", "numpy", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a run says about the evaluation rows."""

    rows: npt.NDArray[np.int64]
    """int64 `[n]`, row in the evaluation split."""
    labels: npt.NDArray[np.int64]
    """int64 `[n]`, index of the true class."""
    log_proba: Floats
    """float64 `[n, C]`, log-probability of each class."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained classifier with its record."""

    path: Path
    """Folder of the run."""
    config: Mapping[str, Any]
    """Content of config.json."""
    metrics: Mapping[str, Any]
    """Content of metrics.json."""
    classifier: Classifier
    """The classifier, on the CPU."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the C classes."""
        return tuple(self.config["labels"])

    @property
    def features(self) -> tuple[Feature, ...]:
        """Features the classifier takes, side by side."""
        return tuple(Feature(**feature) for feature in self.config["features"])

    def predict(
        self, texts: Sequence[str], device: str = "auto", *, trust_remote_code: bool = False
    ) -> list[str]:
        """Name the class of each text; raises what `predict_proba` raises."""
        proba = self.predict_proba(texts, device, trust_remote_code=trust_remote_code)
        return [self.labels[index] for index in proba.argmax(axis=1)]

    def predict_proba(
        self, texts: Sequence[str], device: str = "auto", *, trust_remote_code: bool = False
    ) -> Floats:
        """Give float64 `[N, C]`, the probability of each class for each text.

        Raises:
            ConfigError: a backbone brings code of its own and `trust_remote_code` is not given.
            ModelError: a backbone is missing, or is not the one the run was trained with.
        """
        from llmembed.train.predict import predict_proba

        return predict_proba(self, texts, device, trust_remote_code=trust_remote_code)

    def to_onnx(self) -> bytes:
        """Give the classifier as an ONNX model, features in, probabilities out.

        Raises:
            MissingPackageError: onnx or onnxscript is not installed.
        """
        from llmembed.train.export import onnx_of

        return onnx_of(self.classifier, self.config)


def record_config(config: FitConfig, data: FitData, trained: Trained) -> dict[str, Any]:
    """Gather what config.json holds: enough to predict, and to fit again."""
    sources = dict.fromkeys(feature.source for feature in data.features)
    return {
        "llmembed_run": FORMAT,
        "fit": dataclasses.asdict(config),
        "cache": {"fingerprint": data.fingerprint},
        "sources": {
            name: {
                "recipe": dict(data.sources[name].recipe),
                "fingerprint": dict(data.sources[name].fingerprint),
            }
            for name in sources
        },
        "features": [feature._asdict() for feature in data.features],
        "labels": list(data.labels),
        "architecture": dataclasses.asdict(trained.classifier.architecture),
        "seed": trained.seed,
        "device": trained.device,
        "versions": {package: version(package) for package in _PACKAGES},
    }


def check_replaceable(path: Path) -> None:
    """Refuse a place that holds something other than a run.

    Raises:
        RunFormatError: it is a file, or a folder with other things in it.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir() or "llmembed_run" not in _read_json(path, CONFIG_FILE, missing_ok=True):
        raise RunFormatError(
            f"{path} exists and is not a run, so it is not replaced. Pass another --output."
        )


def write_run(
    run: Run, predictions: Predictions, files: Mapping[str, bytes], *, logs: Path
) -> None:
    """Write a run beside its place, then put it there, in place of an earlier run.

    Args:
        run: what to write.
        predictions: of its evaluation rows.
        files: further files of its folder, by name.
        logs: folder of logs to move into it, if there is one.
    """
    path = run.path
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write_json(folder / CONFIG_FILE, run.config)
        _write_json(folder / METRICS_FILE, run.metrics)
        weights = run.classifier.state_dict()
        save_file({name: w.contiguous() for name, w in weights.items()}, folder / MODEL_FILE)
        report = report_page(run.config, run.metrics)
        (folder / REPORT_FILE).write_text(report, encoding="utf-8")
        _write_predictions(folder / PREDICTIONS_FILE, predictions, run.labels)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if logs.is_dir():
            logs.rename(folder / logs.name)
        folder.chmod(0o777 & ~_umask())
        _swap_in(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_run(path: str | os.PathLike[str]) -> Run:
    """Open a run.

    Raises:
        RunNotFoundError: there is no such folder.
        RunFormatError: a file is missing or is not what it should be.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RunNotFoundError(
            f"{folder} is not a folder, so there is no run. Pass the folder that llmembed-fit "
            "printed, such as runs/r8-cooc-0."
        )
    config = _read_json(folder, CONFIG_FILE)
    if config.get("llmembed_run") != FORMAT:
        raise RunFormatError(
            f"{folder / CONFIG_FILE} has run format {config.get('llmembed_run')!r}; this version "
            f"reads format {FORMAT}. Fit again, or install the version that wrote it."
        )
    metrics = _read_json(folder, METRICS_FILE)
    classifier = _load_classifier(folder, _architecture(folder, config))
    return Run(path=folder, config=config, metrics=metrics, classifier=classifier)


def _architecture(folder: Path, config: Mapping[str, Any]) -> Architecture:
    try:
        stored = dict(config["architecture"])
        stored["widths"] = tuple(int(width) for width in stored["widths"])
        architecture = Architecture(**stored)
        features = [Feature(**feature) for feature in config["features"]]
        widths = tuple(feature.hidden_size for feature in features)
        complete = all(feature.source in config["sources"] for feature in features)
        consistent = widths == architecture.widths and complete
        consistent = consistent and len(config["labels"]) == architecture.n_classes
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFormatError(_malformed(folder / CONFIG_FILE, repr(error))) from error
    if not consistent:
        raise RunFormatError(
            _malformed(folder / CONFIG_FILE, "features, labels and architecture disagree")
        )
    return architecture


def _load_classifier(folder: Path, architecture: Architecture) -> Classifier:
    weights = _load_weights(folder)
    try:
        with torch.device("meta"):  # names and shapes only: nothing is allocated yet
            classifier = Classifier(architecture)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunFormatError(_malformed(folder / CONFIG_FILE, repr(error))) from error
    expected = {name: tuple(weight.shape) for name, weight in classifier.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if expected != found:
        differing = min(expected.items() ^ found.items())[0]
        raise RunFormatError(
            f"{folder / MODEL_FILE}: {differing} has shape {found.get(differing)}, and "
            f"{CONFIG_FILE} asks for {expected.get(differing)}. The two files are not of one run; "
            "fit again."
        )
    classifier.load_state_dict(weights, assign=True)
    return classifier.eval()


def _load_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / MODEL_FILE
    if not path.is_file():
        pickled = sorted(found.name for glob in _PICKLED for found in folder.glob(glob))
        reason = (
            f"{pickled[0]} may be a pickle, which can run code and is never read"
            if pickled
            else "the file is missing"
        )
        raise RunFormatError(f"{path} does not exist: {reason}. Fit again with llmembed-fit.")
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunFormatError(_malformed(path, str(error))) from error
    return weights


def _read_json(folder: Path, name: str, *, missing_ok: bool = False) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        if missing_ok:
            return {}
        raise RunFormatError(f"{path} is missing, so {folder} is not a run. Fit again.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunFormatError(_malformed(path, str(error))) from error
    if not isinstance(document, dict):
        raise RunFormatError(_malformed(path, "it holds no object"))
    return document


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _write_predictions(path: Path, predictions: Predictions, names: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    proba = np.exp(predictions.log_proba)
    labels = np.asarray(names, dtype=object)
    columns: dict[str, Any] = {
        "row": predictions.rows,
        "label": labels[predictions.labels],
        "predicted": labels[proba.argmax(axis=1)],
        **{f"p_{name}": proba[:, index] for index, name in enumerate(names)},
    }
    pq.write_table(pa.table(columns), path)


def _swap_in(folder: Path, path: Path) -> None:
    if not path.exists():
        folder.rename(path)
        return
    replaced = folder.with_name(f"{folder.name}-replaced")
    path.rename(replaced)
    folder.rename(path)
    shutil.rmtree(replaced)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _malformed(path: Path, cause: str) -> str:
    return f"{path} is damaged or was not written by llmembed-fit: {cause}. Fit again."
