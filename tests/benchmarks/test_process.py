"""What the process benchmark measures, at small sizes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from speed import process
from toy_model import save_toy_model

pytestmark = pytest.mark.slow


@pytest.mark.real
def test_what_loading_needs_is_told_beside_the_weights() -> None:
    """They are those of MiniLM cut at 3 of its 6 layers, its pooler included, two bytes each."""
    found = process.loading("minilm", 3, process.WIDENED)
    width, inner = 384, 1536
    square, norm = width * width + width, 2 * width
    block = 4 * square + 2 * width * inner + inner + width + 2 * norm
    embeddings = (30_522 + 512 + 2) * width + norm
    assert found["weights_bytes"] == 2 * (embeddings + 3 * block + square)
    assert found["needed_bytes"] > 3 * block


def test_memory_that_is_taken_is_seen() -> None:
    """64 MiB that are written and let go again count; what was there before does not."""
    with process.Peak() as peak:
        block = bytearray(b"x" * (64 << 20))
        while peak.anonymous < 32 << 20:  # until it was read once more
            threading.Event().wait(0.001)
        del block
    assert 60 << 20 < peak.anonymous < 200 << 20


def test_every_figure_stands_beside_its_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends in JSON; here its processes are calls, which a toy makes short."""

    def call(verb: str, *values: str, **environment: str) -> dict[str, float]:
        return process.CHILDREN[verb](*values)

    folder, output = save_toy_model(tmp_path / "toy"), tmp_path / "result.json"
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))
    changes = {"_run": call, "LAYER": 2, "SMALL_MODEL": str(folder), "SMALL_LAYERS": "2"}
    for name, value in {**changes, "_median_s": lambda code, options: options.rounds}.items():
        monkeypatch.setattr(process, name, value)
    sizes = ["--rounds", "1", "--few", "20", "--many", "40", "--layers", "2"]
    process.main(["--model", str(folder), *sizes, "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["figures"].keys() == process.BARS.keys()
    assert result["start_s"][0] > 0
    assert [one["n_texts"] for one in result["extracting"]] == [20, 40]
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    assert [line.split("  ")[0] for line in lines[:-1]] == list(process.BARS)


def test_no_two_short_texts_are_the_same() -> None:
    """Equal texts would be computed once, and memory over many texts would be no such thing."""
    texts = {process._text(row) for row in range(5000)}
    assert len(texts) == 5000
    assert {len(text.split()) for text in texts} <= {6, 7, 8, 9}
