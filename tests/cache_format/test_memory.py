"""Memory of activations is kept between batches and returned after a block."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, torch
from llmembed.common.process import keep_freed_memory

class Statistics(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd".split()]
    _fields_ += [("rest", ctypes.c_size_t * 5)]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Statistics
{before}
mapped = libc.mallinfo2().hblks
tensor = torch.ones(2**22)
print(libc.mallinfo2().hblks - mapped)
"""

HOLES = """
import os, torch
from llmembed.common.process import keep_freed_memory, return_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

keep_freed_memory()
before = resident()
pairs = [(torch.ones(2**20), torch.ones(16)) for _ in range(16)]  # 4 MiB, then 64 bytes
stay = [small for _, small in pairs]
del pairs
kept = resident() - before
return_freed_memory()
print(kept, resident() - before)
"""


def run(program: str) -> str:
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def n_new_mappings(before: str) -> int:
    """How many mappings of its own glibc makes for a tensor of 16 MiB, which end with it."""
    return int(run(PROGRAM.format(before=before)))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's behaviour")
def test_a_large_tensor_lies_in_memory_that_is_kept() -> None:
    """By itself glibc maps it anew."""
    assert n_new_mappings("") == 1
    assert n_new_mappings("keep_freed_memory()") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's behaviour")
def test_holes_are_returned() -> None:
    """64 MiB between small tensors that stay are kept at first, then given back."""
    kept, left = map(int, run(HOLES).split())
    assert kept > 48 << 20
    assert left < 16 << 20
