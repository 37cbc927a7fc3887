"""How far the work is, on stderr: a bar on a terminal, a plain line now and then in a log.

A log keeps every character, so a bar, which draws over itself, becomes one endless line there.
What is mostly done in a second, a phase, is told only where it takes longer.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Self, TextIO

INTERVAL_S = 30.0  # between two lines of a log at least, but for the first and the last
_PATIENCE_S = 1.0  # before a terminal shows a phase

_are_shown: ContextVar[bool] = ContextVar("phases", default=False)


@contextlib.contextmanager
def showing_phases(*, shown: bool = True) -> Iterator[None]:
    """Let `phase` show how far it is meanwhile; by default it does not."""
    before = _are_shown.set(shown)
    try:
        yield
    finally:
        _are_shown.reset(before)


def phase(name: str, total: int, unit: str, **where: Any) -> Steps:
    """Count the steps of a phase: a bar that comes after a second and goes, in a log long ones."""
    return Steps(total, unit, name=name, shown=_are_shown.get(), is_phase=True, **where)


class Steps:
    """Count what is done of a known number of steps, and show it on a stream, by default stderr.

    `unit` is what a step is, in the plural, and `name` what the steps belong to, if anything. The
    environment's TQDM_DISABLE, set to anything, forbids to show it. `is_phase` leaves out
    what a log is told at the beginning, and at the end where nothing was told before.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        name: str = "",
        shown: bool = True,
        is_phase: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._unit, self._name, self._clock = total, unit, name, clock
        self._stream = sys.stderr if stream is None else stream
        self._is_phase, self._is_told = is_phase, not is_phase
        self._shown = shown and not os.environ.get("TQDM_DISABLE")
        self._done, self._note = 0, ""
        self._bar: Any = None

    def start(self, done: int = 0) -> None:
        """Begin the time, with so many steps done before it."""
        self._done = self._before = done
        self._started = self._shown_at = self._clock()
        if self._shown and self._stream.isatty():
            from tqdm import tqdm

            where: dict[str, Any] = {"initial": done, "total": self._total, "file": self._stream}
            unit = f" {self._unit}"
            if self._is_phase:
                where |= {"delay": _PATIENCE_S, "leave": False}
            self._bar = tqdm(desc=self._name or None, unit=unit, mininterval=0.5, **where)
        elif not self._is_phase:
            self._show("")

    def count(self, n: int, note: str = "") -> None:
        """Count steps that are done, and keep a word about them to be shown."""
        self._done, self._note = self._done + n, note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif self._clock() - self._shown_at >= INTERVAL_S:
            self._shown_at, self._is_told = self._clock(), True
            left_s = (self._total - self._done) / max(self._rate(), 1e-9)
            self._show(f", {_duration(left_s)} left{self._speed()}")

    def close(self) -> None:
        """Show the last state."""
        if self._bar is not None:
            self._bar.close()
        elif self._is_told:
            self._show(f" in {_duration(self.elapsed_s)}{self._speed()}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, more than 0."""
        return max(self._clock() - self._started, 1e-9)

    def _rate(self) -> float:
        return (self._done - self._before) / self.elapsed_s

    def _speed(self) -> str:
        note = f", {self._note}" if self._note else ""
        return f", {self._rate():,.1f} {self._unit}/s{note}"

    def _show(self, more: str) -> None:
        if self._shown:
            name = f"{self._name}: " if self._name else ""
            state = f"{self._done:,} of {self._total:,} {self._unit}"
            self._stream.write(f"{name}{state}{more}\n")
            self._stream.flush()


def _duration(seconds: float) -> str:
    """Write seconds as hours, minutes and seconds.

    >>> _duration(3725.4), _duration(59.6)
    ('1:02:05', '0:01:00')
    """
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
