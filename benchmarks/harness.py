"""What all benchmarks share: the command line, the clock, turns, bars, and the JSON at the end.

A benchmark is a module with a `main`, started by `python benchmarks NAME`. It prints a table; its
last line of stdout is one JSON document, which is also kept in `results/ROOM/NAME.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmembed.common.errors import LLMEmbedError

HERE = Path(__file__).parent
RESULTS = HERE / "results"
T = TypeVar("T")


def command_line(doc: str | None, output: str | None = None) -> argparse.ArgumentParser:
    """Make a parser with --output; without a default a document is only printed."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = None if output is None else RESULTS / output
    parser.add_argument("--output", type=Path, default=default, help="file for the JSON document")
    return parser


def known_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Let a command end with 1 and one sentence where an error is a known one."""

    @functools.wraps(main)
    def wrapped(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except LLMEmbedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return wrapped


def read(path: Path | None) -> Any:
    """Read a document; an empty one where there is no file."""
    if path is None or not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def write(document: Any, path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def finish(document: Any, path: Path | None) -> None:
    """Write the document, and print it as the last line."""
    write(document, path)
    print(json.dumps(document))


def load() -> dict[str, Any]:
    """Say how busy the machine is, which every figure depends on."""
    return {"load_average": os.getloadavg()[0], "n_cpus": os.cpu_count()}


def row(*cells: object) -> str:
    """Lay out a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Run once; wall seconds and the result, after a GPU in use has done all that it was given."""
    wait_for_gpu()
    started = time.perf_counter()
    result = work()
    wait_for_gpu()
    return time.perf_counter() - started, result


def cpu_seconds(work: Callable[[], T]) -> tuple[float, T]:
    """Run once; CPU seconds of this process and the result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def wait_for_gpu() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def median_s(work: Callable[[], T], rounds: int) -> tuple[float, T]:
    """Run some times; the median of the seconds, and the last result."""
    runs = [timed(work) for _ in range(rounds)]
    return statistics.median(seconds for seconds, _ in runs), runs[-1][1]


def by_turns(
    ways: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: bool = False
) -> dict[str, list[float]]:
    """Run all in turn, round after round, so that other work hits all alike: seconds of each.

    A way that returns a float has measured by itself.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + warm_up):
        for name, way in ways.items():
            seconds, result = timed(way)
            taken[name].append(result if isinstance(result, float) else seconds)
    return {name: seconds[warm_up:] for name, seconds in taken.items()}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over the rounds of how many times more the first took than the second."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=False))


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a figure must reach."""

    limit: float
    is_least: bool = False

    def line(self, name: str, figure: float) -> str:
        """Lay out a figure beside its bar."""
        holds = figure >= self.limit if self.is_least else figure <= self.limit
        bound = f"at {'least' if self.is_least else 'most'} {self.limit:g}"
        return f"{name:<48} {figure:10.4g}   {bound:<14} {'holds' if holds else 'NOT MET'}"


def least(limit: float) -> Bar:
    return Bar(limit=limit, is_least=True)


def most(limit: float) -> Bar:
    return Bar(limit=limit)


def memory() -> dict[str, int]:
    """Read bytes of this process from /proc/self/status: VmRSS, VmHWM, RssAnon, ..."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}
