"""Documents of caches by the thousand, damaged at random: a cache, or one sentence of ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fuzzing import fuzz

campaign = (pytest.mark.slow, pytest.mark.timeout(3600))


@pytest.mark.fault("Z1")
@pytest.mark.parametrize("n", [4_000, pytest.param(1_000_000, marks=campaign)])
def test_a_damaged_header_is_refused_in_a_sentence(n: int, tries: Callable[[int], None]) -> None:
    """Root, group, array, record and index: damaged bytes and hostile values never surprise."""
    counts = fuzz("fuzzed_headers", "headers", n)
    assert min(counts.values()) > n // 10  # what is damaged a little may be taken as it is
    tries(n)


@pytest.mark.fault("Z1")
@pytest.mark.parametrize(
    ("target", "n"),
    [
        ("plain", 80),
        *(pytest.param(target, 20_000, marks=campaign) for target in ("plain", "rows", "archive")),
    ],
)
def test_no_damaged_file_gives_other_features(
    target: str, n: int, tries: Callable[[int], None]
) -> None:
    """One file of a cache on disk is damaged: what is still read is what was written."""
    counts = fuzz("fuzzed_headers", target, n)
    assert counts["refused"] > n // 2
    tries(n)
