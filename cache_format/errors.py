"""The errors of llmembed by the name that callers of the cache know them by."""

from llmembed.common.errors import *  # noqa: F403
