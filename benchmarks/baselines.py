"""What a suite came to when its figures were last accepted: one JSON file, kept in git.

It holds which rows each case had right, not only how many, so that a later run is compared row by
row. With one seed that is a bit a row, with several a byte: how many of them had it right.
"""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from compare import Ints
from measure import Outcome

from llmembed.common.errors import DataError

FOLDER = Path(__file__).parent / "baselines"
PACKAGES = ("torch", "lightning", "numpy", "llmembed-cache")


def write_baseline(path: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Accept the figures of a run."""
    document = {
        "machine": {"processor": processor(), "python": platform.python_version()},
        "versions": {package: version(package) for package in PACKAGES},
        "cases": {name: _record(outcome) for name, outcome in outcomes.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_baseline(path: Path) -> dict[str, Outcome]:
    """Read accepted figures; none where there is no file yet.

    Raises:
        DataError: the file is not a baseline.
    """
    if not path.is_file():
        return {}
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        return {name: _outcome(case) for name, case in cases.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a baseline: {error!r}. Write it with --update.") from error


def processor() -> str:
    """Name this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def pack(correct: Ints) -> str:
    """Pack counts below 256, a byte each, or a bit each where they are 0 and 1.

    >>> pack(np.array([1, 0, 1])), unpack(pack(np.array([1, 0, 1])), 3).tolist()
    ('1:oA==', [1, 0, 1])
    >>> unpack(pack(np.array([2, 0, 1])), 3).tolist()
    [2, 0, 1]
    """
    is_bits = correct.max(initial=0) <= 1
    counts = correct.astype(np.uint8)
    packed = np.packbits(counts) if is_bits else counts
    return f"{1 if is_bits else 8}:{base64.b64encode(packed.tobytes()).decode()}"


def unpack(text: str, n: int) -> Ints:
    """Undo `pack`, for n rows."""
    width, _, encoded = text.partition(":")
    packed = np.frombuffer(base64.b64decode(encoded, validate=True), dtype=np.uint8)
    counts = np.unpackbits(packed, count=n) if width == "1" else packed
    if len(counts) != n:
        raise ValueError(f"{len(counts)} rows instead of {n}")
    return counts.astype(np.int64)


def _record(outcome: Outcome) -> dict[str, Any]:
    return {
        "fingerprint": outcome.fingerprint,
        "seeds": list(outcome.seeds),
        "n": len(outcome.correct),
        "accuracy": round(outcome.accuracy, 6),
        "correct": pack(outcome.correct),
        "seconds": round(outcome.seconds, 3),
        "yardsticks": round(outcome.yardsticks, 3),
        "n_parameters": outcome.n_parameters,
    }


def _outcome(case: Mapping[str, Any]) -> Outcome:
    return Outcome(
        fingerprint=str(case["fingerprint"]),
        seeds=tuple(case["seeds"]),
        correct=unpack(case["correct"], case["n"]),
        seconds=float(case["seconds"]),
        yardsticks=float(case["yardsticks"]),
        n_parameters=int(case["n_parameters"]),
    )
