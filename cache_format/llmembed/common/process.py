"""Processes: whether one has ended, how this one holds its memory, and how it multiplies float32.

A process is known by its host, its id and when it started, for ids are used again. Of another host
nothing is known, so what it made is taken for the work of a living process.

glibc maps every block above 128 KiB to 32 MiB anew and unmaps it when freed, so each activation of
a batch costs page faults again: 8 % of the time of SmolLM2 on a CPU, with batches of 1,024 tokens,
and as many gradients of 4 MiB a tenth of a training step and more. So it is kept between batches.
Batches of many shapes leave holes between what stays, 80 MB within 25,000 short texts, so it is
returned after each block of rows, which takes 7 ms.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmembed.common.errors import ConfigError

UNKNOWN = "unknown"  # start time, where the system does not tell
_PROC = Path("/proc")
_DEAD = "ZX"  # states of a process that has ended and that its parent did not ask about yet
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_KEPT = 32 * 2**20  # bytes; glibc takes no more
_TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
_full_float32 = threading.Lock()
_n_full, _before_full = 0, ("", "", "")
_OUT_OF_MEMORY = (
    "out of memory",
    "OutOfMemoryError",
    "_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: ",
)


def started(pid: int) -> str | None:
    """Tell one process from a later one with the same id; None if there is no such process."""
    if (_PROC / "self/stat").exists():
        try:
            stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8")
        except OSError:
            return UNKNOWN if _is_hidden(pid) else None
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in _DEAD else fields[19]
    try:
        import psutil
    except ImportError:
        return UNKNOWN
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return UNKNOWN


def has_ended(pid: int, start: str) -> bool:
    """Tell whether a process of this host, known by id and start, has ended."""
    now = started(pid)
    return now is None or (UNKNOWN not in (now, start) and now != start)


@functools.lru_cache(maxsize=1)
def owner(pid: int) -> str:
    """Name a process of this machine within the name of a file; `is_gone` reads it.

    >>> is_gone(owner(os.getpid()))
    False
    """
    return f"{pid}_{started(pid)}_{_machine()}"


def is_gone(name: str) -> bool:
    """Tell whether the owner of that name ran on this machine and has ended."""
    pid, _, rest = name.partition("_")
    start, _, machine = rest.partition("_")
    return machine == _machine() and pid.isdecimal() and has_ended(int(pid), start)


def _is_hidden(pid: int) -> bool:
    """Tell whether a process exists that /proc does not show (mounted with hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


@functools.cache
def _machine() -> str:
    """Name what gives ids to processes: the host, or a container on it."""
    try:
        space = (_PROC / "self/ns/pid").readlink()
    except OSError:
        space = Path()
    return hashlib.blake2s(f"{platform.node()}\0{space}".encode(), digest_size=4).hexdigest()


def keep_freed_memory() -> None:
    """Let freed memory be reused, unless the user set glibc's variables; only glibc is told."""
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if not chosen:
        _glibc("mallopt", _MMAP_THRESHOLD, _LARGEST_KEPT)
        _glibc("mallopt", _TRIM_THRESHOLD, 2**30)
        _glibc("mallopt", _ARENA_MAX, 1)  # threads reuse what other threads have freed


def return_freed_memory() -> None:
    """Give every page without a living block back to the system."""
    _glibc("malloc_trim", 0)


def peak_memory_bytes() -> int | None:
    """Tell the most memory that this process ever held; None on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Let torch multiply float32 as float32 meanwhile, in all threads, whatever was set before.

    TF32 on a GPU keeps 10 of 23 bits of each factor, and bfloat16, which oneDNN takes on a CPU by
    `torch.set_float32_matmul_precision("medium")`, 7. Entered by several threads or twice by one,
    it lasts until the last leaves; then what was set before is set again.

    Raises:
        ConfigError: CUDA is in use, and NVIDIA_TF32_OVERRIDE asks for TF32, which no program can
            take back.
    """
    import torch

    cuda: Any = torch.cuda
    override = os.environ.get(_TF32_OVERRIDE) or "0"
    if override != "0" and cuda.is_initialized():
        raise ConfigError(
            f"{_TF32_OVERRIDE} is {override!r} in the environment, and makes every float32 product "
            "on a GPU one of TF32, with 10 bits of 23; 0 is allowed. Unset it."
        )
    global _n_full, _before_full  # noqa: PLW0603 - what torch is told is of the process, too
    backends: Any = torch.backends
    gpu, cpu = backends.cuda.matmul, backends.mkldnn.matmul
    with _full_float32:
        if not _n_full:
            _before_full = (_whole_precision(), gpu.fp32_precision, cpu.fp32_precision)
            torch.set_float32_matmul_precision("highest")
        _n_full += 1
    try:
        yield
    finally:
        with _full_float32:
            _n_full -= 1
            if not _n_full:
                whole, gpu_before, cpu_before = _before_full
                torch.set_float32_matmul_precision(whole)
                gpu.fp32_precision, cpu.fp32_precision = gpu_before, cpu_before


def _whole_precision() -> str:
    """Read what torch was told for all devices; it refuses where each was told something else."""
    import torch

    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell errors of torch's allocators, of a GPU's libraries and of its driver from all others.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    True
    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    True
    """
    return any(text in repr(error) for text in _OUT_OF_MEMORY)


@contextlib.contextmanager
def memory_told(remedy: str) -> Iterator[None]:
    """Say in one sentence that memory ran out, and what to do.

    Raises:
        ConfigError: memory ran out, here or on a device.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        where = "this machine" if "CPUAllocator" in str(error) else "the device"
        asked = re.search(r"ried to allocate (\S+ \w+)", str(error))
        size = f" (it was asked for {asked[1]})" if asked else ""
        message = f"the memory of {where} does not suffice{size}. {remedy}"
        raise ConfigError(message) from error


def _glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        try:
            import ctypes

            call = getattr(ctypes.CDLL(None), function)
        except (ImportError, OSError, TypeError, AttributeError):
            return
        call(*arguments)
