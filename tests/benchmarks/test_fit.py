"""The trainer's benchmark at toy size, so that it cannot rot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from speed import fit
from studies import fit_accuracy

pytestmark = pytest.mark.slow

SOURCE = "smollm2-135m"
STEPS = ("fit by gradient over a bare loop", "fit by gradient, ms a step")  # have no bar


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run some parts at toy size and return what they wrote."""
    output = tmp_path / "result.json"
    sizes = ["--rows", "200", "--hidden-size", "8", "--repeats", "1"]
    fit.main([*arguments, *sizes, "--output", str(output)])
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def test_speed_is_measured_and_answers_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each figure stands beside its bar, and the softmax reaches scikit-learn's loss."""
    result = run(tmp_path, "--part", "solved", "--part", "gradient", "--part", "large")
    figures = {name: figure for part in result.values() for name, figure in part["figures"].items()}
    assert {*figures} - {*fit.BARS} == {*STEPS}
    assert figures["softmax, loss above LogisticRegression"] < 1e-4
    assert min(figures[name] for name in STEPS) > 0
    assert result["large"]["measured"]["n_rows"] == 200
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["solved"] == result["solved"]["figures"]
    assert any(line.startswith("softmax, loss above") for line in printed)


def test_commands_are_timed_as_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's seconds contain those that its own record counts."""
    only = {"ridge": fit.COMMANDS["ridge"]}
    monkeypatch.setattr(fit, "COMMANDS", only)
    cache = tmp_path / "made-up.zarr"
    fit.write_features(cache, {SOURCE: 31}, 200, 8)
    config = fit.FitConfig(cache=str(cache), pooling=("mean",), layers="8,16")
    measured = fit.measure_commands(config, repeats=1)[0]
    assert measured["seconds"]["ridge"][0] > measured["parts"]["ridge"]["total"]


def test_accuracy_is_compared_and_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All methods have a figure on each data set, and a second time nothing is fitted again."""
    cache, work, known = (tmp_path / name for name in ("toy.zarr", "runs", "known.json"))
    fit.write_features(cache, {SOURCE: 31}, 120, 4)
    fits = {"cooc": fit_accuracy.FITS["cooc"], "auto": {"fusion": "auto"}}
    fits["paper"] = {"preset": "paper", "sigma": 1.0, "epochs": 1}
    monkeypatch.setattr(fit_accuracy, "FITS", fits)
    results = [fit_accuracy.measure({"toy": cache}, SOURCE, work, known) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0]["toy"].keys() == {"paper", "cooc", "auto", "best", "oracle"}
    figures = fit_accuracy.figures(results[0])
    assert figures["auto over the best layer, mean"] == figures["auto over the best layer, worst"]
    assert "toy" in fit_accuracy.table(results[0])
