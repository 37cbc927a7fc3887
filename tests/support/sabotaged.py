"""Workers, of Ray and of this machine, that go wrong in a chosen way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmembed.extract.engines import devices, ray_engine

POISON = """
from llmembed.common.errors import RowError
from llmembed.extract.features.extractor import Extractor
launch = Extractor.launch
def poisoned(self, planned, on_batch, describe_row):
    features = launch(self, planned, on_batch, describe_row)
    def refused():
        raise RowError(describe_row(0) + ' is poison.')
    return refused if describe_row(0).endswith('row 128') else features
Extractor.launch = poisoned
"""


def fatal_to_worker(row: int) -> str:
    """Make code that ends every worker that is given the unit which begins with a row."""
    return f"""
import json, os
from llmembed.extract.engines.worker import Worker
receipt = Worker.receipt
def die(self, number, unit):
    if unit is not None and json.loads(unit)["blocks"][0]["start"] == {row}:
        os._exit(1)
    return receipt(self, number, unit)
Worker.receipt = die
"""


@contextmanager
def two_units() -> Iterator[None]:
    """Cut the five blocks of the tests into two units, which one worker has both at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_engine, "_UNITS_A_WORKER", 1)
        patch.setattr(ray_engine, "MOST_BLOCKS", 3)
        yield


@contextmanager
def in_workers(code: str) -> Iterator[None]:
    """Run code in every worker before it begins."""

    class Sabotaged(ray_engine.Worker):
        def __init__(self, job: str) -> None:
            exec(code, {})  # noqa: S102
            super().__init__(job)

    Sabotaged.__module__ = "__main__"  # so that Ray sends it whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_engine, "Worker", Sabotaged)
        yield


@contextmanager
def in_processes(code: str) -> Iterator[None]:
    """Run code in every process of `--devices` before it begins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_PROGRAM", f"{code}\n{devices._PROGRAM}")
        yield


def before_first_record(marker: Path, then: str) -> str:
    """Make code that does something before a record, in the first worker that comes so far."""
    return f"""
import os, pathlib, signal
from llmembed.cache_format.writing import blocks
commit, marker = blocks.commit, pathlib.Path({str(marker)!r})
def first(*arguments):
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return commit(*arguments)
    {then}
blocks.commit = first
"""
