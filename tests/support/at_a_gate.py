"""Run a command in a process of its own, which waits at a gate until it is let go or killed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Gated:
    """A process that comes to a gate, once or several times.

    Attributes:
        pid: of the process.
        said: file of what it writes to stderr.
    """

    pid: int
    said: Path
    _coming: int
    _going: int
    _code: int | None = None

    def wait_at_gate(self) -> None:
        """Wait until it stands there."""
        assert os.read(self._coming, 1) == b"x", self.said.read_text()

    def tell(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def let_go(self) -> None:
        """Open the gate once."""
        os.write(self._going, b"x")

    def end(self) -> int:
        """Wait for its end; the exit code, or the negative signal that ended it."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


@contextlib.contextmanager
def at_a_gate(act: Callable[[Callable[[], None]], object], said: Path) -> Iterator[Gated]:
    """Fork a process that does something, given a function that waits at the gate."""
    coming, here = os.pipe()
    gate, going = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which wait for work
        pid = os.fork()
    if pid == 0:
        os.close(going)
        _be_the_child(act, said, lambda: (os.write(here, b"x"), os.read(gate, 1), None)[-1])
    os.close(here)
    os.close(gate)
    found = Gated(pid, said, coming, going)
    try:
        yield found
    finally:
        if found._code is None:
            os.kill(pid, signal.SIGKILL)
            found.end()
        os.close(coming)
        os.close(going)


def _be_the_child(
    act: Callable[[Callable[[], None]], object], said: Path, wait: Callable[[], None]
) -> None:
    code = 0
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a time limit of the parent's is its own
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job ignores it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a cluster of Ray in the parent has its own
        sys.stderr = said.open("w")
        act(wait)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - the exit code tells
        code = 99
    sys.stderr.flush()
    os._exit(code)
