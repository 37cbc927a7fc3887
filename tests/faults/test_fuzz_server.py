"""What a server is sent by the thousand, damaged at random: an answer, or 4xx in a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fuzzing import fuzz

campaign = (pytest.mark.slow, pytest.mark.timeout(3600))


@pytest.mark.fault("Z5")
@pytest.mark.parametrize(
    ("target", "n"),
    [
        ("bodies,requests", 200),
        *(pytest.param(target, 20_000, marks=campaign) for target in ("bodies", "requests")),
    ],
)
def test_a_server_answers_whatever_it_is_sent(
    target: str, n: int, tries: Callable[[int], None]
) -> None:
    """No body and no damaged request makes an error of the server's, or ends it."""
    assert min(fuzz("fuzzed_bodies", target, n).values()) > 0
    tries(n)
