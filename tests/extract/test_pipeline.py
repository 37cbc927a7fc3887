from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_model import toy_texts

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.common.errors import (
    CacheFormatError,
    CacheMismatchError,
    CacheSpaceError,
    ConfigError,
    LLMEmbedError,
    LLMEmbedWarning,
    RowError,
)
from llmembed.extract import ExtractConfig, Extractor, extract


@pytest.fixture
def config(llama: Path, write_csv: Any, tmp_path: Path) -> Any:
    def make(**changes: Any) -> ExtractConfig:
        settings: dict[str, Any] = {
            "model": str(llama),
            "layers": "1,3",
            "pooling": ("mean",),
            "dataset": str(tmp_path / "toy.csv"),
            "cache": str(tmp_path / "toy.zarr"),
            "max_length": 16,
            "compute_dtype": "float32",
            "token_budget": 64,
        }
        return ExtractConfig(**settings | changes)

    write_csv()
    return make


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_cache_holds_the_features_of_every_text(config: Any) -> None:
    """Rows are in data-set order and equal what the extractor gives text by text."""
    result = extract(config(pooling=("mean", "last")))
    split = open_cache(result.path)["train"]
    assert (result.n_rows, result.n_rows_computed) == ({"train": 150}, 150)
    extractor = Extractor(
        open_cache(result.path).sources["toy-llama"].recipe,
        layers=(1, 3),
        poolings=("mean", "last"),
        token_budget=1,
    )
    features = extractor.compute(extractor.tokenize(toy_texts(150)).ids)
    for (pooling, layer), expected in features.items():
        stored = split.features(layer, pooling=pooling)
        np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=1e-4)
    assert split.labels.tolist() == [0, 1] * 75


def test_a_complete_cache_is_left_alone(config: Any) -> None:
    """The same command again computes nothing and changes no byte."""
    path = Path(extract(config()).path)
    before = tree(path)
    again = extract(config())
    assert again.n_rows_computed == 0
    assert "nothing to do" in again.describe()
    assert tree(path) == before


