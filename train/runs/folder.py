"""A run's folder: what a fit leaves behind, and all that a prediction needs.

    config.json          options, cache fingerprint, sources and their recipes, labels, versions
    model.safetensors    standardisation, fusion and head
    metrics.json         the figures
    held_out.safetensors what it said of training rows that it had not seen, for its doubts
    domain.safetensors   what tells how far a text lies from those of the training
    predictions.parquet  row, label, predicted, a probability a class, of the evaluation rows;
                         their texts where `--store-texts` asks for it
    report.html          one page for people
    logs/                losses by epoch, where the fit is by gradient
    model.onnx           the classifier as an ONNX graph, where `--export onnx` asks for it

It is written beside its place and put there whole (`llmembed.common.replace`), so that no
half-written run can be met and no fault loses an earlier one. A run of the same fusion at the same
place is replaced, one of another fusion with `--overwrite`; anything else there is refused. Loading
trusts nothing: no pickle is ever read, the record is checked
(`llmembed.train.runs.record`), and weights are compared in name and shape before any memory is
taken for them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from llmembed.common.errors import (
    ConfigError,
    LLMEmbedWarning,
    RunFormatError,
    RunStorageError,
)
from llmembed.common.regular import require_regular
from llmembed.common.replace import check_outside, check_place, placing, recover, standing
from llmembed.train.config import FitConfig
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.runs.held_out import (
    DOMAIN_FILE,
    HELD_OUT_FILE,
    as_bytes,
    domain_as_bytes,
    most_bytes,
    most_domain_bytes,
    read_domain,
    read_held_out,
)
from llmembed.train.runs.predictions import (
    PREDICTIONS_FILE,
    Predictions,
    write_predictions,
)
from llmembed.train.runs.record import (
    CONFIG_FILE,
    FORMAT,
    METRICS_FILE,
    MODEL_FILE,
    as_json,
    check_config,
    malformed,
    no_run,
    read_json,
)
from llmembed.train.runs.run import Run

_PICKLED = ("*.pt", "*.pth", "*.ckpt", "*.bin", "*.pkl", "*.joblib")
_TRIES = 10
_DECIDING = ("cache", "source", "layers", "pooling", "fusion", "head", "preset", "seed")
_log = logging.getLogger(__name__)
_HEADER_BYTES = 4 << 20  # of a safetensors file, at most


def check_replaceable(config: FitConfig) -> None:
    """Refuse a place that can't hold a run, or holds something that a fit may not replace.

    What killed fits left beside it is finished first: an earlier run comes back to its place.

    Raises:
        RunFormatError: it is a file, or a folder with other things in it.
        ConfigError: it is a run of another fusion, and `overwrite` is not given.
        RunStorageError: no folder can be made there.
    """
    path = config.run_path
    check_place(path)
    check_outside(path)
    recover(path)
    if not path.exists() or _is_empty(path):
        return
    try:
        record = read_json(path / CONFIG_FILE) if os.path.lexists(path / CONFIG_FILE) else {}
    except RunFormatError as error:
        raise RunFormatError(
            f"{path / CONFIG_FILE} cannot be read, and so {path} is not replaced. Remove it, or "
            "pass another --output."
        ) from error
    if "llmembed_run" not in record:
        raise RunFormatError(
            f"{path} exists and is not a run, so it is not replaced. Pass another --output."
        )
    there, new = _kind(record), _kind({"llmembed_run": FORMAT, "fit": dataclasses.asdict(config)})
    if there != new and not config.overwrite:
        raise ConfigError(
            f"{path} holds a run of {there}, and this is one of {new}, so it is not replaced. Pass "
            "--overwrite to replace it, or another --output."
        )


def _is_empty(path: Path) -> bool:
    try:
        return path.is_dir() and not any(path.iterdir())
    except OSError as error:
        raise RunStorageError(
            f"{path} cannot be read: {error.strerror or error}, and so it is not replaced. Check "
            "its permissions and the disk, or pass another --output."
        ) from error


def _kind(record: Mapping[str, Any]) -> str:
    fit = record.get("fit")
    options: Mapping[str, Any] = fit if isinstance(fit, dict) else {}
    known = "" if record["llmembed_run"] == FORMAT else f" in format {record['llmembed_run']!r:.40}"
    if options.get("preset", "none") != "none":
        return f"preset {options['preset']!r:.40}{known}"
    return f"fusion {options.get('fusion')!r:.40}{known}"


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
    earlier = _options_of(run.path)
    with placing(run.path) as folder:
        (folder / CONFIG_FILE).write_bytes(as_json(run.config))
        (folder / METRICS_FILE).write_bytes(as_json(run.metrics))
        weights = run.classifier.state_dict()
        content = save({name: weight.contiguous() for name, weight in weights.items()})
        (folder / MODEL_FILE).write_bytes(content)  # save_file would make it the owner's alone
        if run.held_out is not None:
            (folder / HELD_OUT_FILE).write_bytes(as_bytes(run.held_out))
        if run.domain is not None:
            (folder / DOMAIN_FILE).write_bytes(domain_as_bytes(run.domain))
        write_predictions(folder / PREDICTIONS_FILE, predictions, run.labels)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if logs.is_dir():
            logs.rename(folder / logs.name)
    ours = _options_of(run.path)
    told = [f"{name} {value!r:.60}" for name, value in earlier.items() if value != ours.get(name)]
    if told:
        _log.info("%s replaced a run with %s.", run.path, ", ".join(told))


def _options_of(path: Path) -> dict[str, Any]:
    """Give the options of the run at a place that decide what it is; none where there is none."""
    with suppress(RunFormatError, KeyError, TypeError):
        fit = read_json(path / CONFIG_FILE)["fit"]
        return {name: fit[name] for name in _DECIDING}
    return {}


def load_run(path: str | os.PathLike[str]) -> Run:
    """Open a run; one that a fit replaces meanwhile is the earlier or the later one, whole.

    Args:
        path: its folder; where there is none, `user/name` or `user/name@revision` of a run on the
            Hugging Face Hub, of which what is needed is downloaded once.

    Raises:
        RunNotFoundError: there is no such folder, nor such a run on the Hub.
        RunFormatError: a file is missing or is not what it should be.
    """
    place = Path(path)
    if isinstance(path, str) and _identity(standing(place)) is None:
        from llmembed.train.runs.sharing import MAX_DOCUMENT_BYTES, fetch, is_hub_name

        if is_hub_name(path):
            folder = fetch(
                path,
                {
                    CONFIG_FILE: lambda _: MAX_DOCUMENT_BYTES,
                    METRICS_FILE: lambda _: MAX_DOCUMENT_BYTES,
                    MODEL_FILE: _most_weight_bytes,
                    DOMAIN_FILE: lambda folder: most_domain_bytes(read_json(folder / CONFIG_FILE)),
                    HELD_OUT_FILE: lambda folder: most_bytes(read_json(folder / METRICS_FILE)),
                },
            )
            return _load(folder, folder)
    for _ in range(_TRIES):
        folder = standing(place)
        identity = _identity(folder)
        if identity is None:
            break
        try:
            run = _load(folder, place)
        except RunFormatError:
            if _identity(folder) == identity:
                raise
        else:
            if _identity(folder) == identity:
                return run
    raise no_run(place)


def _identity(folder: Path) -> tuple[int, ...] | None:
    """Tell a folder from another one that takes its place; None where there is none."""
    try:
        found = folder.stat()
    except (OSError, ValueError):
        return None
    is_folder = stat.S_ISDIR(found.st_mode)
    return (found.st_dev, found.st_ino, found.st_mtime_ns) if is_folder else None


def _described(folder: Path) -> tuple[dict[str, Any], Classifier]:
    """Read the record, and make the classifier that it describes, without memory for weights."""
    config = read_json(folder / CONFIG_FILE)
    architecture = check_config(config, folder / CONFIG_FILE)
    try:
        with torch.device("meta"):  # names and shapes only: nothing is allocated yet
            return config, Classifier(architecture)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise malformed(folder / CONFIG_FILE, repr(error)) from error


def _most_weight_bytes(folder: Path) -> int:
    weights: Iterable[torch.Tensor] = _described(folder)[1].state_dict().values()
    return _HEADER_BYTES + sum(weight.numel() * weight.element_size() for weight in weights)


def _load(folder: Path, place: Path) -> Run:
    config, classifier = _described(folder)
    metrics = read_json(folder / METRICS_FILE)
    classifier.load_state_dict(_load_weights(folder, classifier.state_dict()), assign=True)
    if folder != place:
        warnings.warn(
            f"a fit was killed while it replaced {place}: this is the earlier run, which lies in "
            f"{folder}. The next fit to that place puts it back.",
            LLMEmbedWarning,
            stacklevel=3,
        )
    return Run(
        path=place,
        config=config,
        metrics=metrics,
        classifier=classifier.eval(),
        held_out=read_held_out(folder, len(config["labels"])),
        domain=read_domain(folder, sum(classifier.architecture.widths)),
    )


def _load_weights(folder: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read weights whose names, shapes and types are the expected ones."""
    path = folder / MODEL_FILE
    wanted = {name: tuple(weight.shape) for name, weight in expected.items()}
    try:
        require_regular(path, RunFormatError)
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # it is no mapping
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            if found != wanted:
                differing = min(wanted.items() ^ found.items())[0]
                raise RunFormatError(
                    f"{path}: {differing} has shape {found.get(differing)}, and {CONFIG_FILE} asks "
                    f"for {wanted.get(differing)}. The two files are not of one run; fit again."
                )
            # Copied, for what stays mapped would change or fail with the file.
            weights = {name: file.get_tensor(name).clone() for name in expected}
    except FileNotFoundError as error:
        pickled = sorted(found.name for glob in _PICKLED for found in folder.glob(glob))
        reason = "the file is missing"
        if pickled:
            reason = f"{pickled[0]} may be a pickle, which can run code and is never read"
        message = f"{path} does not exist: {reason}. Fit again with llmembed-fit."
        raise RunFormatError(message) from error
    except (SafetensorError, OSError) as error:
        raise malformed(path, str(error)) from error
    for name, weight in weights.items():
        if weight.dtype != expected[name].dtype:
            raise malformed(path, f"{name} is of type {weight.dtype}")
    return weights
