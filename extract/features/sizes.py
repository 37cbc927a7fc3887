"""How much a device is given at a time, and when compiling pays.

Sizes alone decide, never a clock: processes that share a run on cards of one kind decide alike, and
so does a run that is resumed.
"""

from __future__ import annotations

_LEAST, _USUAL, _MOST = 2**10, 2**14, 2**16
"""Tokens of a pass on a GPU: in the least memory, of a large model, of a small one."""
_A_PASS = 2**42
"""Multiply-adds of a pass that takes a GPU long enough for the next to be launched meanwhile."""
_COMPILING_S = 60.0
_SAVED = 0.2
"""Share of a pass that compiled blocks save."""
_MULTIPLY_ADDS = 1e14
"""A second, of a large GPU."""
_QUICKEST_TOKEN_S = 1e-6
"""Time of a token of a model so small that starting kernels is most of its work."""
_LAUNCHING_S = 3e-4
"""Time that Python takes to launch a block: of blocks of width 16 on a CPU, 0.26 to 0.32 ms."""
_WORTH = 0.05
"""Share of a pass that its launching may take."""
_MOST_TRIES = 3


def tokens_that_fit(
    free_bytes: int, *, n_parameters: int, hidden_size: int, inner_size: int, itemsize: int
) -> int:
    """Choose how many tokens a GPU computes in one pass: a power of two.

    At its highest, a block holds eight states of H for a token and three of its inner size (of the
    MLP), while pooling holds five of H in float32; they may take half of what is free.

    Args:
        free_bytes: memory that is free beside the weights.
        n_parameters: of all blocks; each meets each token.
        hidden_size: H.
        inner_size: width of what stands between the products of a block's MLP.
        itemsize: bytes of a value of the blocks.

    >>> llama7b = dict(n_parameters=6_500_000_000, hidden_size=4096, inner_size=11008, itemsize=2)
    >>> [tokens_that_fit(n << 30, **llama7b) for n in (0, 2, 6, 60)]
    [1024, 4096, 8192, 16384]
    >>> minilm = dict(n_parameters=10_600_000, hidden_size=384, inner_size=1536, itemsize=2)
    >>> tokens_that_fit(60 << 30, **minilm)
    65536
    """
    a_token = (8 * hidden_size + 3 * inner_size) * itemsize + 5 * 4 * hidden_size
    wanted = min(_MOST, max(_USUAL, _A_PASS // n_parameters))
    fitting = max(_LEAST, min(wanted, free_bytes // 2 // a_token))
    return 1 << (fitting.bit_length() - 1)


def compiling_pays(n_tokens: float, n_parameters: int) -> bool:
    """Tell whether compiled blocks save more of a run than compiling them takes.

    >>> [compiling_pays(n * 1e6, n_parameters=6_500_000_000) for n in (2, 20)]
    [False, True]
    """
    seconds = n_tokens * max(n_parameters / _MULTIPLY_ADDS, _QUICKEST_TOKEN_S)
    return _SAVED * seconds > _COMPILING_S


def recording_pays(n_tokens: int, *, n_parameters: int, n_blocks: int) -> bool:
    """Tell whether launching a pass of so many tokens takes a share of it that is worth saving.

    >>> recording_pays(16_384, n_parameters=6_500_000_000, n_blocks=32)  # LLaMA2-7B
    False
    >>> recording_pays(16_384, n_parameters=302_000_000, n_blocks=24)  # BERT-large
    True
    """
    seconds = n_tokens * n_parameters / _MULTIPLY_ADDS
    return n_blocks * _LAUNCHING_S > _WORTH * seconds


class TokenBudget:
    """Tokens a batch: halved where memory runs out, and doubled back where it did no more.

    After a third block in which memory ran out it stays as it is, so that no run fails on and on.
    Halved, it is always the same part of the first, for which blocks may be compiled.
    """

    def __init__(self, most: int) -> None:
        self._most, self._n_halved, self._n_tries, self._ran_out = most, 0, 0, False

    @property
    def now(self) -> int:
        """Tokens a batch."""
        return self._most >> self._n_halved

    def shrink(self, n_tokens: int) -> None:
        """Go on with half of what did not fit, or less."""
        while self.now > max(1, n_tokens // 2):
            self._n_halved += 1
        self._ran_out = True

    def end_block(self) -> None:
        """Take twice as much for the next texts, unless memory ran out for these."""
        self._n_tries += self._ran_out
        if self._n_halved and not self._ran_out and self._n_tries < _MOST_TRIES:
            self._n_halved -= 1
        self._ran_out = False
