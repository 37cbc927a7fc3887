from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from llmembed.common.errors import ConfigError, LLMEmbedError, ModelError, ModelNotFoundError
from llmembed.common.regular import open_regular
from llmembed.extract import register_model
from llmembed.extract.backbones import models
from llmembed.extract.backbones.load import as_safetensors, read_shape, resolve_device
from llmembed.extract.backbones.models import MODELS, find_model, hash_files
from llmembed.extract.backbones.recipe import Recipe


def recipe(folder: Path, max_length: int = 16) -> Recipe:
    return Recipe(
        model=str(folder), max_length=max_length, compute_dtype="float32", dtype="float16"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("llama2", "model 'llama2' does not exist; did you mean 'llama2-7b'?"),
        ("llama2-7b", "model 'meta-llama/Llama-2-7b-hf' is not on this machine"),
        ("some/where", "model 'some/where' is not on this machine"),
        ("./mymodel", "model './mymodel' does not exist: there is no such folder or file here."),
        ("../mymodel", "model '../mymodel' does not exist: there is no such folder or file here."),
        ("/no/model", "model '/no/model' does not exist: there is no such folder or file here."),
        ("~/no-model", "model '~/no-model' does not exist: there is no such folder or file here."),
    ],
)
def test_a_model_that_is_not_there_says_how_to_get_it(model: str, message: str) -> None:
    """Unknown aliases and an unreachable Hub each end in one sentence."""
    with pytest.raises(ModelNotFoundError, match=re.escape(message)):
        find_model(model)


def test_an_alias_of_one_s_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `register_model` names is looked for where it says."""
    monkeypatch.setattr(MODELS, "_specs", dict(MODELS._specs))
    register_model("ours", "some/where", package="some-where==1")
    with pytest.raises(ModelNotFoundError, match=r"model 'some/where' is .* some-where==1\)"):
        find_model("ours")


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    """A folder with only pytorch_model.bin is refused."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="no safetensors and no GGUF file"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_with_a_fifo_is_refused_at_once(llama: Path, tmp_path: Path, name: str) -> None:
    """No file of a model can make a command wait, nor one that is a device be read without end."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=rf"{name} is a FIFO, not a regular file"):
        find_model(str(folder))
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"zero\.gguf is a device, not a regular file"):
        find_model(str(tmp_path / "zero.gguf"))


def test_a_folder_with_two_gguf_files_is_ambiguous(tmp_path: Path) -> None:
    """One must be named."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match="2 GGUF files"):
        find_model(str(tmp_path))
    assert find_model(str(tmp_path / "a.gguf")).gguf == "a.gguf"


def test_a_damaged_gguf_file_is_named(tmp_path: Path) -> None:
    """A GGUF file that cannot be read is an error, and leaves no half conversion."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ModelError, match=r"a\.gguf cannot be read as a GGUF model"):
        as_safetensors(find_model(str(tmp_path)))


def test_the_weights_hash_follows_the_content(llama: Path, tmp_path: Path) -> None:
    """A copy has the same hash; one changed byte gives another."""
    shutil.copytree(llama, tmp_path / "copy")
    copy = tmp_path / "copy" / "model.safetensors"
    before = hash_files([copy])
    assert before == hash_files([llama / "model.safetensors"])
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert hash_files([copy]) != before


def test_weights_are_hashed_where_nothing_can_be_remembered(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a place for notes the hash is the same, and it is said that it is not kept."""
    files = find_model(str(llama)).weight_files
    expected = hash_files(files)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "file"))
    with caplog.at_level("INFO"):
        assert hash_files(files) == expected
    assert "is not remembered in" in caplog.text


def test_a_longer_text_than_positions_is_cut_with_a_warning(llama: Path) -> None:
    """max_length beyond the model's positions is lowered, and both numbers are said."""
    with pytest.warns(UserWarning, match="max-length 512 is more than .* cut at 64 tokens"):
        assert recipe(llama, max_length=512).within_positions().max_length == 64


