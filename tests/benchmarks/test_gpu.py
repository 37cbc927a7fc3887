"""The GPU benchmark at toy size on a CPU, so that it is ready where there is a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from speed import gpu
from speed.made_up import DATA_SETS, llama_config, make_up_llama, make_up_texts
from transformers import AutoModel

pytestmark = pytest.mark.slow

TOY = ["--device", "cpu", "--n-layers", "4", "--hidden-size", "64", "--rounds", "1"]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    output = tmp_path / "result.json"
    code = gpu.main([*TOY, "--n-tokens", "1200", *arguments, "--output", str(output)])
    result: dict[str, Any] = json.loads(output.read_text())
    return code, result


def test_every_part_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each figure stands beside its bar, the busy share alone wants a GPU, and answers agree."""
    code, result = run(tmp_path)
    assert code == 0, capsys.readouterr().err
    assert result["parts"].keys() == gpu.PARTS.keys()
    found = {name for part in result["parts"].values() for name in part.get("figures", ())}
    assert gpu.BARS.keys() - found == {"GPU busy after warm-up"}
    assert "no CUDA device" in result["parts"]["busy"]["skipped"]
    for part in ("answers", "hugging_face", "sentence_transformers"):
        assert max(result["parts"][part]["errors"].values()) < 1e-5
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == result
    assert any(line.startswith("NF4, times bfloat16") for line in printed)


def test_a_part_that_fails_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error stands in the file beside the figures of an earlier run, and the code is 1."""

    def fail(bench: object) -> dict[str, Any]:
        del bench
        message = "no such kernel"
        raise RuntimeError(message)

    scratch = ["--scratch", str(tmp_path)]
    assert run(tmp_path, *scratch, "--parts", "answers")[0] == 0
    monkeypatch.setitem(gpu.PARTS, "speed", fail)
    code, result = run(tmp_path, *scratch, "--parts", "speed,depth")
    assert code == 1
    assert result["parts"]["speed"]["error"] == "RuntimeError: no such kernel"
    assert result["parts"].keys() == {"answers", "speed", "depth"}
    assert result["parts"]["depth"]["figures"]["half the layers, times all"] > 0
    late = run(tmp_path, *scratch, "--parts", "depth", "--minutes", "0")[1]
    assert late["parts"]["depth"] == {"skipped": "out of time"}


@pytest.mark.parametrize(("name", "mean"), [("sst2", 11.5), ("r8", 126.5), ("agnews", 50)])
def test_made_up_texts_are_as_long_as_real_ones(name: str, mean: float) -> None:
    """Their mean is that of the data set within 3 %, and none is beyond the official width."""
    texts = make_up_texts(DATA_SETS[name], 100_000, 998)
    lengths = [text.count(" ") + 1 for text in texts]
    assert np.mean(lengths) == pytest.approx(mean, rel=0.03)
    assert 1 <= min(lengths) <= max(lengths) <= DATA_SETS[name].official_width


def test_made_up_weights_are_kept(tmp_path: Path) -> None:
    """A folder that has a complete model is not written again."""
    config = llama_config(2, 16)
    folder = make_up_llama(tmp_path / "model", config, torch.device("cpu"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make_up_llama(folder, config, torch.device("cpu"))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_official_mean_includes_pads(tmp_path: Path) -> None:
    """Five hidden states each, over the whole width, whatever the batch size."""
    folder = make_up_llama(tmp_path / "model", llama_config(5, 16), torch.device("cpu"))
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [[5, 6, 7], [8], [9, 10]]
    found = gpu.official_way(model, ids, 6, batch_size=2)
    with torch.inference_mode():
        states = model(
            input_ids=torch.tensor([[8, 0, 0, 0, 0, 0]]),
            attention_mask=torch.tensor([[1, 0, 0, 0, 0, 0]]),
            output_hidden_states=True,
        ).hidden_states
    expected = np.stack([state[0].mean(dim=0).numpy() for state in states[-5:]])
    assert found.shape == (3, 5, 16)
    np.testing.assert_allclose(found[1], expected, rtol=1e-4, atol=1e-5)


def test_batch_sizes_beyond_the_memory_are_left_out() -> None:
    """The first that does not fit ends the search."""

    def work(size: int) -> None:
        if size > 4:
            raise torch.OutOfMemoryError

    best, seconds = gpu.best_size(work, (2, 4, 8, 16))
    assert seconds.keys() == {2, 4}
    assert best in seconds


def test_busy_is_where_intervals_overlap_or_touch() -> None:
    """Of 0-2, 4-8, 5-6 and 10-12 eight of twelve are busy, whatever their order."""
    intervals = np.array([[10.0, 12.0], [4.0, 8.0], [0.0, 2.0], [5.0, 6.0]])
    assert gpu.busy_share(intervals, skip=0) == pytest.approx(8 / 12)
    assert gpu.busy_share(intervals, skip=0.25) == pytest.approx(0.75)
