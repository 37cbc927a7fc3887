"""Write the toy cache in a process that kills itself at its n-th file-system operation.

Run as a script: PATH N_ROWS LAYERS KILL_AT LOG. Each computed block is noted in LOG.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import toy_cache

from llmembed.cache_format import CacheWriter


def kill_at(operation: int) -> None:
    """Let the process die in the middle of its n-th write, rename, link or unlink."""
    numbers = itertools.count(1)

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(numbers) == operation:
                if function is write:
                    write(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    write = os.write
    os.write = guarded(os.write)
    for name in ("replace", "hardlink_to"):
        setattr(Path, name, guarded(getattr(Path, name)))


def main() -> None:
    """Extract the toy data set, noting each block before it is written."""
    path, n_rows, layers, operation, log = sys.argv[1:]
    original = CacheWriter.write

    def noted(self: CacheWriter, plan: Any, block: Any, **arrays: Any) -> None:
        with Path(log).open("a") as file:
            file.write(f"{block.start}\n")
        original(self, plan, block, **arrays)

    CacheWriter.write = noted  # type: ignore[method-assign]
    kill_at(int(operation))
    chosen = [int(layer) for layer in layers.split(",")]
    toy_cache.write_toy(path, int(n_rows), layers=chosen)


if __name__ == "__main__":
    main()
