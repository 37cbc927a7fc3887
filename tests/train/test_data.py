from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clustered import MakeCache, clustered, load, source_info, text_hash, write_split
from hypothesis import given
from hypothesis import strategies as st

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.common.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheSpaceError,
    ConfigError,
    DataError,
    LLMEmbedWarning,
)
from llmembed.train import fit
from llmembed.train.config import FitConfig
from llmembed.train.fusions.classifier import Standardiser
from llmembed.train.inputs import data as data_module
from llmembed.train.inputs.data import FeatureBatches, _check_finite, make_room
from llmembed.train.inputs.select import Feature
from llmembed.train.inputs.shares import draw_stratified


def test_features_stand_side_by_side_and_standardised(make_cache: MakeCache) -> None:
    """Columns are the layers in order; the training share has mean 0 and deviation 1."""
    cache = make_cache()
    data = load(FitConfig(cache=str(cache)))
    assert [feature.layer for feature in data.features] == [1, 2]
    share = data.x[torch.from_numpy(data.shares.train)]
    torch.testing.assert_close(share.mean(dim=0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(share.std(dim=0, correction=0), torch.ones(32), atol=1e-4, rtol=0)
    raw = np.hstack([open_cache(cache)["test"].features(layer) for layer in (1, 2)])
    expected = data.standardiser(torch.from_numpy(raw.astype(np.float32)))
    torch.testing.assert_close(data.x_eval, expected)


def test_a_constant_column_becomes_zero() -> None:
    """A column without variance gives 0, not a division by zero."""
    x = torch.full((4, 1), 1000.1)
    assert Standardiser.of(x, torch.arange(4)).apply_(x).abs().max() < 1e-3


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 0.9), st.integers(0, 99))
def test_a_stratified_draw(labels: list[int], fraction: float, seed: int) -> None:
    """Kept and drawn divide the rows; each class keeps one example and gives about its share."""
    classes, rows = np.array(labels), np.arange(len(labels))
    kept, drawn = draw_stratified(classes, rows, fraction, np.random.default_rng(seed))
    assert sorted([*kept, *drawn]) == rows.tolist()
    assert set(classes[kept]) == set(labels)
    for label in set(labels):
        quota = fraction * labels.count(label)
        assert abs((classes[drawn] == label).sum() - quota) <= 1


def test_batches_cover_each_row_once_in_a_new_order(make_cache: MakeCache) -> None:
    """Each pass yields every row once; two passes differ in order."""
    data = load(FitConfig(cache=str(make_cache())))
    data = dataclasses.replace(data, y=torch.arange(90))
    rows, seeds = np.arange(10), iter(range(2))
    batches = FeatureBatches(data, rows, 4, torch.device("cpu"), lambda: next(seeds))
    passes = [torch.cat([batch.y for batch in batches]).tolist() for _ in range(2)]
    assert len(batches) == 3
    assert [sorted(rows) for rows in passes] == [list(range(10))] * 2
    assert passes[0] != passes[1]


def test_without_another_split_a_tenth_is_held_out(make_cache: MakeCache) -> None:
    """With only a training split, a tenth of it is held out, trained on by nothing."""
    data = load(FitConfig(cache=str(make_cache({"train": clustered(90, 0)}))))
    shares = data.shares
    assert len(shares.eval) == 9
    assert not set(shares.eval) & {*shares.train, *shares.validation}
    assert shares.record()["eval"]["split"] == "train (10% held out)"


def test_unlabelled_rows_are_left_out_and_counted(
    make_cache: MakeCache,
) -> None:
    """Rows without a label train nothing, and a warning counts them."""
    features, labels = clustered(90, 0)
    labels[:5] = -1
    cache = make_cache({"train": (features, labels), "test": clustered(30, 1)})
    with pytest.warns(LLMEmbedWarning, match="split 'train': 5 of 90 rows have no label and are"):
        data = load(FitConfig(cache=str(cache)))
    assert min(data.shares.train.min(), data.shares.validation.min()) >= 5


