"""What computed the features of a cache is recorded, and another one says so."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from toy_cache import tree
from zoo import N_LAYERS, ZOO, save_animal

from llmembed.cache_format import open_cache
from llmembed.common.errors import LLMEmbedWarning, ModelError
from llmembed.extract import ExtractConfig, Extractor, extract
from llmembed.extract.backbones.load import attention_of, load_backbone, read_shape
from llmembed.extract.backbones.models import find_model
from llmembed.extract.backbones.recipe import Recipe

HERE = {name: version(name).partition("+")[0] for name in ("torch", "transformers")}


def recorded(path: Path | str) -> dict[str, Any]:
    return dict(open_cache(str(path)).sources["toy-llama"].recipe)


def made_with(record: dict[str, Any], **others: str | None) -> dict[str, Any]:
    """Change what a recipe says of versions; None leaves a key out, as older caches do."""
    return {key: value for key, value in (record | others).items() if value is not None}


def test_a_cache_tells_what_computed_it(settings: dict[str, Any], tmp_path: Path) -> None:
    """Versions without their build, and the attention of the model; the fingerprint has neither."""
    extract(ExtractConfig(**settings, cache=str(tmp_path / "c.zarr")))
    record = recorded(tmp_path / "c.zarr")
    assert {name: record[name] for name in HERE} == HERE
    assert record["attention"] == "sdpa"
    identity = Recipe.from_record(record).fingerprint
    assert identity == dict(open_cache(str(tmp_path / "c.zarr")).sources["toy-llama"].fingerprint)
    assert not {"torch", "transformers", "attention"} & identity.keys()


@pytest.mark.parametrize("name", ZOO)
def test_the_attention_is_that_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    """It is known before the weights are read, for every architecture."""
    files = find_model(str(save_animal(name, tmp_path)))
    shape, cpu = read_shape(files), torch.device("cpu")
    backbone = load_backbone(files, shape, n_kept=N_LAYERS, device=cpu, compute_dtype=torch.float32)
    config: Any = backbone.model.config
    assert attention_of(shape) == config._attn_implementation


def test_other_versions_are_told_in_one_sentence(llama: Path) -> None:
    """Whoever computes new features beside older ones is told what differs, and nothing else."""
    options: dict[str, Any] = {"layers": [1], "poolings": ["mean"], "device": "cpu"}
    recipe = Recipe(model=str(llama), max_length=16, compute_dtype="float32", dtype="float32")
    older = made_with(recipe.record, transformers="5.17.0", attention="eager")
    message = (
        r"^features of toy-llama were made with transformers 5\.17\.0 \(here "
        rf"{HERE['transformers']}\), attention eager \(here sdpa\): new ones may differ from them "
        r"beyond rounding\. Install those versions, or compare by llmembed-cache verify --model\.$"
    )
    with pytest.warns(LLMEmbedWarning, match=message) as caught:
        Extractor(older, **options)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Extractor(recipe.record, **options)
        Extractor(
            made_with(recipe.record, torch=None, transformers=None, attention=None), **options
        )


def test_a_recorded_version_of_another_type_is_refused(llama: Path) -> None:
    """A record is checked whole."""
    recipe = Recipe(model=str(llama), max_length=16, compute_dtype="float32", dtype="float32")
    with pytest.raises(ModelError, match="cannot be read: its torch is of another type"):
        Recipe.from_record(recipe.record | {"torch": 2})


@pytest.mark.parametrize("older", [{"transformers": "5.17.0"}, {"transformers": None}])
def test_a_resumed_cache_keeps_what_began_it(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    older: dict[str, str | None],
) -> None:
    """Another version is not refused: one note, the first record stays, and so do all other bytes.

    A cache of before has no versions, and gets none.
    """
    cache, record = str(tmp_path / "c.zarr"), Recipe.record.fget  # type: ignore[attr-defined]
    if older["transformers"] is None:
        older = dict.fromkeys(("torch", "transformers", "attention"))
    first = settings | {"layers": "1"}
    with monkeypatch.context() as then:
        then.setattr(Recipe, "record", property(lambda self: made_with(record(self), **older)))
        extract(ExtractConfig(**first, cache=cache))
        before = recorded(cache)
        extract(ExtractConfig(**settings, cache=str(tmp_path / "then.zarr")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        extract(ExtractConfig(**settings, cache=cache))
    told = [str(one.message) for one in caught if issubclass(one.category, LLMEmbedWarning)]
    assert len(told) == bool(older.get("transformers"))
    assert all("were made with transformers 5.17.0 (here " in one for one in told)
    assert recorded(cache) == before
    resumed, at_once = tree(Path(cache)), tree(tmp_path / "then.zarr")
    commits = ".llmembed/commits"  # one record for each layer here, one for both there
    for files in (resumed, at_once):
        for name in [name for name in files if commits in name]:
            del files[name]
    assert resumed == at_once


def test_transformers_is_the_one_that_is_imported() -> None:
    """What the package's metadata says is what runs."""
    assert {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
    } == HERE
