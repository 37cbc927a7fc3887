"""The simulator and what it is driven by, so that neither the tables nor their sources can rot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import harness
import pytest
from speed.scaling import LAYERS, requests
from studies.simulate import (
    MEASURED,
    Assumed,
    Measured,
    run,
    table_of_runs,
    table_of_whole,
    whole,
)

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.fixture
def measured() -> Measured:
    """What the benchmarks last found."""
    return Measured.read(MEASURED)


def test_a_block_costs_the_requests_that_its_design_says() -> None:
    """A worker puts each layer, n_tokens and the record; closing reads them all again."""
    few, more = requests(4), requests(6)
    puts = (more["work"]["PUT"] - few["work"]["PUT"]) / 2
    gets = (more["finalize"]["GET"] - few["finalize"]["GET"]) / 2
    assert puts == len(LAYERS) + 2
    assert len(LAYERS) + 2 <= gets <= len(LAYERS) + 3


def test_without_chance_the_time_is_that_of_arithmetic(measured: Measured) -> None:
    """Equal texts on equal GPUs that never fail: a start, then the blocks one after another."""
    equal = Assumed(
        n_texts=1024 * 100,
        token_spread=0.0,
        noise=0.0,
        slow_share=0.0,
        hours_between_failures=1e12,
        network_bytes_per_s=1e15,
    )
    plain = dataclasses.replace(measured, engine_s_a_unit=0.0)
    found = run(equal, plain, 4)
    assert found["wall_s"] == pytest.approx(found["start_s"] + 25 * equal.block_s)
    assert (found["n_units"], found["n_lost"], found["waited_s"]) == (100, 0, pytest.approx(0.0))


def test_lost_units_are_done_again(measured: Measured) -> None:
    """Where GPUs fail often, there are rounds until nothing is left, and the time grows."""
    sure, frail = (
        run(Assumed(n_texts=10**6, hours_between_failures=hours), measured, 8)
        for hours in (1e12, 0.5)
    )
    assert (sure["n_lost"], sure["n_rounds"]) == (0, 1)
    assert frail["n_lost"] > 0
    assert frail["n_rounds"] > 1
    assert frail["wall_s"] > sure["wall_s"]


def test_the_tables_of_the_docs_are_those_of_the_simulator(measured: Measured) -> None:
    """docs/scaling.md shows what the committed results and assumptions give."""
    document = json.loads((harness.RESULTS / "studies" / "simulate.json").read_text())
    assumed = Assumed(**document["assumed"])
    runs = [run(assumed, measured, one["n_gpus"]) for one in document["runs"]]
    for found, committed in zip(runs, document["runs"], strict=True):
        assert found == pytest.approx(committed, rel=1e-12)  # sums differ in the last bit
    lines = [*table_of_whole(whole(assumed, measured)), *table_of_runs(runs)]
    shown = DOCS.read_text().splitlines()
    assert [line for line in lines if line not in shown] == []
