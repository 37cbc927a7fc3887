"""Batches side by side: the same features, in the same order, and no model that cannot bear it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_model import toy_texts
from zoo import Animal, save_animal

from llmembed.extract import Extractor, Recipe
from llmembed.extract.fast.cpu import in_lanes


def extractor(folder: Path, dtype: str = "float32") -> Extractor:
    recipe = Recipe(model=str(folder), max_length=30, compute_dtype=dtype, dtype="float32")
    layers, poolings = [1, 2, 3], ["mean", "last", "max"]
    return Extractor(recipe, layers=layers, poolings=poolings, token_budget=64, device="cpu")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_features_are_those_of_one_batch_after_another(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """Bit for bit, for hundreds of batches of other lengths on four threads."""
    ours, texts = extractor(request.getfixturevalue(kind)), toy_texts(400)
    ours.n_lanes = 1
    alone = ours.features(texts)
    ours.n_lanes = 4
    for name, feature in ours.features(texts).items():
        np.testing.assert_array_equal(feature, alone[name])


def test_a_lone_batch_gets_all_cores(llama: Path) -> None:
    """A single text is computed in the caller's own thread, with all its threads."""
    ours, seen = extractor(llama), []
    ours.n_lanes = 2
    ours.backbone.blocks[0].register_forward_pre_hook(
        lambda *_: seen.append((threading.current_thread(), torch.get_num_threads()))
    )
    ours.features(["w1 w2"])
    assert {*seen} == {(threading.current_thread(), torch.get_num_threads())}
    ours.features(toy_texts(40))
    assert threading.current_thread() not in {thread for thread, _ in seen[2:]}


def test_results_come_in_order_and_errors_at_their_turn() -> None:
    """Whatever ends first; work that has begun is waited for, and cores are given back."""
    ended, n_threads = threading.Event(), torch.get_num_threads()

    def work(item: int) -> int:
        if item == 0:
            assert ended.wait(30)
        if item == 1:
            ended.set()
        if item == 3:
            raise ValueError(item)
        return item

    results = in_lanes(work, range(5), 2, first_alone=False)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
    assert torch.get_num_threads() == n_threads


def test_the_first_can_be_alone() -> None:
    """Nothing is begun before the first item is done and its result was taken."""
    begun: list[int] = []
    results = in_lanes(begun.append, range(3), 2, first_alone=True)
    next(results)
    assert begun == [0]
    list(results)
    assert sorted(begun) == [0, 1, 2]


def test_rotary_positions_that_change_with_the_length_are_not_shared(tmp_path: Path) -> None:
    """Transformers rewrites them inside the model in each pass."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = save_animal("llama", tmp_path, Animal("LlamaConfig", {"rope_parameters": rope}))
    assert not extractor(folder).backbone.shareable


def test_plain_models_are_shared(llama: Path, bert: Path) -> None:
    """A decoder and an encoder may run several batches at once."""
    assert all(extractor(folder).backbone.shareable for folder in (llama, bert))
