"""Write the golden caches of the current format: FOLDER. Run once for each format version."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from toy_cache import write_toy

from llmembed.cache_format.tools import convert

GOLDEN = {"poolings": ["mean"], "layers": [4, 8]}


def make_golden(folder: Path) -> None:
    """Write a complete, a grown and a partial cache, an HDF5 file and an archive."""
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    write_toy(folder / "complete", 100, **GOLDEN)
    write_toy(folder / "grown", 80, **GOLDEN)
    write_toy(folder / "grown", 100, **GOLDEN)
    write_toy(folder / "partial", 100, n_blocks=1, **GOLDEN)
    convert(folder / "complete", folder / "complete.h5")
    convert(folder / "complete", folder / "archive", archive=True)


if __name__ == "__main__":
    make_golden(Path(sys.argv[1]))
