from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clustered import MakeCache, write_cache
from toy_model import save_toy_model, toy_texts

from llmembed.extract import ExtractConfig, extract
from llmembed.train import FitConfig, Run, fit


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes and converted models stay out of the user's cache folder, and the Hub is not asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMEMBED_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def texts_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the features of real texts by two tiny backbones, made by the real extraction."""
    folder = tmp_path_factory.mktemp("texts")
    texts, cache = toy_texts(120), str(folder / "toy.zarr")
    with (folder / "toy.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(text, ("short", "long")[len(text.split()) > 10]) for text in texts]
        csv.writer(file).writerows([("text", "label"), *rows])
    for kind, layers, poolings in (("llama", "1,3", ("mean", "last")), ("bert", "2", ("first",))):
        extract(
            ExtractConfig(
                model=str(save_toy_model(folder / f"toy-{kind}", kind)),
                layers=layers,
                dataset=str(folder / "toy.csv"),
                cache=cache,
                pooling=poolings,
                max_length=64,
                compute_dtype="float32",
            )
        )
    config = FitConfig(cache=cache, epochs=20, lr=0.01, output=str(folder / "run"))
    return fit(config)


@pytest.fixture
def make_cache(tmp_path: Path) -> MakeCache:
    def make(
        splits: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
        *,
        name: str = "tiny.zarr",
        **options: Any,
    ) -> Path:
        return write_cache(tmp_path / name, splits, **options)

    return make


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, as a machine with two cores has; the tests' own limit is one."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n_threads)
