"""Room for features: memory while they fit, a scratch file that the system maps where they do not.

What trains on mapped features is the same code, with the same result bit for bit. The price is the
disk's speed once the rows in use exceed the memory.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import torch
from torch import Tensor

from llmembed.common.errors import CacheSpaceError, LLMEmbedWarning
from llmembed.common.scratch import scratch_array, scratch_folder

GB = 1e9
_SHARE = 0.5  # of the machine's memory, where the user names no limit


def default_limit() -> float:
    """Half of the machine's memory, in bytes."""
    if hasattr(os, "sysconf"):
        return _SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import psutil  # Windows

    return _SHARE * float(psutil.virtual_memory().total)


def make_room(n_rows: int, width: int, memory_gb: float | None) -> tuple[Tensor, bool]:
    """Give float32 `[N, F]`, not filled yet, and whether it lies in a file.

    Args:
        n_rows: N.
        width: F.
        memory_gb: most memory for it; None is half of the machine's, beyond which it warns.

    Raises:
        CacheSpaceError: it fits neither into that memory nor on the disk.
    """
    size = n_rows * width * np.dtype(np.float32).itemsize
    limit = default_limit() if memory_gb is None else memory_gb * GB
    if size <= limit:
        return torch.from_numpy(np.empty((n_rows, width), dtype=np.float32)), False
    if memory_gb is None:
        warnings.warn(
            f"{size / GB:.1f} GB of features are more than half of the memory, so they lie in a "
            f"file in {scratch_folder()}, which is slower. Choose fewer --layers, or set "
            "--memory-gb.",
            LLMEmbedWarning,
            stacklevel=2,
        )
    room = scratch_array(
        (n_rows, width),
        np.float32,
        "the features that exceed the memory limit",
        remedy=", raise --memory-gb, or choose fewer --layers",
        error=CacheSpaceError,
    )
    return torch.from_numpy(room), True
