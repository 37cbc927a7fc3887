"""How far the work is, on stderr: a bar on a terminal, a plain line now and then in a log.

A log keeps every character, so a bar, which draws over itself, becomes one endless line there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Self, TextIO

INTERVAL_S = 30.0
"""Least time between two lines of a log, but for the first and the last."""


class Steps:
    """Count what is done of a known number of steps, and show it.

    Args:
        total: number of steps.
        unit: what a step is, in the plural.
        shown: whether to show anything; the environment's TQDM_DISABLE, set to anything, forbids.
        stream: where; None is stderr.
        clock: tells the seconds.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._unit, self._clock = total, unit, clock
        self._stream = sys.stderr if stream is None else stream
        self._shown = shown and not os.environ.get("TQDM_DISABLE")
        self._done, self._note = 0, ""
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._started = self._shown_at = self._clock()
        if self._shown and self._stream.isatty():
            from tqdm import tqdm

            unit = f" {self._unit}"
            self._bar = tqdm(total=self._total, unit=unit, mininterval=0.5, file=self._stream)
        else:
            self._show("")
        return self

    def count(self, n: int, note: str = "") -> None:
        """Count steps that are done, and keep a word about them to be shown."""
        self._done, self._note = self._done + n, note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif self._clock() - self._shown_at >= INTERVAL_S:
            self._shown_at = self._clock()
            left_s = (self._total - self._done) * self.elapsed_s / max(self._done, 1e-9)
            self._show(f", {_duration(left_s)} left{self._speed()}")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._show(f" in {_duration(self.elapsed_s)}{self._speed()}")

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, more than 0."""
        return max(self._clock() - self._started, 1e-9)

    def _speed(self) -> str:
        note = f", {self._note}" if self._note else ""
        return f", {self._done / self.elapsed_s:,.1f} {self._unit}/s{note}"

    def _show(self, more: str) -> None:
        if self._shown:
            self._stream.write(f"{self._done:,} of {self._total:,} {self._unit}{more}\n")
            self._stream.flush()


def _duration(seconds: float) -> str:
    """Write seconds as hours, minutes and seconds.

    >>> _duration(3725.4), _duration(59.6)
    ('1:02:05', '0:01:00')
    """
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
