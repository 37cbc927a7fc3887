"""From texts to predictions with two backbones of different widths, and with pairs of texts."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from toy_model import save_toy_model, toy_texts

from llmembed.cache_format import open_cache
from llmembed.extract import ExtractConfig, extract
from llmembed.train import FitConfig, fit, load_run
from llmembed.train.cli.predict import predict_main
from llmembed.train.inputs.data import read_features

TEXTS = [f"w{1 + row % 2} " * 6 + text for row, text in enumerate(toy_texts(80, longest=4))]
WIDTHS = {"toy-llama": 32, "toy-bert": 16}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))


def write_rows(path: Path, *rows: tuple[str, ...]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def extract_with(folder: Path, data_set: Path, kind: str, **changes: Any) -> str:
    """Add a toy backbone's features to one cache, and return that."""
    width = WIDTHS[f"toy-{kind}"]
    model = save_toy_model(folder / f"toy-{kind}", kind, hidden_size=width)
    cache = str(folder / "toy.zarr")
    settings = {"model": str(model), "dataset": str(data_set), "cache": cache, "max_length": 48}
    extract(ExtractConfig(**settings | {"compute_dtype": "float32"} | changes))
    return cache


@pytest.mark.parametrize("fusion", ["concat", "cooc"])
def test_backbones_of_two_widths_share_a_cache_and_a_classifier(
    tmp_path: Path, fusion: str
) -> None:
    """Each keeps its own pooling, a fit takes both, and new texts get what the cache has."""
    rows = [(text, ("cocoa", "trade")[row % 2]) for row, text in enumerate(TEXTS)]
    data_set = write_rows(tmp_path / "toy.csv", ("text", "label"), *rows)
    extract_with(tmp_path, data_set, "llama", layers="1,3", pooling=("mean", "last"))
    cache = extract_with(tmp_path, data_set, "bert", layers="3", pooling=("pooler",))
    split = open_cache(cache)["train"]
    assert {(f[0], f[1], f[2]) for f in split.arrays} == {
        *(("toy-llama", pooling, layer) for pooling in ("mean", "last") for layer in (1, 3)),
        ("toy-bert", "pooler", 3),
    }
    training = {"epochs": 20} if fusion == "cooc" else {}
    config = FitConfig(cache=cache, fusion=fusion, output=str(tmp_path / "run"), **training)
    run = load_run(fit(config).path)
    assert {(f.source, f.hidden_size) for f in run.features} == set(WIDTHS.items())
    assert len(run.features) == 5
    with torch.inference_mode():
        logits = run.classifier(read_features(split, run.features))
    expected = logits.double().softmax(dim=1).numpy()
    np.testing.assert_allclose(run.predict_proba(TEXTS), expected, atol=2e-3)
    labels = np.array([label for _, label in rows])
    assert (np.array(run.labels)[expected.argmax(axis=1)] == labels).mean() > 0.9


def test_pairs_are_predicted_from_two_columns(tmp_path: Path) -> None:
    """The label follows the second text; one text alone, or one column, ends in one sentence."""
    seconds = [("w1 w1 w1 w1", "yes"), ("w2 w2 w2 w2", "no")]
    firsts = toy_texts(160, longest=4)
    rows = [(first, *seconds[row % 2]) for row, first in enumerate(firsts)]
    header = ("premise", "hypothesis", "label")
    data_set = write_rows(tmp_path / "pairs.csv", header, *rows)
    cache = extract_with(tmp_path, data_set, "bert", layers="2,3", text_column="premise,hypothesis")
    fit(FitConfig(cache=cache, fusion="concat", output=str(tmp_path / "run")))
    new = [("w50 w51", second) for second, _ in seconds]
    source = write_rows(tmp_path / "new.csv", header[:2], *new)
    target = tmp_path / "out.csv"

    def predict(*options: str) -> Any:
        return CliRunner().invoke(predict_main, ["--run", str(tmp_path / "run"), *options])

    done = predict(
        "--input", str(source), "--text-column", "premise,hypothesis", "--output", str(target)
    )
    assert done.exit_code == 0, done.output
    with target.open(newline="", encoding="utf-8") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["yes", "no"]
    refused = predict("--text", "w50 w51")
    assert refused.exit_code == 1
    assert "text 0 is not a pair" in refused.stderr
    refused = predict("--input", str(source), "--text-column", "premise")
    assert "text 0 is not a pair" in refused.stderr
