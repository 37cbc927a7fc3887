"""The modules of the product, to read what they hold."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = [
    path
    for folder in ("cache_format", "extract", "train")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
