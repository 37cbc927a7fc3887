"""Memory of activations is kept between batches."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, torch
from llmembed.extract.memory import keep_freed_memory

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


def n_new_mappings(before: str) -> int:
    """How many mappings of its own glibc makes for a tensor of 16 MiB, which end with it."""
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key}
    command = [sys.executable, "-P", "-c", PROGRAM.format(before=before)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's behaviour")
def test_a_large_tensor_lies_in_memory_that_is_kept() -> None:
    """By itself glibc maps it anew."""
    assert n_new_mappings("") == 1
    assert n_new_mappings("keep_freed_memory()") == 0
