from __future__ import annotations

import io
import os
import pty
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from llmembed.common import progress
from llmembed.common.console import Command, common_options
from llmembed.common.progress import INTERVAL_S, Steps, phase, showing_phases


class Time:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


@pytest.fixture
def terminal() -> Iterator[tuple[io.TextIOWrapper, int]]:
    """A stream to a terminal, and the descriptor where what it shows is read."""
    shown, written = pty.openpty()
    with os.fdopen(written, "w", encoding="utf-8") as stream:
        yield stream, shown
    os.close(shown)


def read_up_to(end: str, shown: int) -> str:
    """Give what a terminal shows, its last characters being these; a terminal hands on pieces."""
    drawn = b""
    while not drawn.endswith(end.encode()):
        drawn += os.read(shown, 10_000)
    return drawn.decode()


def lines_of(n_steps: int, seconds: float) -> list[str]:
    """Give the lines of a log where each of n steps takes so many seconds."""
    time, log = Time(), io.StringIO()
    with Steps(n_steps, "rows", stream=log, clock=time) as steps:
        for _ in range(n_steps):
            time.now += seconds
            steps.count(1, "1,877 tokens/s")
    assert log.getvalue().endswith("\n")
    assert "\r" not in log.getvalue()
    return log.getvalue().splitlines()


def test_a_log_has_a_first_and_a_last_line() -> None:
    """Work of less than half a minute takes two lines, with the pace in the second."""
    assert lines_of(40, 0.5) == [
        "0 of 40 rows",
        "40 of 40 rows in 0:00:20, 2.0 rows/s, 1,877 tokens/s",
    ]


def test_a_log_has_a_line_every_half_minute() -> None:
    """Between the first and the last line, each stands 30 s behind the one before."""
    first, *between, last = lines_of(1000, 0.25)
    assert between[0] == "120 of 1,000 rows, 0:03:40 left, 4.0 rows/s, 1,877 tokens/s"
    assert [int(line.split()[0]) for line in between] == [120 * k for k in range(1, 9)]
    assert (first.split()[0], last.split()[0]) == ("0", "1,000")
    assert INTERVAL_S == 30


def test_slow_steps_are_each_told() -> None:
    """A step that takes longer than half a minute has its own line."""
    assert len(lines_of(5, 60)) == 7


def test_what_was_done_before_does_not_count_as_speed() -> None:
    """Work that goes on from a checkpoint is as fast as what it does itself."""
    time, log = Time(), io.StringIO()
    steps = Steps(100, "epochs", name="seed 3", stream=log, clock=time)
    steps.start(60)
    time.now += 30
    steps.count(10)
    assert log.getvalue().splitlines() == [
        "seed 3: 60 of 100 epochs",
        "seed 3: 70 of 100 epochs, 0:01:30 left, 0.3 epochs/s",
    ]


def test_a_terminal_has_a_bar(terminal: tuple[io.TextIOWrapper, int]) -> None:
    """A terminal gets a bar that draws over itself, with the last state at the end."""
    stream, shown = terminal
    with Steps(40, "rows", name="seed 0", stream=stream) as steps:
        steps.count(40, "1,877 tokens/s")
    drawn = read_up_to("\n", shown)
    assert drawn.count("\r") > 1
    assert "seed 0: 100%|" in drawn
    assert "40/40" in drawn
    assert "1,877 tokens/s" in drawn


def lines_of_phase(n_steps: int, seconds: float, *, shown: bool = True) -> list[str]:
    """Give the lines of a log where each step of a phase takes so many seconds."""
    time, log = Time(), io.StringIO()
    with (
        showing_phases(shown=shown),
        phase("reading", n_steps, "rows", stream=log, clock=time) as one,
    ):
        for _ in range(n_steps):
            time.now += seconds
            one.count(1)
    assert "\r" not in log.getvalue()
    return log.getvalue().splitlines()


def test_a_log_tells_of_long_phases_alone() -> None:
    """A phase within half a minute has no line; a longer one its lines, the last one too."""
    assert lines_of_phase(29, 1) == []
    assert lines_of_phase(45, 1) == [
        "reading: 30 of 45 rows, 0:00:15 left, 1.0 rows/s",
        "reading: 45 of 45 rows in 0:00:45, 1.0 rows/s",
    ]


def test_phases_are_shown_where_it_is_asked_for() -> None:
    """Python code gets them from no function that it calls, a command without --quiet does."""
    assert lines_of_phase(45, 1, shown=False) == []
    told: list[bool] = []
    command = Command("one", callback=lambda **_: told.append(phase("x", 1, "rows")._shown))
    common_options(command)
    for options in ([], ["--quiet"]):
        CliRunner().invoke(command, options)
    assert told == [True, False]
    assert not phase("x", 1, "rows")._shown


@pytest.mark.parametrize("waits", [True, False])
def test_a_terminal_shows_a_phase_after_a_second(
    waits: bool, terminal: tuple[io.TextIOWrapper, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short one leaves no trace; the bar of a long one is wiped out when it ends."""
    stream, shown = terminal
    monkeypatch.setattr(progress, "_PATIENCE_S", 3600 if waits else 0)
    with showing_phases(), phase("reading", 40, "rows", stream=stream) as one:
        for _ in range(40):
            one.count(1)
    stream.write("end")
    stream.flush()
    drawn = read_up_to("end", shown)
    assert (drawn == "end") == waits
    if not waits:
        assert "reading: " in drawn
        assert drawn.split("\r")[-1] == "end"
        assert drawn.split("\r")[-2].strip() == ""


@pytest.mark.parametrize("setting", ["hidden", "TQDM_DISABLE"])
def test_progress_can_be_switched_off(
    setting: str, terminal: tuple[io.TextIOWrapper, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a terminal nor a log gets a character, by the caller or by TQDM_DISABLE."""
    if setting == "TQDM_DISABLE":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    stream, shown = terminal
    log = io.StringIO()
    for where in (stream, log):
        with Steps(40, "rows", shown=setting != "hidden", stream=where) as steps:
            steps.count(40)
    stream.write("nothing before this")
    stream.flush()
    assert read_up_to("this", shown) == "nothing before this"
    assert log.getvalue() == ""