def test_an_interrupted_extraction_ends_in_the_same_bytes(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure in the middle, the same command finishes a bit-identical cache."""
    whole = tree(Path(extract(config(cache=str(tmp_path / "whole.zarr"))).path))
    write, calls = CacheWriter.write, []

    def failing(self: CacheWriter, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, *args, **kwargs)

    monkeypatch.setattr(CacheWriter, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        extract(config())
    monkeypatch.undo()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    resumed = extract(config())
    assert 0 < resumed.n_rows_computed < 150
    assert tree(Path(resumed.path)) == whole


def test_only_what_is_missing_is_computed(config: Any) -> None:
    """More layers and poolings are added; the chunks that were there keep their bytes."""
    path = Path(extract(config(layers="1")).path)
    before = {name: data for name, data in tree(path).items() if "/layer_001/c." in name}
    assert len(before) > 1
    extract(config(layers="1,2", pooling=("mean", "max")))
    split = open_cache(path)["train"]
    assert split.layers(pooling="mean") == split.layers(pooling="max") == (1, 2)
    after = tree(path)
    assert {name: after[name] for name in before} == before


def test_auto_arithmetic_goes_on_as_the_cache_began(config: Any) -> None:
    """A cache made in another arithmetic is extended in it, whatever suits this machine."""
    path = extract(config(layers="1", compute_dtype="bfloat16")).path
    extract(config(layers="1,2", compute_dtype="auto"))
    cache = open_cache(path)
    assert cache.sources["toy-llama"].fingerprint["compute_dtype"] == "bfloat16"
    assert cache["train"].layers() == (1, 2)


def test_a_second_backbone_shares_the_cache(config: Any, bert: Path) -> None:
    """Two sources of different kind stand side by side."""
    extract(config())
    path = extract(config(model=str(bert), layers="1,-1", pooling=("first", "pooler"))).path
    cache = open_cache(path)
    assert sorted(cache.sources) == ["toy-bert", "toy-llama"]
    assert cache["train"].layers("toy-bert", "first") == (1, 3)
    assert cache["train"].layers("toy-bert", "pooler") == (3,)


def test_a_cache_of_means_gets_the_last_token(config: Any) -> None:
    """Without --pooling both are stored; of a cache that has the mean it stays as it was."""
    before = open_cache(extract(config()).path)["train"].features(3).copy()
    cache = open_cache(extract(config(pooling=ExtractConfig.pooling)).path)
    assert {pooling for _, pooling, _ in cache["train"].arrays} == {"mean", "last"}
    np.testing.assert_array_equal(cache["train"].features(3, pooling="mean"), before)
    with pytest.raises(ConfigError, match=r"2 poolings \(last, mean\); say which with pooling="):
        cache["train"].features(3)


def test_a_text_that_stands_twice_in_a_block_is_computed_once(config: Any, write_csv: Any) -> None:
    """Rows of a block with the same text share a feature; each of two blocks has its own of it."""
    texts = toy_texts(100)
    write_csv(texts=[*texts[:50], *texts[:14], *texts[14:50], *texts[:50]])
    result = extract(config())
    features = open_cache(result.path)["train"].features(3)
    assert result.n_duplicates == 14 + 14
    np.testing.assert_array_equal(features[50:64], features[:14])
    np.testing.assert_allclose(features[64:100], features[14:50], rtol=1e-3, atol=1e-3)


def test_a_grown_data_set_extracts_the_new_rows(config: Any, write_csv: Any) -> None:
    """Rows appended to the file are added; those there keep their features."""
    write_csv(texts=toy_texts(150)[:100])
    before = open_cache(extract(config()).path)["train"].features(3).copy()
    write_csv(texts=toy_texts(150))
    grown = extract(config())
    assert grown.n_rows_computed < 150
    features = open_cache(grown.path)["train"].features(3)
    assert features.shape == (150, 16)
    np.testing.assert_array_equal(features[:100], before)


def test_empty_texts_are_legal_and_said(config: Any, write_csv: Any) -> None:
    """An empty text gets the feature of the begin-of-text token, and the report says so."""
    write_csv(texts=["", *toy_texts(9)])
    result = extract(config())
    assert "1 empty text got the feature of the lone token '[CLS]'." in result.describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 8}, "max_length: cache 16, given 8"),
        ({"template": "say {text}"}, "template: cache None, given 'say {text}'"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype: cache 'float32', given 'bfloat16'"),
        ({"dtype": "float32"}, "is stored as float16, but float32 was asked for"),
    ],
)
def test_a_cache_made_otherwise_is_refused(
    config: Any, changes: dict[str, Any], message: str
) -> None:
    """What contradicts the fingerprint is named with both values, and nothing is written."""
    path = Path(extract(config()).path)
    before = tree(path)
    with pytest.raises(CacheMismatchError, match=re.escape(message)):
        extract(config(**changes))
    assert tree(path) == before


def test_a_cache_of_another_model_is_refused(config: Any, bert: Path) -> None:
    """Another backbone under the same source name is refused, with both names."""
    path = Path(extract(config()).path)
    before = tree(path)
    with pytest.raises(CacheMismatchError, match="backbone: cache 'toy-llama', given 'toy-bert'"):
        extract(config(model=str(bert), source="toy-llama"))
    assert tree(path) == before


def test_a_cache_of_other_texts_is_refused(config: Any, write_csv: Any) -> None:
    """Other texts under the same name are refused, with the first row that differs."""
    path = Path(extract(config()).path)
    before = tree(path)
    write_csv(texts=[*toy_texts(150)[:70], "w90", *toy_texts(150)[71:]])
    with pytest.raises(CacheMismatchError, match="row 70"):
        extract(config())
    assert tree(path) == before


def test_a_folder_that_is_no_cache_is_never_touched(config: Any, tmp_path: Path) -> None:
    """Not even with --overwrite."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CacheFormatError, match="mine"):
            extract(config(cache=str(tmp_path / "mine"), overwrite=overwrite))
    assert tree(tmp_path / "mine") == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": "4"}, ConfigError, "layer 4 does not exist in toy-llama, which has 3 layers"),
        ({"pooling": ("avg",)}, ConfigError, "pooling 'avg' does not exist"),
        ({"dtype": "float8"}, ConfigError, "dtype 'float8' does not exist"),
        ({"quantize": "int4"}, ConfigError, "quantization 'int4' does not exist"),
        ({"limit": 0}, ConfigError, "--limit is 0; it counts from 1"),
        ({"template": "no field"}, ConfigError, "it must have {text}, once and alone"),
        ({"template": "{text"}, ConfigError, "is not a format string"),
        ({"pooling": ("pooler",), "layers": "1"}, ConfigError, "pooler exists at the last layer"),
        ({"model": "no-such-model"}, LLMEmbedError, "model 'no-such-model' does not exist"),
        ({"dataset": "nowhere.csv"}, LLMEmbedError, "data set 'nowhere.csv' does not exist"),
        ({"text_column": "txt"}, LLMEmbedError, "did you mean 'text'?"),
    ],
)
def test_a_bad_request_writes_nothing(
    config: Any, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A request that cannot be served ends in one sentence before the cache exists."""
    with pytest.raises(error, match=re.escape(message)):
        extract(config(**changes))
    assert not (tmp_path / "toy.zarr").exists()


def test_no_room_for_the_plan_writes_nothing(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little free space is found before the first byte."""
    monkeypatch.setattr(CacheWriter, "free_bytes", property(lambda self: 1000))
    with pytest.raises(CacheSpaceError, match=r"but 0\.000 GB are free"):
        extract(config())
    assert not (tmp_path / "toy.zarr").exists()


def test_an_overflow_names_row_layer_and_remedy(config: Any, llama: Path, tmp_path: Path) -> None:
    """A feature beyond float16 is refused; --dtype float32 stores it."""
    import shutil

    import safetensors.torch

    shutil.copytree(llama, tmp_path / "huge")
    tensors = safetensors.torch.load_file(tmp_path / "huge" / "model.safetensors")
    tensors["layers.0.mlp.down_proj.weight"] *= 1e6
    safetensors.torch.save_file(
        tensors, tmp_path / "huge" / "model.safetensors", metadata={"format": "pt"}
    )
    message = r"split 'train', row \d+, layer 1, pooling mean: .* Pass --dtype float32"
    with pytest.warns(LLMEmbedWarning, match=message), pytest.raises(RowError, match=message):
        extract(config(model=str(tmp_path / "huge"), layers="1"))
    path = extract(config(model=str(tmp_path / "huge"), layers="1", dtype="float32")).path
    assert open_cache(path)["train"].features(1).dtype == np.float32


def test_a_dry_run_measures_and_writes_nothing(config: Any, tmp_path: Path) -> None:
    """The plan counts rows, tokens, truncated texts and bytes, and leaves no file."""
    from llmembed.extract.dry_run import plan_extraction

    plan = plan_extraction(config(layers="2", dry_run=True))
    assert (plan.n_rows_missing, plan.n_layers_run, plan.n_layers) == (150, 2, 3)
    assert plan.tokens["max"] == 16
    assert plan.n_truncated > 0
    assert plan.size_bytes > 150 * 16 * 2
    assert plan.tokens_per_s > 0
    assert "2 of 3 blocks are run" in plan.describe()
    assert not (tmp_path / "toy.zarr").exists()
