"""The commands one after the other, as a user types them, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_model import save_toy_model, write_two_topics

BIN = Path(sys.executable).parent


@pytest.fixture
def run(tmp_path: Path) -> Any:
    environment = os.environ | {"LLMEMBED_HOME": str(tmp_path / "home")}

    def command(name: str, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [BIN / name, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return command


def test_extract_fit_and_predict_follow_one_another(run: Any, tmp_path: Path) -> None:
    """A classifier is trained from the cache alone and labels new texts rightly."""
    write_two_topics(tmp_path)
    save_toy_model(tmp_path / "toy")
    run("llmembed-extract", "--model", "toy", "--layers", "1,2", "--dataset", "topics")
    assert "nothing to do" in run(
        "llmembed-extract", "--model", "toy", "--layers", "1,2", "--dataset", "topics"
    )
    (tmp_path / "topics" / "train.jsonl").unlink()  # the trainer needs neither texts nor model
    (tmp_path / "toy").rename(tmp_path / "away")
    run("llmembed-fit", "--cache", "topics.zarr", "--fusion", "mean")
    metrics = json.loads((tmp_path / "runs" / "topics-mean-0" / "metrics.json").read_text())
    assert metrics["eval_split"] == "test"
    assert metrics["accuracy"] > 0.9
    (tmp_path / "away").rename(tmp_path / "toy")
    answer = run("llmembed-predict", "--run", "runs/topics-mean-0", "--text", "w2 w2 w2 w2 w2 w9")
    assert "trade" in answer
    assert "cocoa" not in answer


def test_a_wrong_fusion_ends_in_one_line(run: Any, tmp_path: Path) -> None:
    """An unknown name costs one sentence and leaves nothing behind."""
    write_two_topics(tmp_path)
    save_toy_model(tmp_path / "toy")
    run("llmembed-extract", "--model", "toy", "--layers", "1", "--dataset", "topics")
    error = run("llmembed-fit", "--cache", "topics.zarr", "--fusion", "cooq", code=1)
    assert error.startswith("error: fusion 'cooq' does not exist; did you mean 'cooc'?")
    assert not (tmp_path / "runs").exists()
