"""A classifier for servers whose passes wait until they are let go, and that tells what it saw."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llmembed.common.errors import DataError
from llmembed.train.measures import Floats
from llmembed.train.runs.predict import Counted
from llmembed.train.serving.app import Served
from llmembed.train.serving.batcher import Judged
from llmembed.train.serving.config import ServeConfig
from llmembed.train.serving.server import Server

LABELS = ("short", "<img src=x onerror=alert(1)>")


class Gated:
    """A text has a token a word; its second probability, and how far it lies, are 1 / words."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.gate, self.loaded = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []
        self.is_lost = False
        self.loaded.set()
        if is_open:
            self.gate.set()

    def load(self) -> None:
        self.loaded.wait()

    def count(self, texts: Sequence[str]) -> Counted:
        if "no pair" in texts:
            raise DataError("text 0 is not a pair.")
        words = [len(text.split()) for text in texts]
        return Counted(n_tokens=[min(8, n) for n in words], is_cut=[n > 8 for n in words])

    def classify(self, texts: Sequence[str]) -> Judged:
        self.batches.append(list(texts))
        self.gate.wait()
        if self.is_lost or "poison" in texts:
            raise RuntimeError(f"what a library says may hold {texts}")
        proba = expected(texts)
        return proba, proba[:, 1]

    def probe(self) -> None:
        if self.is_lost:
            raise RuntimeError("lost")


def expected(texts: Sequence[str]) -> Floats:
    second = np.array([1 / max(1, len(text.split())) for text in texts])
    return np.stack([1 - second, second], axis=1)


@contextlib.contextmanager
def serving(
    classifier: Gated, *, takes_pairs: bool = False, doubts: Any = lambda *_: {}, **options: int
) -> Iterator[Server]:
    """Serve at a free port from another thread until the end of the block, which raises its end."""
    config = ServeConfig(run="", port=0, **options)
    served = Served(
        name="<toy>", labels=LABELS, takes_pairs=takes_pairs, version="1", doubts=doubts
    )
    ready = threading.Event()
    server = Server(config, served, classifier, lambda _: ready.set())
    with ThreadPoolExecutor(1) as thread:
        ending = thread.submit(server.answer)
        try:
            if classifier.loaded.is_set():
                ready.wait()
            yield server
        finally:
            classifier.loaded.set()
            classifier.gate.set()
            server.should_exit = True
            ending.result()