def test_a_class_with_one_example_is_kept_for_training(
    make_cache: MakeCache,
) -> None:
    """A class with one example stays in the training share, and a warning names it."""
    features, labels = clustered(60, 0, n_classes=2)
    labels[7] = 2
    cache = make_cache({"train": (features, labels), "test": clustered(30, 1)})
    with pytest.warns(LLMEmbedWarning, match="1 classes have one training example.*trade"):
        data = load(FitConfig(cache=str(cache)))
    assert 7 in data.shares.train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "7"}, r"layer 7 is not in split 'train'.*holds tiny \(of 6 layers\): 1, 2"),
        ({"layers": "-1"}, r"layer -1 is not in split 'train'"),
        ({"layers": "last:3"}, r"layer last:3 is not in split 'train'"),
        ({"layers": "one"}, "--layers has 'one', which is no layer"),
        ({"source": ("tinny",)}, "source 'tinny' does not exist; did you mean 'tiny'"),
        ({"pooling": ("meen",)}, "pooling 'meen' does not exist; did you mean 'mean'"),
        ({"pooling": ("max",)}, "Known: mean. Pass one to --pooling, or add the pooling with llm"),
        ({"eval_split": "tset"}, "split 'tset' does not exist; did you mean 'test'"),
        ({"eval_split": "train"}, "--eval-split train would evaluate on the rows"),
        ({"val_fraction": 0.001}, "a validation share of 0.001 of 90 examples is empty"),
    ],
)
def test_options_that_do_not_fit_the_cache(
    make_cache: MakeCache, options: dict[str, object], message: str
) -> None:
    """What the cache does not have is refused with what it has."""
    cache = str(make_cache())
    with pytest.raises(ConfigError, match=message):
        load(FitConfig(cache=cache, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (
            ("train",),
            {"eval_split": "foo"},
            r"^--eval-split foo is not in .*, which has train alone\. Leave it out, and 10% of t",
        ),
        (("part1", "part2"), {}, r"split 'train' does not exist.*part1, part2\..* to train\.csv"),
    ],
)
def test_splits_that_the_cache_lacks(
    make_cache: MakeCache, splits: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    """Without a training split, or any beside it, the way out is told."""
    cache = make_cache({split: clustered(30, seed) for seed, split in enumerate(splits)})
    with pytest.raises(ConfigError, match=message):
        load(FitConfig(cache=str(cache), **options))


def test_one_class_is_refused(make_cache: MakeCache) -> None:
    """A training split of one class is refused by the name of that class."""
    cache = make_cache({"train": clustered(30, 0, n_classes=1)})
    with pytest.raises(DataError, match="all 27 training rows have the class 'earn'"):
        load(FitConfig(cache=str(cache)))


def test_a_split_without_labels_is_refused(make_cache: MakeCache) -> None:
    """A split in which no row has a label can't be fitted."""
    features, labels = clustered(30, 0)
    cache = make_cache({"train": (features, np.full_like(labels, -1))})
    with pytest.raises(DataError, match="none of the 30 rows of split 'train' has a label"):
        load(FitConfig(cache=str(cache)))


def test_an_incomplete_cache_is_refused(make_cache: MakeCache) -> None:
    """A split whose extraction was not finished is refused, not read as far as it goes."""
    splits = {"train": clustered(300, 0), "test": clustered(30, 1)}
    cache = make_cache(splits, finish=False)
    with pytest.raises(CacheIncompleteError, match=r"44 of 300 rows of train.tiny.*not committed"):
        load(FitConfig(cache=str(cache)))


def test_features_that_are_not_finite_are_refused(make_cache: MakeCache) -> None:
    """NaN features are named by layer, split and row."""
    split = open_cache(make_cache())["train"]
    x = np.zeros((3, 16), dtype=np.float32)
    x[1:] = np.nan
    feature, rows = Feature("tiny", "mean", 1, 16), np.array([2, 4, 6])
    with pytest.raises(DataError, match=r"2 rows of layer 1 \(tiny, mean\).*the first is row 4"):
        _check_finite(x, feature, split, rows)


@pytest.mark.parametrize("options", [{"head": "auto"}, {"head": "mlp", "epochs": 2}])
def test_features_beyond_the_memory_limit(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """A split that exceeds the limit is trained from a file, to the same weights bit for bit."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "spilled"))
    monkeypatch.setattr(data_module, "_BLOCK_ROWS", 64)
    (tmp_path / "spilled").mkdir()
    features, labels = clustered(300, 0)
    labels[7] = -1
    cache = str(make_cache({"train": (features, labels), "test": clustered(70, 1)}))
    runs = []
    for memory_gb in (1, 1e-6):
        config = FitConfig(
            cache=cache,
            fusion="concat",
            memory_gb=memory_gb,
            output=str(tmp_path / str(memory_gb)),
            **options,
        )
        with pytest.warns(LLMEmbedWarning, match="1 of 300 rows have no label"):
            runs.append(fit(config))
        assert list((tmp_path / "spilled").iterdir()) == []
    weights = [run.classifier.state_dict() for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert runs[0].metrics["per_seed"] == runs[1].metrics["per_seed"]


def test_what_is_spilled_lies_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit the room is a mapped file without a name; within it, it is memory."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    rooms = []
    for memory_gb, is_mapped in ((16e-6, False), (15e-6, True)):
        rooms.append(make_room(1000, 4, memory_gb))
        assert rooms[-1].shape == (1000, 4)
        assert list(tmp_path.iterdir()) == []
        if sys.platform == "linux":
            maps = Path("/proc/self/maps").read_text(encoding="utf-8")
            assert (f"{tmp_path}/" in maps) == is_mapped


def test_no_room_for_what_is_spilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that fit neither memory nor disk are refused; more than half the memory warns."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(CacheSpaceError, match=r"that exceed the memory limit \(.*: No space left"):
        make_room(1 << 40, 1 << 20, memory_gb=1)
    monkeypatch.setattr(data_module, "memory_limit", lambda: 10.0)
    with pytest.warns(LLMEmbedWarning, match="more than half of the memory"):
        make_room(10, 10, None)


def test_batches_come_to_the_device(make_cache: MakeCache) -> None:
    """Rows that do not lie on the device are moved to it batch by batch."""
    data = load(FitConfig(cache=str(make_cache())))
    batches = FeatureBatches(data, np.arange(6), 4, torch.device("meta"))
    assert [(one.x.device.type, len(one.y)) for one in batches] == [("meta", 4), ("meta", 2)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_flipped_bit_stops_the_fit(make_cache: MakeCache, split: str) -> None:
    """Features are hashed as they are read: a flipped bit is an error that names the chunk."""
    cache = make_cache()
    chunk = cache / split / "tiny" / "mean" / "layer_002" / "c.0.0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CacheCorruptError, match=f"{split}/tiny/mean/layer_002"):
        load(FitConfig(cache=str(cache)))


def test_a_text_in_both_splits_is_counted(make_cache: MakeCache) -> None:
    """Evaluation rows whose text is trained on are counted in a warning, and evaluated."""
    cache = make_cache({"train": clustered(90, 0)})
    with CacheWriter(cache, dataset=open_cache(cache).dataset) as writer:
        writer.add_source(source_info("tiny", 16))
        features, labels = clustered(30, 1)
        hashes = np.concatenate([text_hash("train", 4), text_hash("test", 26)])
        write_split(writer, "test", "tiny", features, labels, hashes=hashes)
    with pytest.warns(LLMEmbedWarning, match="4 of 30 evaluation rows have a text that also"):
        data = load(FitConfig(cache=str(cache)))
    assert len(data.shares.eval) == 30


def test_sources_of_different_widths_stand_side_by_side(make_cache: MakeCache) -> None:
    """Two sources of widths 16 and 8 give 2 * 16 + 2 * 8 columns."""
    cache = make_cache()
    with CacheWriter(cache, dataset=open_cache(cache).dataset) as writer:
        writer.add_source(source_info("small", 8))
        for split, (n, seed) in {"train": (90, 0), "test": (60, 1)}.items():
            features, labels = clustered(n, seed)
            write_split(writer, split, "small", features[:, :, :8], labels)
    data = load(FitConfig(cache=str(cache)))
    assert data.x.shape == (90, 48)
    only = load(FitConfig(cache=str(cache), source=("small",), layers="last:1"))
    assert [(f.source, f.layer) for f in only.features] == [("small", 2)]
