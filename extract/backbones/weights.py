"""Content hashes of model files, remembered so that a large model is read for it only once.

A hash is remembered under the file's path, size and modification time in nanoseconds, in the user's
cache folder: the folder of a shared model may not be writable.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import xxhash

from llmembed.common.errors import ModelError
from llmembed.common.regular import open_regular
from llmembed.extract.backbones.models import user_cache_folder

_READ_BYTES = 1 << 22
_LOGGER = logging.getLogger(__name__)


def hash_files(paths: Sequence[Path]) -> str:
    """Hash files by name and content.

    Args:
        paths: files in a fixed order.

    Returns:
        xxh3-128 over the names and the xxh3-128 of each content, as 32 hexadecimal digits.
    """
    total = xxhash.xxh3_128()
    for path in paths:
        total.update(f"{path.name}\0{_remembered_hash(path)}\0".encode())
    return total.hexdigest()


def _remembered_hash(path: Path) -> str:
    real = path.resolve()
    state = real.stat()
    identity = [str(real), state.st_size, state.st_mtime_ns]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    note = user_cache_folder() / "hashes" / f"{key}.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["file"] == identity:
            return str(known["xxh3_128"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not remembered yet, or unreadable: computed anew below
    digest = _hash(real)
    _remember(note, json.dumps({"file": identity, "xxh3_128": digest}))
    return digest


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open_regular(path, ModelError) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _remember(note: Path, text: str) -> None:
    """Write a note, if that can be: without it the file is read again the next time."""
    temporary = None
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(note)
    except OSError as error:
        _LOGGER.info("the hash of the weights is not remembered in %s: %s", note.parent, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
