"""Joining Ray, without one."""

from __future__ import annotations

import pytest

from llmembed.common.cluster import joined
from llmembed.common.errors import ConfigError


@pytest.mark.ray
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:1", "no Ray answers at --address localhost:1: .*refused"),
        ("head", "--address head is neither auto nor host:port. Start it with `ray start --head`"),
    ],
)
def test_an_address_without_ray_is_refused_at_once(address: str, message: str) -> None:
    """Ray itself waits for minutes where nothing listens."""
    with pytest.raises(ConfigError, match=message), joined(address, 1):
        pass
