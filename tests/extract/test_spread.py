"""A backbone whose blocks lie on several devices.

Here is no GPU: accelerate lays blocks on the disk instead, by the same hooks, and the model is told
that they lie on a second one. What only several GPUs can show, that everything is moved from one to
the next, is not shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from toy_model import toy_texts

from llmembed.common.errors import ModelError
from llmembed.extract import ExtractConfig, Extractor
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.pipeline import prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*(cut at 16 tokens|of the lone token)")


@pytest.fixture
def placements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What loading was told of places; "auto" puts the second and third block on the disk."""
    told: list[object] = []
    load = transformers.AutoModel.from_pretrained
    places = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "disk", "layers.2": "disk"}
    places |= {"norm": "cpu", "rotary_emb": "cpu"}

    def placed(*arguments: Any, **options: Any) -> Any:
        told.append(options.get("device_map"))
        if told[-1] == "auto":
            options |= {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}
        model, report = load(*arguments, **options)
        if told[-1] == "auto":
            assert model.hf_device_map == places  # what accelerate says of a real place
            model.hf_device_map = {
                name: at.replace("disk", "cuda:1") for name, at in places.items()
            }
        return model, report

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", placed)
    return told


def test_blocks_elsewhere_give_the_same_features(llama: Path, placements: list[object]) -> None:
    """Every layer and pooling is that of a backbone in one place."""
    recipe = Recipe(model=str(llama), max_length=16, compute_dtype="float32", dtype="float32")
    what: dict[str, Any] = {"layers": range(4), "poolings": ["mean", "last"], "device": "cpu"}
    whole, apart = (Extractor(recipe, **what, all_gpus=all_gpus) for all_gpus in (False, True))
    assert placements == [None, "auto"]
    on = {parameter.device.type for parameter in apart.backbone.blocks.parameters()}
    assert on == {"cpu", "meta"}  # meta: on the disk until it runs
    expected = whole.features(toy_texts(30))
    for name, feature in apart.features(toy_texts(30)).items():
        np.testing.assert_array_equal(feature, expected[name])


def offloading(monkeypatch: pytest.MonkeyPatch, places: dict[str, int | str]) -> None:
    """Let accelerate's own choice of places be this one."""
    load = transformers.AutoModel.from_pretrained

    def placed(*arguments: Any, **options: Any) -> Any:
        model, report = load(*arguments, **options | {"device_map": None})
        model.hf_device_map = places
        return model, report

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", placed)


@pytest.mark.parametrize(
    ("place", "device"), [("cpu", "cuda:0"), ("disk", "cuda:0"), ("disk", "cpu")]
)
def test_a_model_that_the_gpus_do_not_hold_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch, place: str, device: str
) -> None:
    """Layers that would wait on the CPU or the disk are named, with what makes them fit."""
    offloading(monkeypatch, {"layers.0": 0, "layers.1": place, "layers.2": place})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    recipe = Recipe(model=str(llama), max_length=16, compute_dtype="float32", dtype="float32")
    message = (
        r"toy-llama does not fit in the memory of the GPUs that are seen \(2\): 2 parts, such as "
        rf"'layers.1', would lie on the {place}\. .* --quantize nf4 or lower --layers"
    )
    with pytest.raises(ModelError, match=message):
        Extractor(recipe, layers=[3], poolings=["mean"], device=device, all_gpus=True)


@pytest.mark.parametrize(
    ("n_gpus", "place"), [(None, None), (0.5, None), (1.0, None), (2.0, "auto")]
)
def test_a_worker_with_several_gpus_spreads_its_model(
    settings: dict[str, Any],
    tmp_path: Path,
    placements: list[object],
    n_gpus: float | None,
    place: str | None,
) -> None:
    """--gpus-per-worker beyond 1 means one model on all of them."""
    cache = str(tmp_path / "c.zarr")
    config = ExtractConfig(**settings, cache=cache, engine="ray", gpus_per_worker=n_gpus)
    prepare(config).load_extractor((3,))
    assert placements == [place]
