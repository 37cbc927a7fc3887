"""The comparison with scikit-learn's ways at toy size, so that it cannot rot."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest
from suites import CachePlan, SourcePlan
from toy_model import save_toy_model, toy_texts

from llmembed.common.errors import CacheMismatchError
from llmembed.extract import ExtractConfig, extract

pytestmark = pytest.mark.slow


def write_texts(folder: Path, first: int = 0) -> str:
    folder.mkdir()
    texts = toy_texts(90)[first:]
    for split, part in (("train", texts[:60]), ("test", texts[60:])):
        rows = [f"{'yes' if row % 2 else 'no'} {text}\t{row % 2}" for row, text in enumerate(part)]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]))
    return str(folder)


def test_peers_see_the_rows_of_the_cache_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words help to tell the toy's classes; texts that the cache was not made from are refused."""
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))
    model, texts = str(save_toy_model(tmp_path / "toy")), write_texts(tmp_path / "texts")
    cache = str(tmp_path / "toy.zarr")
    extract(ExtractConfig(model=model, layers="1,2", dataset=texts, cache=cache, max_length=64))
    plan = CachePlan(
        name="toy",
        dataset=texts,
        splits={"train": 0, "test": 0},
        fingerprint="",
        sources=(SourcePlan(name="toy", layers="1,2"),),
    )
    rows = list(peers.compare_peers(plan, cache, texts, model, setfit_steps=1))
    assert [row["method"] for row in rows] == [
        "concat + LDA on toy",
        "cooc on toy",
        "LogisticRegressionCV on toy",
        "TF-IDF + LogisticRegressionCV",
        f"sentence-transformers {model} + LogisticRegressionCV",
        f"SetFit {model}, 1 steps",
    ]
    assert rows[3]["accuracy"] > 0.6
    assert rows[0]["p"] == 1.0
    assert min(row["accuracy"] for row in rows) > 0.3
    with pytest.raises(CacheMismatchError, match="are not those of the cache of toy"):
        next(peers.compare_peers(plan, cache, write_texts(tmp_path / "others", 5), model))
