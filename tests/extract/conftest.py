from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from toy_cache import tree
from toy_model import save_toy_model, toy_texts

from llmembed.extract import ExtractConfig, extract

WriteCsv = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes and converted models of a test stay out of the user's cache folder."""
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="session", autouse=True)
def _workers_as_quick_as_others() -> Iterator[None]:
    """Ray gives its workers the lowest priority, which on a busy machine costs minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model(tmp_path_factory.mktemp("models") / "toy-llama", "llama")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model(tmp_path_factory.mktemp("models") / "toy-bert", "bert")


@pytest.fixture
def write_csv(tmp_path: Path) -> WriteCsv:
    def write(
        name: str = "toy.csv",
        texts: Sequence[str] | None = None,
        labels: Sequence[object] | None = None,
        header: Sequence[str] = ("text", "label"),
    ) -> Path:
        texts = toy_texts(150) if texts is None else texts
        labels = [("no", "yes")[row % 2] for row in range(len(texts))] if labels is None else labels
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *zip(texts, labels, strict=True)])
        return path

    return write


@pytest.fixture
def settings(llama: Path, write_csv: WriteCsv) -> dict[str, Any]:
    """An extraction of 300 texts, some of them twice: five blocks of 64 rows."""
    texts = toy_texts(280)
    return {
        "model": str(llama),
        "layers": "1,3",
        "pooling": ("mean", "last"),
        "dataset": str(write_csv(texts=[*texts, *texts[:10], *texts[-10:]])),
        "max_length": 16,
        "compute_dtype": "float32",
        "token_budget": 64,
    }


@pytest.fixture
def whole(settings: dict[str, Any], tmp_path: Path) -> dict[str, bytes]:
    """Every file of the cache that one process makes of it."""
    return tree(Path(extract(ExtractConfig(**settings, cache=str(tmp_path / "whole.zarr"))).path))
