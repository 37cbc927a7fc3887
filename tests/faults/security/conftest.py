"""A model, texts, a cache and a run, to be spoiled, and a home of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_commands import done, extracted
from toy_model import save_toy_model, write_two_topics

from llmembed.train.cli.fit import fit_main


@pytest.fixture(scope="package", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes and converted models stay out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMEMBED_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `toy`, texts `topics`, a cache `topics.zarr` of them and its `run`."""
    folder = tmp_path_factory.mktemp("made")
    save_toy_model(folder / "toy")
    write_two_topics(folder)
    extracted(folder / "toy", folder / "topics", folder / "topics.zarr")
    fitted = ["--cache", str(folder / "topics.zarr"), "--output", str(folder / "run")]
    done(fit_main, *fitted, "--fusion", "concat", "--head", "ridge", "--baseline", "none")
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil, which is the working folder."""
    shutil.copytree(made, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"
