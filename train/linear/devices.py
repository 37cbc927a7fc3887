"""Which device a fit runs on, and what has room there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llmembed.common.errors import ConfigError

_SHARE = 0.8  # of what is free; the rest is for what the work itself takes


def device_of(accelerator: str, devices: str) -> torch.device:
    """Find the device that two options name, as Lightning does, before anything is read.

    Raises:
        ConfigError: this machine has no such device.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return choose_device(accelerator, devices, n_gpus, has_mps=torch.backends.mps.is_available())


def choose_device(accelerator: str, devices: str, n_gpus: int, *, has_mps: bool) -> torch.device:
    """Choose among the devices of a machine: `auto` takes CUDA, then MPS, then the CPU.

    >>> choose_device("auto", "1,", n_gpus=2, has_mps=False)
    device(type='cuda', index=1)

    Raises:
        ConfigError: it has no such device.
    """
    counts = {"cuda": n_gpus, "mps": int(has_mps), "cpu": 1}
    wanted = {"gpu": ("cuda", "mps"), "auto": tuple(counts)}.get(accelerator, (accelerator,))
    kind = next((one for one in wanted if counts[one]), None)
    if kind is None:
        raise ConfigError(
            f"--accelerator {accelerator} needs a GPU, and torch sees no such GPU on this machine. "
            "Pass --accelerator cpu, or auto."
        )
    if not devices.endswith(","):
        return torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    number = int(devices[:-1])
    if kind == "cpu" or number >= counts[kind]:
        gpus = f"{counts[kind]} of {kind}, from 0 on" if kind != "cpu" else "no GPU in use"
        raise ConfigError(
            f"--devices {devices} names the GPU of number {number}, and with --accelerator "
            f"{accelerator} there is {gpus}. Pass --devices 1, or the number of one that is there."
        )
    return torch.device(kind, number)


def free_bytes(device: torch.device) -> float:
    """Count what is free on a GPU, what torch keeps for later included; elsewhere no end."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def has_room(device: torch.device) -> bool:
    """Tell whether half of a GPU's memory is free; elsewhere there always is room."""
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
    return free_bytes(device) >= total / 2


def fits(n_bytes: float, free: float) -> bool:
    """Tell whether so many bytes may be put where so many are free.

    >>> fits(8e9, 10e9), fits(9e9, 10e9)
    (True, False)
    """
    return n_bytes <= _SHARE * free


def solving_bytes(shape: Sequence[int], n_folds: int, n_classes: int) -> int:
    """Bound what solving takes with all features `[N, F]` on the device, in bytes.

    Features and a copy fused of them; a Gram matrix a fold, and what is factorised, as if it were
    of all columns; the held-out scores of thirty classifiers.

    >>> solving_bytes((67_349, 4 * 4096), n_folds=5, n_classes=2) / 1e9
    23.876117424
    """
    n_rows, width = shape
    return 8 * n_rows * width + 4 * (n_folds + 9) * width**2 + 120 * n_rows * n_classes
