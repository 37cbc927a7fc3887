"""The commands on features and runs, one module each: results on stdout, the rest on stderr."""

from __future__ import annotations

import os


def let_waiting_threads_sleep() -> None:
    """Set OpenMP's policy before torch reads it, unless the user has.

    Threads that spin while they wait made a step thirty times slower as soon as another process
    wanted one of two cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
