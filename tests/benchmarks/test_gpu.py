"""The GPU benchmark at toy size on a CPU, so that it is ready where there is a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import (
    DATA_SETS,
    find_tokenizer,
    make_up_model,
    make_up_texts,
    model_config,
    words_of,
)
from speed import gpu
from transformers import AutoModel

pytestmark = pytest.mark.slow

TOY = [
    "--device",
    "cpu",
    "--n-layers",
    "4",
    "--n-channels",
    "2",
    "--rounds",
    "1",
    "--minutes",
    "100",
    "--n-tokens",
    "1200",
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that keeps the tokenizer and the models."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def tokenizer(scratch: Path) -> Any:
    """SmolLM2's."""
    return find_tokenizer("smollm2-135m", scratch)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))


@pytest.fixture
def run(tmp_path: Path, scratch: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run the benchmark at toy size; its code and its file."""

    def measured(*arguments: str) -> tuple[int, dict[str, Any]]:
        output = tmp_path / "result.json"
        code = gpu.main([*TOY, "--scratch", str(scratch), *arguments, "--output", str(output)])
        return code, json.loads(output.read_text())

    return measured


def test_every_part_runs(
    run: Callable[..., tuple[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each figure stands beside its bar, the busy share alone wants a GPU, and answers agree."""
    code, result = run()
    assert code == 0, capsys.readouterr().err
    parts = result["parts"]
    assert parts.keys() == gpu.PARTS.keys()
    found = {name for part in parts.values() for name in part["figures"]}
    assert result["asked"].keys() - found == {"GPU busy"}
    assert result["versions"].keys() >= {"python", "torch", "transformers"}
    assert {name for name, part in parts.items() if "skipped" in part} <= {"busy", "fp8", "vllm"}
    assert "no CUDA device" in parts["busy"]["skipped"]
    for name in ("answers", "hugging_face", "sentence_transformers"):
        assert max(parts[name]["errors"].values()) < 1e-5
    smaller = ("bert-large", "minilm", "smollm2-135m")
    assert {name.partition(",")[0] for name in parts["models"]["figures"]} == set(smaller)
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == result
    assert any(line.startswith("NF4, times bfloat16") for line in printed)


def test_a_part_that_fails_is_named_and_the_others_run(
    run: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What went wrong stands beside what was found, and beside an earlier run; the code is 1."""

    def fail(_: object, found: dict[str, Any]) -> None:
        found["figures"]["so far"] = 1.0
        message = "no such kernel"
        raise RuntimeError(message)

    def never_end(*_: object) -> None:
        while True:
            pass

    assert run("--parts", "answers")[0] == 0
    monkeypatch.setitem(gpu.PARTS, "speed", (fail, 1.0))
    monkeypatch.setitem(gpu.PARTS, "busy", (never_end, 1e-6))
    code, result = run("--parts", "speed,busy,depth")
    parts = result["parts"]
    assert (code, parts.keys()) == (1, {"answers", "speed", "busy", "depth"})
    assert parts["speed"]["error"] == "RuntimeError: no such kernel"
    assert parts["speed"]["figures"] == {"so far": 1.0}
    assert parts["busy"]["error"] == "TimeoutError: over its 0 s"
    assert parts["depth"]["figures"]["half the layers, times all"] > 0
    late = run("--parts", "depth", "--minutes", "0")[1]
    assert late["parts"]["depth"] == {"skipped": "out of time"}


def test_a_word_is_a_token(tokenizer: Any) -> None:
    """Texts have as many tokens as words."""
    words = words_of(tokenizer)
    assert len(words) > 1000
    texts = make_up_texts(DATA_SETS["sst2"], 2000, words)
    assert [len(ids) for ids in tokenizer(texts)["input_ids"]] == [
        len(text.split()) for text in texts
    ]


@pytest.mark.parametrize(("name", "mean"), [("sst2", 11.5), ("r8", 126.5), ("agnews", 50)])
def test_made_up_texts_are_as_long_as_real_ones(name: str, mean: float) -> None:
    """Their mean is that of the data set within 3 %, and none is beyond the official width."""
    texts = make_up_texts(DATA_SETS[name], 100_000, ["a", "b"])
    lengths = [text.count(" ") + 1 for text in texts]
    assert np.mean(lengths) == pytest.approx(mean, rel=0.03)
    assert 1 <= min(lengths) <= max(lengths) <= DATA_SETS[name].official_width


def test_made_up_weights_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    """A folder that has a complete model is not written again."""
    what = model_config("llama2-7b", 2, 2), tokenizer, torch.device("cpu")
    folder = make_up_model(tmp_path / "model", *what)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make_up_model(folder, *what)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_official_mean_includes_pads(tmp_path: Path, tokenizer: Any) -> None:
    """Five hidden states each, over the whole width, whatever the batch size."""
    config = model_config("llama2-7b", 5, 2)
    folder = make_up_model(tmp_path / "model", config, tokenizer, torch.device("cpu"))
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
    assert found.shape == (3, 5, 64)
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
    assert gpu.busy_share(intervals) == pytest.approx(8 / 12)
