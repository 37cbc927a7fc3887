"""A backbone whose blocks lie on several devices.

Here is no GPU: accelerate lays blocks on the disk instead, by the same hooks. What only several
GPUs can show, that everything is moved from one to the next, is not shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from toy_model import toy_texts

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
        return load(*arguments, **options)

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