def test_missing_weights_are_named(llama: Path, tmp_path: Path) -> None:
    """A tensor that the file lacks is an error, never a random one."""
    import safetensors.torch

    folder = tmp_path / "broken"
    shutil.copytree(llama, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    from llmembed.extract.features.extractor import Extractor

    with pytest.raises(ModelError, match=r"lack 'layers\.1\.mlp\.up_proj\.weight'"):
        Extractor(recipe(folder), layers=[2], poolings=["mean"])
    assert Extractor(recipe(folder), layers=[1], poolings=["mean"]).features(["w1"])


def test_truncated_weights_are_named(llama: Path, tmp_path: Path) -> None:
    """A weights file that is cut short is an error with its folder."""
    from llmembed.extract.features.extractor import Extractor

    shutil.copytree(llama, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"the weights of cut in .* cannot be loaded"):
        Extractor(recipe(tmp_path / "cut"), layers=[2], poolings=["mean"])


def test_a_tokenizer_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    """A token that the model does not know is found before any text is run."""
    import json

    shutil.copytree(llama, tmp_path / "mixed")
    tokenizer = tmp_path / "mixed" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"]["extra"] = 96
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="has token 96, but the model knows 96 tokens"):
        _ = recipe(tmp_path / "mixed").tokenizer


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    """T5 and its kind have no single stack of layers."""
    import transformers

    transformers.T5Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\)"):
        read_shape(find_model(str(tmp_path)))


def test_a_device_that_is_not_there_is_refused() -> None:
    """The devices of this machine are listed."""
    with pytest.raises(ConfigError, match=r"device 'cuda:77' does not exist.*Known: auto, cpu"):
        resolve_device("cuda:77")


@pytest.mark.real
def test_the_packaged_models_have_their_published_shape() -> None:
    """The aliases resolve to the packages' files: SmolLM2 as GGUF, MiniLM as a BERT folder."""
    assert find_model("smollm2-135m").gguf == "SmolLM2-135M-Instruct.Q4_1.gguf"
    shape = read_shape(find_model("minilm"))
    assert (shape.n_layers, shape.hidden_size, shape.max_positions) == (6, 384, 512)


@pytest.mark.real
@pytest.mark.slow
def test_a_gguf_model_is_converted_once_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    """No bar is drawn into a log, and transformers' own is there again afterwards."""
    from transformers import modeling_gguf_pytorch_utils as gguf

    bar = gguf.tqdm
    converted = as_safetensors(find_model("smollm2-135m"))
    assert converted.weight_files
    assert "%|" not in capfd.readouterr().err
    assert gguf.tqdm is bar


def by_hand(paths: list[Path]) -> str:
    total = xxhash.xxh3_128()
    for path in paths:
        total.update(f"{path.name}\0{xxhash.xxh3_128_hexdigest(path.read_bytes())}\0".encode())
    return total.hexdigest()


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Files of which some are longer than one read, some equal and one empty."""
    paths = [tmp_path / f"model-{index}.safetensors" for index in range(6)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index % 2]) * (index * 3_000_000))
    return paths


def test_shards_are_hashed_in_their_order(shards: list[Path]) -> None:
    """Several at a time, new and remembered ones together, give the hash of one after another."""
    expected = by_hand(shards)
    hash_files(shards[1:4])
    assert hash_files(shards) == expected
    assert hash_files(shards) == expected  # all are remembered
    assert hash_files(shards[::-1]) == by_hand(shards[::-1]) != expected


def test_shards_are_read_at_the_same_time(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shard waits until another is done: each is open before any is read."""
    all_open = threading.Barrier(3, timeout=60)

    @contextlib.contextmanager
    def opened(path: Path, error: type[LLMEmbedError]) -> Iterator[Any]:
        with open_regular(path, error) as file:
            all_open.wait()
            yield file

    monkeypatch.setattr(models, "open_regular", opened)
    assert hash_files(shards[:3]) == by_hand(shards[:3])


def test_hashing_large_weights_is_told(
    shards: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A log has a line before and after, where the command shows what is going on; once."""
    hash_files(shards[:3])
    monkeypatch.setattr(models, "LARGE_BYTES", 10_000_000)
    with caplog.at_level("INFO", logger="llmembed"):
        for _ in range(2):
            hash_files(shards)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "hashing weights, once: 0 of 36 MB"
    assert told[-1].startswith("hashing weights, once: 36 of 36 MB in 0:0")
    assert len([line for line in told if " 0 of " in line]) == 1
    with caplog.at_level("WARNING", logger="llmembed"):
        shards[5].write_bytes(b"2" * 12_000_000)
        hash_files(shards)
    assert capsys.readouterr().err == ""
