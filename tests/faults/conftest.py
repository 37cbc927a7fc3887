"""Which line of `fault_lines` a test states, how often it tried, and the table of all of them.

    pytest tests/faults [-k ...] --reliability docs/reliability.md

What became of each test is kept in build/reliability.json too, so that a campaign can be run in
parts: the page is of all that is known.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fault_lines import GROUPS
from findings import FINDINGS
from s3_stand_in import s3_endpoint  # noqa: F401 - a fixture of all
from toy_extraction import llama, own_home, settings, whole  # noqa: F401 - fixtures of all
from toy_fixtures import same_date, toy_path  # noqa: F401 - fixtures of all

TRIES = "tries"
LINE = "line"


@dataclass
class Tally:
    """What became of the tests of one line."""

    tries: int = 0
    seconds: float = 0.0
    outcomes: set[str] = field(default_factory=set)

    def add(self, test: dict[str, Any]) -> None:
        self.tries += test["tries"] if test["outcome"] == "passed" else 0
        self.seconds += test["seconds"]
        self.outcomes.add(test["outcome"])

    @property
    def outcome(self) -> str:
        if "failed" in self.outcomes:
            return "**not as expected**"
        if "passed" in self.outcomes:
            return "as expected"
        return "; ".join(sorted(self.outcomes)) or "no test"


class Table:
    """Gathers the reports of a session, and writes the page of this one and those before."""

    def __init__(self, path: Path, known: Path) -> None:
        self._path, self._known = path, known
        self._running: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        of = dict(report.user_properties)
        if LINE not in of:
            return
        fresh = {"lines": of[LINE], "tries": 1, "outcome": "passed", "seconds": 0.0}
        test = self._running.setdefault(report.nodeid, fresh)
        test["seconds"] += report.duration
        test["tries"] = of.get(TRIES, 1)
        if report.outcome != "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            test["outcome"] = reason if report.outcome == "skipped" else report.outcome
        if report.when == "teardown":
            tests = self._all() | {report.nodeid: self._running.pop(report.nodeid)}
            self._known.parent.mkdir(exist_ok=True)
            self._known.write_text(json.dumps(tests, indent=1), encoding="utf-8")

    def _all(self) -> dict[str, Any]:
        return json.loads(self._known.read_bytes()) if self._known.exists() else {}

    def pytest_sessionfinish(self) -> None:
        tallies: defaultdict[str, Tally] = defaultdict(Tally)
        tests = self._all().values()
        for test in tests:
            for line in test["lines"].split():
                tallies[line].add(test)
        total = sum(test["tries"] for test in tests if test["outcome"] == "passed")
        made = (
            f"{dt.datetime.now(dt.UTC):%Y-%m-%d} by {os.cpu_count()} cores of {_cpu()}, "
            f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
        )
        text = [
            "# Reliability",
            "",
            f"What was broken on purpose, {total:,} times, and what followed.",
            f"`make campaign` made this page on {made}.",
        ]
        for group, lines in GROUPS.items():
            text += ["", f"## {group}", "", "| | fault | what must follow | tries | outcome | s |"]
            text += ["|---|---|---|--:|---|--:|"]
            text += [
                f"| {line} | {fault} | {after} "
                f"| {tally.tries:,} | {tally.outcome} | {tally.seconds:.1f} |"
                for line, (fault, after) in lines.items()
                for tally in [tallies[line]]
            ]
        text += _findings()
        self._path.write_text("\n".join([*text, ""]), encoding="utf-8")


def _findings() -> list[str]:
    return [
        "",
        "## Findings",
        "",
        "What the campaign found, each mended, and the test that failed before. `make test-lowest`",
        "found floors of dependencies that were too low, and a client of the Hub that tells of",
        "missing folders in another way.",
        "",
        *(f"- {wrong}: `{test}`" for test, wrong in FINDINGS.items()),
    ]


def _cpu() -> str:
    about = Path("/proc/cpuinfo")
    if about.is_file():
        for line in about.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.machine()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reliability", type=Path, help="File that the table of all faults is written to."
    )
    parser.addoption(
        "--long",
        type=float,
        default=20.0,
        help="Seconds that the long run takes. [default: %(default)s]",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("reliability", None)) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(path, config.rootpath / "build/reliability.json"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            item.user_properties.append((LINE, " ".join(mark.args)))


@pytest.fixture
def tries(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Say how many faults, kills or inputs one test tried; without it a test is one try."""
    return lambda number: record_property(TRIES, number)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one, for thousands of small files."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own there
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)
