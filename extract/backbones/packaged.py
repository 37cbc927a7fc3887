"""Files that an installed PyPI package carries, found without importing the package."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def packaged_file(requirement: str, suffix: str) -> Path | None:
    """Find the file of an installed package whose path ends in `suffix`.

    Args:
        requirement: `name==version`; only the name is looked up.
        suffix: end of the file's path inside the package.

    Returns:
        Its absolute path, or None where the package or the file is missing.
    """
    try:
        files = importlib.metadata.files(requirement.partition("==")[0]) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if str(file).endswith(suffix))
    return next((path for path in found if path.is_file()), None)
