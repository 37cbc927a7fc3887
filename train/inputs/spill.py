"""Room for features: memory while they fit, a file that the system maps where they do not.

A mapped tensor is a tensor: what trains on it is the same code, with the same result bit for bit,
and the system moves rows between disk and memory. The price is the disk's speed once the rows in
use exceed the memory. The file lies in $TMPDIR, else in /var/tmp, which unlike /tmp is a disk; it
has no name, or is deleted by the system (Windows), so that nothing is left of it whatever happens.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmembed.common.errors import CacheSpaceError, LLMEmbedWarning

GB = 1e9
_SHARE = 0.5  # of the machine's memory, where the user names no limit
_DISK = Path("/var/tmp")  # noqa: S108 - a file without a name, made with O_EXCL


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
    folder = Path(os.environ.get("TMPDIR") or (_DISK if _DISK.is_dir() else tempfile.gettempdir()))
    if memory_gb is None:
        warnings.warn(
            f"{size / GB:.1f} GB of features are more than half of the memory, so they lie in a "
            f"file in {folder}, which is slower. Choose fewer --layers, or set --memory-gb.",
            LLMEmbedWarning,
            stacklevel=2,
        )
    return _map_file(folder, size).reshape(n_rows, width), True


def _map_file(folder: Path, size: int) -> Tensor:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise CacheSpaceError(
            f"{size / GB:.1f} GB of features exceed the memory limit, and {folder} has "
            f"{free / GB:.1f} GB free for them. Set TMPDIR to a disk with room, raise --memory-gb, "
            "or choose fewer --layers."
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a SIGBUS later
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float32)
