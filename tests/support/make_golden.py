"""Write golden caches: FOLDER, named as a format version. Run once for each version."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from toy_cache import write_toy
from toy_rows import write_rows

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


def make_golden_1_1(folder: Path) -> None:
    """Write caches with several labels a text, weights and groups."""
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    write_rows(folder / "complete")
    write_rows(folder / "grown", 80)
    write_rows(folder / "grown")
    convert(folder / "complete", folder / "complete.h5")
    convert(folder / "complete", folder / "archive", archive=True)


if __name__ == "__main__":
    make = {"format_1": make_golden, "format_1_1": make_golden_1_1}
    make[Path(sys.argv[1]).name](Path(sys.argv[1]))
