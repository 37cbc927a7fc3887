"""What a run keeps to doubt by: numbers of each held-out row, and what tells how far texts lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from llmembed.common.errors import ConfigError, RunFormatError
from llmembed.common.regular import open_regular
from llmembed.train.inputs import Feature
from llmembed.train.linear.domain import MAX_ROWS, WIDTH, Domain
from llmembed.train.measures import HeldOutRows
from llmembed.train.runs.record import malformed

HELD_OUT_FILE, DOMAIN_FILE = "held_out.safetensors", "domain.safetensors"
_HEADER_BYTES = 1 << 20
_ROW_BYTES = 16
_TYPES = {"label": np.int32, "right": np.bool_, "top": np.float32, "true": np.float32}


def as_bytes(held_out: HeldOutRows) -> bytes:
    """Write it as a safetensors file, an array a field."""
    return save({name: getattr(held_out, name) for name in _TYPES})


def most_bytes(metrics: Mapping[str, Any]) -> int:
    """Give the most bytes that the file of a run of these metrics has; 0 where it has none."""
    try:
        return int(metrics["abstain"]["n_held_out"]) * _ROW_BYTES + _HEADER_BYTES
    except (KeyError, TypeError, ValueError):
        return 0


def read_held_out(folder: Path, n_classes: int) -> HeldOutRows | None:
    """Read it from a run's folder; None where the run has none.

    Raises:
        RunFormatError: the file is not what it should be.
    """
    path = folder / HELD_OUT_FILE
    try:
        with open_regular(path, RunFormatError) as file:
            found = load(file.read())
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise malformed(path, str(error)) from error
    kinds = {name: (array.dtype, array.shape) for name, array in found.items()}
    n = len(found["label"]) if kinds.get("label", (None, ()))[1] else 0
    if kinds != {name: (np.dtype(kind), (n,)) for name, kind in _TYPES.items()} or not n:
        raise malformed(path, f"its arrays are {kinds}")
    held_out = HeldOutRows(**found)
    of_class = held_out.label
    shares = np.stack([held_out.top, held_out.true])
    if (
        not ((of_class >= 0) & (of_class < n_classes)).all()
        or not ((shares >= 0) & (shares <= 1)).all()
    ):
        raise malformed(path, "a label or a probability lies outside of its range")
    return held_out


def domain_as_bytes(domain: Domain) -> bytes:
    """Write it as a safetensors file, an array a field."""
    # safetensors writes memory as it lies, whatever the strides say.
    return save({name: np.ascontiguousarray(one.numpy()) for name, one in vars(domain).items()})


def most_domain_bytes(config: Mapping[str, Any]) -> int:
    """Give the most bytes that the file of a run with this record has; 0 where it has none."""
    if not config.get("domain"):
        return 0
    width = sum(Feature(**feature).hidden_size for feature in config["features"])
    n = WIDTH * (width + 2 * WIDTH + len(config["labels"]) + 1) + MAX_ROWS
    return 4 * n + _HEADER_BYTES


def read_domain(folder: Path, width: int) -> Domain | None:
    """Read it from a run's folder, for features of this width; None where the run has none.

    Raises:
        RunFormatError: the file is not what it should be.
    """
    path = folder / DOMAIN_FILE
    try:
        with open_regular(path, RunFormatError) as file:
            found = load(file.read())
        domain = Domain(**{name: torch.from_numpy(array) for name, array in found.items()})
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise malformed(path, str(error)) from error
    k = min(width, WIDTH)
    shapes = {
        "projection": (0 if width == k else width, k),
        "within": (k, k),
        "overall": (k, k),
        "means": (*domain.means.shape[:1], k),
        "centre": (k,),
        "distances": (domain.distances.numel(),),
    }
    for name, one in vars(domain).items():
        if one.dtype != torch.float32 or tuple(one.shape) != shapes[name]:
            raise malformed(path, f"{name} has the shape {tuple(one.shape)}, type {one.dtype}")
        if not one.isfinite().all() or (name in {"means", "distances"} and not one.numel()):
            raise malformed(path, f"{name} is empty, or holds something else than finite numbers")
    return domain


def way_to_more(metrics: Mapping[str, Any]) -> str:
    """Say, of a run with these metrics, what holds more rows out."""
    try:
        is_share = int(metrics["splits"]["validation"]["n"]) > 0
    except (KeyError, TypeError, ValueError):
        is_share = False
    auto = ", or with --fusion auto, which holds every training row out" if is_share else ""
    return f"fit on more rows{auto}"


def require_held_out(held_out: HeldOutRows | None, path: Path, option: str) -> HeldOutRows:
    """Refuse a run that can say nothing of its doubts.

    Raises:
        ConfigError: it keeps no held-out rows.
    """
    if held_out is None:
        raise ConfigError(
            f"the run {path} keeps no held-out rows, which {option} needs: it is of an earlier "
            "version, or had too few rows to hold any out. Fit again, with more rows if it is new."
        )
    return held_out
