"""A run whose backbone was moved, and how often a backbone is loaded."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy_model import save_toy_model, toy_texts

from llmembed.cache_format import open_cache
from llmembed.common.errors import (
    ConfigError,
    LLMEmbedWarning,
    ModelError,
    ModelNotFoundError,
)
from llmembed.extract import ExtractConfig, Extraction, extract
from llmembed.extract.backbones import load
from llmembed.extract.features import extractor
from llmembed.train import FitConfig, Run, fit, load_run
from llmembed.train.cli.predict import predict_main
from llmembed.train.runs import predict


def invoke(run: Run, *options: str) -> Any:
    return CliRunner().invoke(predict_main, ["--run", str(run.path), *options])


def extract_toy(model: str, layers: str, cache: Path) -> Extraction:
    rows = "".join(f"{text},{('a', 'b')[k % 2]}\n" for k, text in enumerate(toy_texts(60)))
    dataset = cache.parent / "toy.csv"
    dataset.write_text(f"text,label\n{rows}")
    return extract(
        ExtractConfig(
            model=model,
            layers=layers,
            dataset=str(dataset),
            cache=str(cache),
            max_length=64,
            compute_dtype="float32",
        )
    )


@pytest.fixture
def relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run made by relative paths in the folder `work`, seen from the folder `elsewhere`."""
    for name in ("work", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    save_toy_model(Path("mymodel"))
    extract_toy("mymodel", "2", Path("toy.zarr").absolute())
    fit(FitConfig(cache="toy.zarr", fusion="mean", head="ridge", output="run"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return load_run(tmp_path / "work" / "run")


def test_a_relative_model_is_found_from_elsewhere(relative: Run, tmp_path: Path) -> None:
    """The run knows the whole path, so it predicts from any folder, and the cache is extended."""
    assert relative.config["sources"]["mymodel"]["recipe"]["model"] == str(
        tmp_path / "work" / "mymodel"
    )
    assert relative.predict(["w1 w2"])[0] in relative.labels
    cache = tmp_path / "work" / "toy.zarr"
    before = open_cache(cache).sources["mymodel"].fingerprint
    assert extract_toy("../work/mymodel", "1,2", cache).n_rows_computed == 60
    assert open_cache(cache).sources["mymodel"].fingerprint == before
    assert {layer for _, _, layer in open_cache(cache)["train"].arrays} == {1, 2}


def test_a_moved_model_is_named_and_can_be_told(relative: Run, tmp_path: Path) -> None:
    """What is missing is named with the way out; the same content does, whatever its name."""
    expected = relative.predict_proba(["w1 w2"])
    moved = shutil.move(tmp_path / "work" / "mymodel", tmp_path / "renamed")
    run = load_run(relative.path)
    with pytest.raises(
        ModelNotFoundError,
        match=r"needs the backbone 'mymodel' \(source 'mymodel', weights [0-9a-f]{32}\): its place "
        r"'.*/work/mymodel' does not exist. Where it is now can be told by --model PLACE",
    ):
        run.predict(["w1 w2"])
    np.testing.assert_array_equal(run.predict_proba(["w1 w2"], model=str(moved)), expected)
    result = invoke(run, "--text", "w1 w2", "--model", "../renamed")
    assert result.exit_code == 0, result.stderr
    assert invoke(run, "--text", "w1 w2", "--model", "mymodel=../renamed").exit_code == 0
    assert (
        "its place '../nowhere' does not"
        in invoke(run, "--text", "w1", "--model", "../nowhere").stderr
    )


def test_another_model_in_its_place_is_refused(relative: Run, tmp_path: Path) -> None:
    """A model of other weights is refused with both hashes, whatever its name."""
    other = save_toy_model(tmp_path / "mymodel", intermediate_size=48)
    with pytest.raises(
        ModelError, match=r"has weights '\w{32}', but the features .* with '\w{32}'"
    ):
        relative.predict(["w1"], model=str(other))


def test_of_several_sources_the_moved_one_is_named(texts_run: Run, tmp_path: Path) -> None:
    """One place for two sources is refused; a source has its place by name, the other its own."""
    place = texts_run.config["sources"]["toy-bert"]["recipe"]["model"]
    copied = shutil.copytree(place, tmp_path / "copied")
    with pytest.raises(ConfigError, match=r"has the sources toy-bert, toy-llama.*toy-bert=PLACE"):
        texts_run.predict(["w1"], model=str(copied))
    with pytest.raises(ConfigError, match="source 'toy-brt' does not exist; did you mean 'toy-ber"):
        texts_run.predict(["w1"], model={"toy-brt": "x"})
    expected = texts_run.predict(["w1"])
    assert texts_run.predict(["w1"], model={"toy-bert": str(copied)}) == expected
    assert invoke(texts_run, "--text", "w1", "--model", f"toy-bert={copied}").exit_code == 0
    result = invoke(texts_run, "--text", "w1", "--model", "x", "--model", "toy-bert=y")
    assert result.exit_code == 1
    assert "--model is given 2 places, not each for one source" in result.stderr


@pytest.fixture
def n_loads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often weights and tokenizers are loaded."""
    counts = {"load_backbone": 0, "load_tokenizer": 0}

    def counted(module: Any, name: str) -> None:
        load = getattr(module, name)

        def count(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return load(*args, **options)

        monkeypatch.setattr(module, name, count)

    counted(extractor, "load_backbone")
    counted(load, "load_tokenizer")
    return counts


def test_a_backbone_is_loaded_once(texts_run: Run, n_loads: dict[str, int]) -> None:
    """Fifty predictions, from several threads too, load each backbone and tokenizer once."""
    run = load_run(texts_run.path)
    expected = run.predict_proba(["w1 w2"])
    threads = [threading.Thread(target=run.predict, args=(["w1 w2"],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(45):
        np.testing.assert_array_equal(run.predict_proba(["w1 w2"], "cpu"), expected)
    assert n_loads == {"load_backbone": 2, "load_tokenizer": 2}


def test_a_loaded_run_is_still_a_value(texts_run: Run) -> None:
    """With its backbones loaded it is pickled, copied and changed as a frozen dataclass is."""
    run = load_run(texts_run.path)
    expected = run.predict_proba(["w1 w2"])
    size = len(pickle.dumps(load_run(texts_run.path)))
    pickled = pickle.dumps(run)
    assert len(pickled) < size + 1_000
    again = (pickle.loads(pickled), copy.deepcopy(run), dataclasses.replace(run))  # noqa: S301
    for one in again:
        np.testing.assert_array_equal(one.predict_proba(["w1 w2"]), expected)
    assert "backbones" not in repr(run)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.path = Path("x")  # type: ignore[misc]


def test_memory_is_freed_with_the_run(texts_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the run holds its backbones."""
    loaded: list[weakref.ref[Any]] = []
    load = extractor.load_backbone

    def watched(*args: Any, **options: Any) -> Any:
        backbone = load(*args, **options)
        loaded.append(weakref.ref(backbone.model))
        return backbone

    monkeypatch.setattr(extractor, "load_backbone", watched)
    run = load_run(texts_run.path)
    run.predict(["w1"])
    gc.collect()
    assert [one() is None for one in loaded] == [False, False]
    del run
    gc.collect()
    assert [one() is None for one in loaded] == [True, True]


@pytest.fixture
def n_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many backbones there were at each load of one, itself included."""
    loaded: list[weakref.ref[Any]] = []
    counts: list[int] = []
    load = extractor.load_backbone

    def watched(*args: Any, **options: Any) -> Any:
        counts.append(1 + sum(one() is not None for one in loaded))
        backbone = load(*args, **options)
        loaded.append(weakref.ref(backbone.model))
        return backbone

    monkeypatch.setattr(extractor, "load_backbone", watched)
    return counts


def test_without_room_for_two_backbones_one_comes_after_the_other(
    texts_run: Run, n_alive: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features of the first wait in memory while it makes room for the second."""
    texts = toy_texts(30)
    expected = load_run(texts_run.path).predict_proba(texts)
    gc.collect()
    monkeypatch.setattr(extractor, "BLOCK_TEXTS", 8)
    monkeypatch.setattr(predict, "_BLOCK_ROWS", 11)
    monkeypatch.setattr(predict, "has_room", lambda _: False)
    run = load_run(texts_run.path)
    n_alive.clear()
    for _ in range(2):
        np.testing.assert_allclose(run.predict_proba(texts), expected, atol=2e-3)
    assert n_alive == [1] * 4


def test_a_backbone_elsewhere_takes_the_place_of_the_one_before(
    texts_run: Run, n_alive: list[int], tmp_path: Path
) -> None:
    """A run holds one backbone a source, whatever places it is told."""
    model = texts_run.config["sources"]["toy-bert"]["recipe"]["model"]
    copied = shutil.copytree(model, tmp_path / "copied")
    run = load_run(texts_run.path)
    expected = run.predict(["w1"])
    assert run.predict(["w1"], model={"toy-bert": str(copied)}) == expected
    assert run.predict(["w1"]) == expected
    assert n_alive == [1, 2, 2, 2]


def test_a_prediction_that_fails_leaves_the_backbones_to_the_next(
    texts_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while somebody holds the error, and with it all that it passed through."""
    run = load_run(texts_run.path)
    monkeypatch.setattr(run.classifier, "forward", lambda x: x.no_such_thing)
    with pytest.raises(AttributeError) as held:
        run.predict(["w1"])
    monkeypatch.undo()
    thread = threading.Thread(target=run.predict, args=(["w1"],), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert held.value.__traceback__ is not None


class Rows(TorchDispatchMode):
    """The most rows of a tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.dim() > 1:
                self.most = max(self.most, len(one))
        return result


def test_features_of_some_thousand_texts_are_held_at_a_time(texts_run: Run) -> None:
    """10,000 short texts go through without a matrix of as many rows, and none is mixed up."""
    texts = [f"w{1 + row % 50} w{1 + row % 7}" for row in range(10_000)]
    run = load_run(texts_run.path)
    with Rows() as rows:
        proba = run.predict_proba(texts)
    assert extractor.BLOCK_TEXTS <= rows.most <= 4096
    some = [0, 4095, 4096, 9_999]
    expected = run.predict_proba([texts[row] for row in some])
    np.testing.assert_allclose(proba[some], expected, atol=2e-3)


def test_cut_and_empty_texts_are_told(texts_run: Run) -> None:
    """A prediction warns as an extraction does, with the counts, in Python and in the command."""
    long = " ".join(["w1"] * 65)
    with pytest.warns(LLMEmbedWarning) as caught:
        texts_run.predict([long, long, "w1", ""])
    assert sorted(str(one.message) for one in caught) == [
        (
            "1 of 4 texts is empty, so there was nothing to read and its label means nothing. "
            "Leave such texts out."
        ),
        "toy-bert: 2 texts were cut at 64 tokens.",
        "toy-llama: 1 empty text got the feature of the lone token '[CLS]'.",
        "toy-llama: 2 texts were cut at 64 tokens.",
    ]
    result = invoke(texts_run, "--text", long)
    assert "warning: toy-bert: 1 text was cut at 64 tokens.\n" in result.stderr
