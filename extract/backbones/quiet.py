"""Transformers and bitsandbytes without bars and reports of what is done on purpose."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the loader's bars, its report of layers left out, and int8's word at each product."""
    loader: Any = transformers.logging
    verbosity, bars = loader.get_verbosity(), loader.is_progress_bar_enabled()
    products = logging.getLogger("bitsandbytes.autograd._functions")
    level = products.level
    loader.set_verbosity_error()
    loader.disable_progress_bar()
    products.setLevel(logging.ERROR)
    try:
        yield
    finally:
        products.setLevel(level)
        loader.set_verbosity(verbosity)
        if bars:
            loader.enable_progress_bar()
