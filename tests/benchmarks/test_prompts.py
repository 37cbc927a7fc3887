"""What prompts cost, at toy size, so that it cannot rot."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from speed import prompts
from toy_model import save_toy_model, toy_texts

pytestmark = pytest.mark.slow


def test_prompts_cost_their_tokens_and_change_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All ways are timed, one pass gives what a pass for each gives, and the last line is JSON."""
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(prompts, "_SPLITS", {"r8": "train", "sst2": "train"})
    model = save_toy_model(tmp_path / "toy", max_position_embeddings=4096)
    for name in ("r8", "sst2"):
        (tmp_path / name).mkdir()
        table = pa.table({"text": toy_texts(40), "label": ["a", "b"] * 20})
        pq.write_table(table, tmp_path / name / "train.parquet")
    what = ["--layers=1,3", "--prompts=w1 w2", "--n-tokens=200", "--rounds=1"]
    output = tmp_path / "found.json"
    prompts.main([f"--data={tmp_path}", f"--model={model}", f"--output={output}", *what])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(output.read_text())
    for found in document["data"].values():
        assert found["relative_error"] < 1e-5
        assert 1 < found["tokens"] < 2
        assert min(found["time"], found["cpu_time"], found["a_pass_each"]) > 0
