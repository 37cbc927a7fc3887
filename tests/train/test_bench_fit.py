"""The trainer's benchmark at toy size, so that it cannot rot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_fit
import bench_fit_accuracy
import pytest

pytestmark = pytest.mark.slow

SOURCE = "smollm2-135m"


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run some parts at toy size and return what they wrote."""
    output = tmp_path / "result.json"
    sizes = ["--rows", "200", "--hidden-size", "8", "--repeats", "1"]
    bench_fit.main([*arguments, *sizes, "--output", str(output)])
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def test_speed_is_measured_and_answers_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each figure stands beside its bar, and the softmax reaches scikit-learn's loss."""
    result = run(tmp_path, "--part", "solved", "--part", "gradient", "--part", "large")
    figures = {name: figure for part in result.values() for name, figure in part["figures"].items()}
    assert figures.keys() < bench_fit.BARS.keys()
    assert figures["softmax, loss above LogisticRegression"] < 1e-4
    assert figures["Lightning over a bare loop"] > 0
    assert result["large"]["measured"]["n_rows"] == 200
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["solved"] == result["solved"]["figures"]
    assert any(line.startswith("softmax, loss above") for line in printed)


def test_commands_are_timed_as_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's seconds contain those that its own record counts."""
    only = {"ridge": bench_fit.commands.COMMANDS["ridge"]}
    monkeypatch.setattr(bench_fit.commands, "COMMANDS", only)
    cache = tmp_path / "made-up.zarr"
    bench_fit.write_features(cache, SOURCE, 200, 8)
    config = bench_fit.FitConfig(cache=str(cache), pooling=("mean",), layers="8,16")
    measured = bench_fit.commands.measure(config, repeats=1)
    assert measured["seconds"]["ridge"][0] > measured["parts"]["ridge"]["total"]


def test_accuracy_is_compared_and_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All methods have a figure on each data set, and a second time nothing is fitted again."""
    cache, work, known = (tmp_path / name for name in ("toy.zarr", "runs", "known.json"))
    bench_fit.write_features(cache, SOURCE, 120, 4)
    fits = {"cooc": bench_fit_accuracy.FITS["cooc"], "auto": {"fusion": "auto"}}
    fits["paper"] = {"preset": "paper", "sigma": 1.0, "epochs": 1}
    monkeypatch.setattr(bench_fit_accuracy, "FITS", fits)
    results = [bench_fit_accuracy.measure({"toy": cache}, SOURCE, work, known) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0]["toy"].keys() == {"paper", "cooc", "auto", "best", "oracle"}
    figures = bench_fit_accuracy.figures(results[0])
    assert figures["auto over the best layer, mean"] == figures["auto over the best layer, worst"]
    assert "toy" in bench_fit_accuracy.table(results[0])
