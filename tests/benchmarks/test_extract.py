"""The extraction benchmark at toy size, so that it cannot rot."""

from __future__ import annotations

from pathlib import Path

import pytest
from speed import extract
from toy_model import save_toy_model, toy_texts

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:max-length 2048")
def test_all_ways_are_timed_and_give_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speeds are positive, and float32 features agree with each baseline to 1e-5."""
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))
    folder = save_toy_model(tmp_path / "toy")
    result = extract.measure(str(folder), 2, toy_texts(40), n_texts=30, n_baseline=20, rounds=2)
    assert min(result["tokens_per_s"].values()) > 0
    errors = result["relative_error"]
    assert errors["float32"] < 1e-5
    assert errors["float32, sentence-transformers' layer"] < 1e-5
    assert 0 < result["padding_share"] < 1
    extract.print_table(result)
