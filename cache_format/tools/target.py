"""Where a whole cache is written to: an empty place, or one where writing the same was interrupted.

The root document comes last, so that what has none is no cache yet.
"""

from __future__ import annotations

from collections.abc import Callable

from llmembed.cache_format.layout.documents import DOCUMENT
from llmembed.cache_format.stores import Store
from llmembed.common.errors import CacheFormatError


def check_target(store: Store, belongs: Callable[[str], bool]) -> set[str]:
    """Give the keys that are there, all of which belong to what is to be written.

    Raises:
        CacheFormatError: there is a whole cache, or something else.
    """
    there = set(store.walk())
    if DOCUMENT in there or not all(map(belongs, there)):
        raise CacheFormatError(
            f"{store.location} exists. It is left as it is; choose another target, or remove it."
        )
    return there
