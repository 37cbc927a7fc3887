"""What is read from the disk and kept in memory, and what is refused there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from toy_model import VOCABULARY, toy_tokenizer

from llmembed.common.errors import ModelError
from llmembed.extract.backbones.load import Backbone, load_backbone, load_tokenizer, read_shape
from llmembed.extract.backbones.models import find_model


def load(folder: Path, n_kept: int) -> Backbone:
    files = find_model(str(folder))
    return load_backbone(
        files,
        read_shape(files),
        n_kept=n_kept,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of 12 blocks, 5 MiB each in bfloat16, with its head."""
    folder = tmp_path_factory.mktemp("deep")
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=4,
        dtype="bfloat16",
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    toy_tokenizer(special_tokens=False).save_pretrained(folder)
    return folder


def test_only_the_kept_blocks_are_loaded(deep: Path) -> None:
    """Neither the blocks above the cut nor the language-model head are among the parameters."""
    names = [name for name, _ in load(deep, 3).model.named_parameters()]
    assert {int(name.split(".")[1]) for name in names if name.startswith("layers.")} == {0, 1, 2}
    assert {name for name in names if not name.startswith("layers.")} == {
        "embed_tokens.weight",
        "norm.weight",
    }


def test_loading_large_weights_is_told(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What takes long says what it does, and what does not is silent."""
    with caplog.at_level("INFO", logger="llmembed"):
        load(llama, 2)
        assert not caplog.messages
        monkeypatch.setattr("llmembed.extract.backbones.load.LARGE_BYTES", 1000)
        load(llama, 2)
    assert caplog.messages == ["loading 2 of 3 blocks of toy-llama onto cpu"]


def test_a_damaged_tokenizer_is_named(llama: Path, tmp_path: Path) -> None:
    """A tokenizer.json that is cut short, or of a kind that is not known, ends in one sentence."""
    shutil.copytree(llama, tmp_path / "toy")
    path = tmp_path / "toy" / "tokenizer.json"
    whole = path.read_text()
    unknown = json.loads(whole) | {"model": {"type": "Unheard"}}
    for content in (whole[:-50], json.dumps(unknown)):
        path.write_text(content)
        with pytest.raises(ModelError, match=r"the tokenizer of toy in .* cannot be read"):
            load_tokenizer(find_model(str(tmp_path / "toy")))


def test_a_tokenizer_without_a_fast_form_is_refused(llama: Path, tmp_path: Path) -> None:
    """What a fast tokenizer does can be hashed; ByT5's own Python code cannot."""
    shutil.copytree(llama, tmp_path / "toy", ignore=shutil.ignore_patterns("tokenizer*"))
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "toy")
    with pytest.raises(ModelError, match="has a tokenizer in Python alone"):
        load_tokenizer(find_model(str(tmp_path / "toy")))
