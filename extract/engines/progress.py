"""Rows that are done, on stderr: of how many, rows/s, tokens/s and the time left."""

from __future__ import annotations

from llmembed.common.progress import Steps


class Progress(Steps):
    """Count rows and tokens, and show them if wanted.

    Args:
        n_rows: rows to do.
        shown: show them.
    """

    def __init__(self, n_rows: int, *, shown: bool) -> None:
        super().__init__(n_rows, "rows", shown=shown)
        self._n_tokens = 0

    def advance(self, n_rows: int, n_tokens: int) -> None:
        """Count a batch that is done."""
        self._n_tokens += n_tokens
        self.count(n_rows, f"{self._n_tokens / self.elapsed_s:,.0f} tokens/s")
