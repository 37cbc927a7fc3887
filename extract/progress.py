"""One progress bar on stderr: rows, rows/s, tokens/s and the time left."""

from __future__ import annotations

import time
from typing import Any, Self


class Progress:
    """Count rows and tokens, and draw them if wanted.

    Args:
        n_rows: rows to do.
        shown: draw the bar.
    """

    def __init__(self, n_rows: int, *, shown: bool) -> None:
        self._n_rows = n_rows
        self._shown = shown
        self._n_tokens = 0

    def __enter__(self) -> Self:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=self._n_rows, unit=" rows", disable=not self._shown, mininterval=0.5
        )
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, n_rows: int, n_tokens: int) -> None:
        """Count a batch that is done."""
        self._n_tokens += n_tokens
        rate = self._n_tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(n_rows)
