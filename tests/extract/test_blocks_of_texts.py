"""Texts in memory go through some thousand at a time, and nobody sees where one block ends."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from toy_model import toy_texts

from llmembed.cache_format import open_cache
from llmembed.common.errors import DataError, LLMEmbedWarning, RowError
from llmembed.extract import ExtractConfig, Extractor, TextFeatures, recall
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.features import extractor as module

TEXTS = [*toy_texts(40, longest=30), ""]
BLOCK = 7


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_TEXTS", BLOCK)
    monkeypatch.setattr(recall, "BLOCK_TEXTS", BLOCK)


def extractor(folder: Path, dtype: str = "float32") -> Extractor:
    recipe = Recipe(model=str(folder), max_length=16, compute_dtype="float32", dtype=dtype)
    return Extractor(recipe, layers=[0, 2], poolings=["mean"], device="cpu")


def messages(ours: Extractor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.features(TEXTS)
    return [str(one.message) for one in caught if one.category is LLMEmbedWarning]


@pytest.mark.filterwarnings("ignore:.*(cut at 16 tokens|of the lone token)")
def test_features_and_warnings_are_those_of_one_block(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 7 of 41 texts give the features of all at once, and one warning of each kind."""
    ours = extractor(llama)
    whole, told = ours.features(TEXTS), messages(ours)
    monkeypatch.setattr(module, "BLOCK_TEXTS", BLOCK)
    assert [len(block["mean", 2]) for block in ours.in_blocks(TEXTS)] == [BLOCK] * 5 + [6]
    assert messages(ours) == told
    assert len(told) == 2
    for name, feature in ours.features(TEXTS).items():
        np.testing.assert_allclose(feature, whole[name], rtol=1e-5, atol=1e-4)
    assert [*ours.in_blocks([])] == []
    assert {feature.shape for feature in ours.features([]).values()} == {
        (0, ours.backbone.hidden_size)
    }


@pytest.mark.usefixtures("small_blocks")
def test_a_text_is_named_by_its_place_among_all(llama: Path) -> None:
    """What is no Unicode is told before anything is computed, a bad feature when it comes."""
    ours = extractor(llama, "float16")
    with pytest.raises(DataError, match="text 20 holds a lone surrogate"):
        next(ours.in_blocks([*["w1"] * 20, "\ud83d"]))
    with pytest.raises(DataError, match="text 9 is a int, not a string"):
        ours.features([*["w1"] * 9, 3])  # type: ignore[list-item]
    (token,) = set(ours.tokenize(["w2"]).ids[0]) - set(ours.tokenize(["w1"]).ids[0])
    ours.backbone.model.get_input_embeddings().weight.data[token] = 1e6
    with pytest.raises(RowError, match="text 17, layer 0, pooling mean"):
        ours.features([*["w1"] * 17, "w2"])


@pytest.mark.usefixtures("small_blocks")
def test_a_cache_is_read_in_blocks_too(llama: Path, tmp_path: Path) -> None:
    """What it lacks is computed first, as one split, and each block has the rows of its texts."""
    options = {"layers": "1,3", "max_length": 64, "compute_dtype": "float32", "device": "cpu"}
    cache = str(tmp_path / "texts.zarr")
    texts = toy_texts(30)
    plain = TextFeatures(ExtractConfig(model=str(llama), **options))
    cached = TextFeatures(ExtractConfig(model=str(llama), **options, cache=cache))
    for asked in (texts[:12], [*reversed(texts), texts[3]]):
        found, expected = ([*one.in_blocks(asked)] for one in (cached, plain))
        assert [len(block["mean", 3]) for block in found] == [
            len(asked[start : start + BLOCK]) for start in range(0, len(asked), BLOCK)
        ]
        for name in plain.arrays:
            parts = ([block[name] for block in blocks] for blocks in (found, expected))
            ours, theirs = map(np.concatenate, parts)
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-3)  # both are float16
    assert len(open_cache(cache).splits) == 2


@pytest.mark.usefixtures("small_blocks")
def test_threads_share_one_backbone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded once, and computes one block at a time, also beside one that nobody ends."""
    options = {"layers": "1", "max_length": 64, "compute_dtype": "float32", "device": "cpu"}
    ours = TextFeatures(ExtractConfig(model=str(llama), **options))
    unfinished = ours.in_blocks(TEXTS[:-1])
    next(unfinished)
    at_work, loaded = threading.Lock(), {id(ours._extractor)}
    tokenize = Extractor.tokenize

    def alone(self: Extractor, texts: list[str]) -> object:
        assert at_work.acquire(blocking=False)
        loaded.add(id(self))
        try:
            return tokenize(self, texts)
        finally:
            at_work.release()

    monkeypatch.setattr(Extractor, "tokenize", alone)
    n_blocks: list[int] = []
    threads = [
        threading.Thread(target=lambda: n_blocks.append(len([*ours.in_blocks(TEXTS[:-1])])))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert n_blocks == [6] * 4
    assert len(loaded) == 1
