"""`llmembed-cache verify --model`: rows extracted again agree with the cache, or are named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from toy_model import toy_texts

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.cache_format.cli import main
from llmembed.common.errors import CacheMismatchError, DataError
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.features.recheck import recheck

TEXTS = toy_texts(40)


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    rows = [{"text": text, "label": row % 2} for row, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "toy.jsonl"
    write_jsonl(path, TEXTS)
    return path


@pytest.fixture
def cache(tmp_path: Path, dataset: Path, llama: Path) -> str:
    config = ExtractConfig(
        model=str(llama),
        layers="1,3",
        dataset=str(dataset),
        cache=str(tmp_path / "toy.zarr"),
        pooling=("mean", "last"),
        max_length=16,
        compute_dtype="float32",
    )
    return extract(config).path


def verify(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_right_cache_agrees(cache: str, llama: Path) -> None:
    """All arrays of the chosen rows agree within what float16 rounds, whatever the batch."""
    found = recheck(cache, model=str(llama), n_rows=7)
    assert (found.n_arrays, dict(found.n_rows), found.differences) == (4, {"train": 7}, ())
    assert found.largest < 1.1e-3
    assert verify(cache, "--model", llama)[0] == 0


def test_a_wrong_row_that_was_committed_is_named(tmp_path: Path, cache: str, llama: Path) -> None:
    """Features of other texts pass every hash, and differ when they are extracted again."""
    source = open_cache(cache)
    wrong = tmp_path / "wrong.zarr"
    split = source["train"]
    with CacheWriter(wrong, dataset=source.dataset) as writer:
        writer.add_source(source.sources["toy-llama"])
        writer.add_split("train", labels=split.labels, text_hash=split.text_hash)
        plan = writer.plan("train", "toy-llama", arrays=[("mean", 1)])
        features = {("mean", 1): split.features(1, pooling="mean")[::-1]}
        (block,) = plan.blocks
        writer.write(plan, block, n_tokens=split.n_tokens(), features=features)
        writer.finish("train", "toy-llama")
    assert verify(wrong)[0] == 0
    code, output = verify(wrong, "--model", llama)
    assert code == 1
    assert "DIFFERS train/toy-llama/mean/layer_001: row " in output


def test_another_model_is_refused(tmp_path: Path, cache: str, bert: Path) -> None:
    """The message says which parts of its identity differ."""
    with pytest.raises(
        CacheMismatchError, match=r"toy-llama \(another backbone, tokenizer, weights"
    ):
        recheck(cache, model=str(bert))


def test_texts_are_found_by_their_hash(tmp_path: Path, cache: str, llama: Path) -> None:
    """The data set may have been shuffled and grown since; other texts are refused."""
    shuffled = tmp_path / "shuffled.jsonl"
    texts = [*np.random.default_rng(0).permutation(TEXTS), "another"]
    write_jsonl(shuffled, texts)
    assert recheck(cache, model=str(llama), dataset=str(shuffled)).differences == ()
    write_jsonl(shuffled, ["another", "others"])
    with pytest.raises(DataError, match="none of the texts of split 'train'"):
        recheck(cache, model=str(llama), dataset=str(shuffled))
