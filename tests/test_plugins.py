"""Fusions and poolings of an installed package, used by name from the command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_model import save_toy_model, write_two_topics

BIN = Path(sys.executable).parent
EXAMPLE = Path(__file__).parent / "example_plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder in which pip has installed the example package, and nothing else."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source")
    pip = [sys.executable, "-Pm", "pip", "install", "--no-deps", "--no-build-isolation"]
    where = ["--quiet", "--target", folder / "site", folder / "source"]
    subprocess.run([*pip, *where], check=True, capture_output=True)
    return folder / "site"


@pytest.fixture
def with_plugin(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run a command in an empty folder, where the example package is installed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str, plugin: bool = True, code: int = 0) -> str:
        with monkeypatch.context() as patched:
            if plugin:
                patched.setenv("PYTHONPATH", str(installed))
            done = subprocess.run(
                [BIN / name, *arguments], capture_output=True, text=True, check=False
            )
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return run


@pytest.mark.slow
def test_a_package_brings_a_fusion_and_a_pooling(with_plugin: Callable[..., str]) -> None:
    """Their names work as built-in ones do; a run that lacks the package says which."""
    write_two_topics(Path())
    save_toy_model(Path("toy"))
    extract = ["--model", "toy", "--layers", "1:4", "--dataset", "topics"]
    with_plugin("llmembed-extract", *extract, "--pooling", "middle,mean")
    fit = ["--cache", "topics.zarr", "--pooling", "middle"]
    assert "did you mean 'range'?" in with_plugin("llmembed-fit", *fit, "--fusion", "rnge", code=1)
    with_plugin("llmembed-fit", *fit, "--fusion", "range")
    predict = ["llmembed-predict", "--run", "runs/topics-range-0", "--text", "w2 w2 w2 w9"]
    assert with_plugin(*predict).split()[0] in {"trade", "cocoa"}
    message = with_plugin(*predict, plugin=False, code=1)
    assert "fusion 'range'" in message
    assert "llmembed-example 1.5" in message


@pytest.mark.slow
def test_a_cache_is_read_without_the_package_of_its_pooling(
    with_plugin: Callable[..., str],
) -> None:
    """Features lie in the cache; the pooling's function is needed for new texts alone."""
    write_two_topics(Path())
    save_toy_model(Path("toy"))
    extract = ["--model", "toy", "--layers", "1,2", "--dataset", "topics", "--pooling", "middle"]
    with_plugin("llmembed-extract", *extract)
    with_plugin("llmembed-fit", "--cache", "topics.zarr", "--fusion", "concat", plugin=False)
    predict = ["llmembed-predict", "--run", "runs/topics-concat-0", "--text", "w2 w2"]
    assert "pooling 'middle'" in with_plugin(*predict, plugin=False, code=1)
    with_plugin(*predict)
