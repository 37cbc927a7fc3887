"""Frozen, fine-tuned and prompted: the comparison at toy size, so that it cannot rot."""

from __future__ import annotations

import doctest
import importlib
import json
import os
from pathlib import Path

import pytest
import questions
from finetuning import LEARNING_RATES
from meter import rapl_joules
from toy_model import save_toy_model, toy_texts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["finetuning", "prompting", "questions", "meter"])
def test_the_examples_in_docstrings_hold(name: str) -> None:
    """Every doctest of these modules gives what it says."""
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> questions.Texts:
    """Texts whose class is whether they hold the word w0, by the toy's vocabulary."""
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))
    for split, n in (("train", 40), ("test", 20)):
        rows = [
            f"{'w0' if row % 2 else 'w1'} {text}\t{'w0' if row % 2 else 'w1'}"
            for row, text in enumerate(toy_texts(n))
        ]
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]))
    return questions.subset("toy", str(tmp_path / "texts"), 40, 20)


@pytest.mark.parametrize("method", questions.METHODS)
def test_every_method_labels_every_text(
    texts: questions.Texts, method: str, tmp_path: Path
) -> None:
    """Each gives a class a text; what is not constrained may give none; only some train weights."""
    model = str(save_toy_model(tmp_path / "toy"))
    predicted, n_trained, stages = questions.answer(
        texts, method, model=model, layers="1,2", epochs=1, max_length=24
    )
    assert predicted.shape == (20,)
    lowest = -1 if method.endswith("free") else 0
    assert lowest <= predicted.min() <= predicted.max() < 2
    is_frozen = method.startswith("frozen")
    assert (n_trained > 0) == (is_frozen or method in LEARNING_RATES)
    assert is_frozen == ({"extract", "read", "fit"} <= stages.keys())


def test_the_command_measures_in_a_process_of_its_own(
    texts: questions.Texts,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The JSON line has accuracy, time, memory and energy; what a file has is not run again."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    command = [
        "--data",
        f"toy={tmp_path / 'texts'}",
        "--model",
        str(save_toy_model(tmp_path / "m")),
    ]
    command += ["--methods", "zero-shot constrained", "--output", str(tmp_path / "rows.json")]
    assert questions.main([*command, "--test", "4"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [row]
    assert questions.main([*command, "--test", "4"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == [row]
    assert 0 <= row["accuracy"] <= 1
    assert min(row["wall_s"], row["cpu_s"], row["joules"], row["peak_memory_bytes"]) > 0
    assert row["energy_method"]
    assert row["interval"][0] < row["accuracy"] + 1e-9 < row["interval"][1] + 2e-9
    assert str(tmp_path / "texts") not in (tmp_path / "rows.json").read_text()


def test_an_unknown_method_is_refused_with_the_known_ones(
    texts: questions.Texts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with 1 and names the close match."""
    command = ["--data", f"toy={tmp_path / 'texts'}", "--methods", "lorra"]
    assert questions.main(command) == 1
    assert "method 'lorra' does not exist; did you mean 'lora'?" in capsys.readouterr().err


def test_energy_is_the_sum_of_the_packages_counters(tmp_path: Path) -> None:
    """Two packages with 1 and 2 joules have 3; without counters there is no figure."""
    assert rapl_joules(tmp_path) is None
    for package, microjoules in ((0, 1_000_000), (1, 2_000_000)):
        folder = tmp_path / f"intel-rapl:{package}"
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{microjoules}\n")
    assert rapl_joules(tmp_path) == 3.0
