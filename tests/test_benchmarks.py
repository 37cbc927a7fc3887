"""The extraction benchmark at toy size, so that it cannot rot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from toy_model import save_toy_model, toy_texts

pytestmark = pytest.mark.slow

PATH = Path(__file__).parents[1] / "benchmarks" / "bench_extract.py"


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_extract", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:max-length 2048")
def test_all_ways_are_timed_and_give_the_same_answers(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speeds are positive, and float32 features agree with each baseline to 1e-5."""
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))
    folder = save_toy_model(tmp_path / "toy")
    result = bench.measure(str(folder), 2, toy_texts(40), n_texts=30, n_baseline=20, rounds=2)
    assert min(result["tokens_per_s"].values()) > 0
    errors = result["relative_error"]
    assert errors["float32"] < 1e-5
    assert errors["float32, sentence-transformers' layer"] < 1e-5
    assert 0 < result["padding_share"] < 1
    bench.print_table(result)
