"""What the benchmark of one text measures, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from speed import latency
from toy_model import save_toy_model, toy_texts


def test_one_text_stands_beside_its_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line is the JSON document; the others hold the bars of what was measured."""
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))
    dataset, output = tmp_path / "toy.jsonl", tmp_path / "result.json"
    rows = ({"text": text, "label": "ab"[len(text) % 2]} for text in toy_texts(40))
    dataset.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = ["--model", str(save_toy_model(tmp_path / "toy")), "--layers", "1,2"]
    sizes = ["--dataset", str(dataset), "--rounds", "2", "--starts", "0"]
    latency.main([*arguments, *sizes, "--output", str(output)])
    result = json.loads(output.read_text())
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == result
    assert [line.split("  ")[0] for line in lines] == list(latency.BARS)[:2]
