"""Texts, labels, models and a Hub as people have them: a feature, or one sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from click.testing import CliRunner, Result
from hub_stand_in import HubStandIn
from toy_model import toy_texts

from llmembed.cache_format import open_cache
from llmembed.extract.cli import main
from llmembed.train.cli.fit import fit_main

pytestmark = pytest.mark.usefixtures("own_home")
Extract = Callable[..., Result]


@pytest.fixture
def extract(llama: Path, tmp_path: Path) -> Extract:
    """Extract a data set by the command into `toy.zarr`."""

    def run(dataset: Path | str, *options: str, of: Path = llama, layers: str = "1,3") -> Result:
        arguments = ["--model", str(of), "--layers", layers, "--dataset", str(dataset)]
        place = ["--cache", str(tmp_path / "toy.zarr"), "--max-length", "32", "--pooling", "mean"]
        return CliRunner().invoke(
            main, [*arguments, *place, "--compute-dtype", "float32", *options]
        )

    return run


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def rows_of(texts: Sequence[str], labels: Sequence[object] = ("no", "yes")) -> list[dict[str, Any]]:
    return [{"text": text, "label": labels[n % len(labels)]} for n, text in enumerate(texts)]


def sentence(result: Result) -> str:
    """The one line that the command ends in, with exit code 1."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert last.isprintable()
    return last


TEXTS = {
    "empty": "",
    "blank": " \t\n ",
    "NUL": "w1\0w2",
    "a megabyte": "w1 w2 w3 " * (2**20 // 9),
    "one word of a megabyte": "x" * 2**20,
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202ew1\u202c \u0645\u0631\u062d\u0628\u0627",
    "emoji": "\U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea w1 \u2764\ufe0f",
    "combining": "w1" + "\u0301" * 500,
    "controls": "".join(map(chr, range(1, 32))) + "\x7f\x85\u2028\ufeff\uffff",
    "special tokens": "[CLS] [SEP] [PAD] [MASK] </s> <|endoftext|>",
}


@pytest.mark.fault("63")
def test_any_text_has_a_feature(
    extract: Extract, tmp_path: Path, tries: Callable[[int], None]
) -> None:
    """Each is one row of finite numbers, none of which depends on the texts beside it."""
    texts = [*TEXTS.values(), *toy_texts(20)]
    assert extract(write_rows(tmp_path / "toy.jsonl", rows_of(texts))).exit_code == 0
    found = open_cache(tmp_path / "toy.zarr")["train"].features(3)
    assert found.shape == (len(texts), 16)
    assert np.isfinite(found).all()
    shutil.rmtree(tmp_path / "toy.zarr")
    assert extract(write_rows(tmp_path / "toy.jsonl", rows_of(texts[::-1]))).exit_code == 0
    again = open_cache(tmp_path / "toy.zarr")["train"].features(3)[::-1]
    np.testing.assert_allclose(again.astype(np.float32), found.astype(np.float32), atol=2e-3)
    tries(len(TEXTS))


@pytest.mark.fault("63")
def test_a_lone_surrogate_is_named_with_its_row(extract: Extract, tmp_path: Path) -> None:
    """It is no Unicode, so no model could have read it."""
    path = write_rows(tmp_path / "toy.jsonl", rows_of(["w1", "w2 \ud800", "w3"]))
    assert "row 1" in sentence(extract(path))
    assert not (tmp_path / "toy.zarr").exists()


@pytest.mark.fault("64")
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"text,label\nw1,no\nw2 \xff,yes\n", "line 3: byte 0xff is not UTF-8"),
        ("text,label\nw1,no\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (b'text,label\nw1,no\n"w2,yes\n', "line 3: a quote opens here that nothing closes"),
        (b'text,label\n"say "hi"",no\nw2,yes\n', "line 2: a quoted field has a"),
        (b"text,label\nw1,no,more\nw2,yes\n", "line 2: the number of fields is 3"),
    ],
)
def test_what_a_csv_may_not_hold_names_the_line(
    extract: Extract, tmp_path: Path, content: bytes, expected: str
) -> None:
    """By the command: one sentence, no cache."""
    (tmp_path / "toy.csv").write_bytes(content)
    assert expected in sentence(extract(tmp_path / "toy.csv"))
    assert not (tmp_path / "toy.zarr").exists()


@pytest.mark.fault("64")
def test_one_data_set_in_any_spelling_of_csv_is_the_same_cache(
    extract: Extract, tmp_path: Path
) -> None:
    """A byte-order mark, ends of lines of Windows and needless quotes change nothing."""
    plain = 'text,label\n"w1, ""w2""",no\nw3,yes\n'
    spellings = [plain, "\ufeff" + plain, plain.replace("\n", "\r\n")]
    spellings.append('"text","label"\r\n"w1, ""w2""","no"\r\n"w3","yes"')
    hashes = set()
    for content in spellings:
        (tmp_path / "toy.csv").write_bytes(content.encode())
        assert extract(tmp_path / "toy.csv", "--overwrite").exit_code == 0
        hashes.add(open_cache(tmp_path / "toy.zarr").fingerprint)
    assert len(hashes) == 1


@pytest.mark.fault("65")
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("toy.csv", "text,label,text\nw1,no,w2\n", "the column 'text' more than once"),
        ("toy.csv", "text,label, label\nw1,no,yes\n", "the column 'label' more than once"),
        ("toy.jsonl", '{"text": "w1", "label": 0, "text": "w2"}\n', "has the key 'text' more than"),
    ],
)
def test_a_column_that_stands_twice_is_refused(
    extract: Extract, tmp_path: Path, name: str, content: str, expected: str
) -> None:
    """Which of the two is meant nobody can know."""
    (tmp_path / name).write_text(content)
    assert expected in sentence(extract(tmp_path / name))


@pytest.mark.fault("65")
def test_rows_that_repeat_are_computed_once(extract: Extract, tmp_path: Path) -> None:
    """A text that stands twice, under any label or id, has one feature."""
    rows = [{"id": 7, **row} for row in rows_of(["w1 w2", "w3", "w1 w2", "w1 w2"])]
    assert extract(write_rows(tmp_path / "toy.jsonl", rows)).exit_code == 0
    found = open_cache(tmp_path / "toy.zarr")["train"].features(3)
    assert (found[[0, 0]] == found[[2, 3]]).all()


@pytest.mark.fault("66")
@pytest.mark.parametrize("layers", ["4", "-5", "0:9:0", "1,33", "last:9"])
def test_a_layer_out_of_range_is_told_the_range(
    extract: Extract, tmp_path: Path, layers: str
) -> None:
    """The model's number of layers stands in the sentence, or how layers are written."""
    path = write_rows(tmp_path / "toy.jsonl", rows_of(["w1", "w2"]))
    said = sentence(extract(path, layers=layers))
    assert "which has 3 layers (1-3" in said or "Write numbers (8,16), ranges" in said


@pytest.mark.fault("67")
def test_without_a_pad_token_the_features_are_the_same(
    extract: Extract, llama: Path, tmp_path: Path
) -> None:
    """What fills up a batch is never seen, whatever it is."""
    path = write_rows(tmp_path / "toy.jsonl", rows_of(toy_texts(30)))
    assert extract(path).exit_code == 0
    expected = open_cache(tmp_path / "toy.zarr")["train"].features(3).copy()
    bare = shutil.copytree(llama, tmp_path / "bare")
    for name in ("tokenizer_config.json", "config.json", "special_tokens_map.json"):
        if (bare / name).exists():
            settings = json.loads((bare / name).read_text())
            kept = {key: one for key, one in settings.items() if not key.startswith("pad_token")}
            (bare / name).write_text(json.dumps(kept))
    assert extract(path, "--overwrite", of=bare).exit_code == 0
    found = open_cache(tmp_path / "toy.zarr")["train"].features(3)
    np.testing.assert_array_equal(found, expected)


def _more_words(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"new{n}": 96 + n for n in range(5)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _one_less(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["layers.0.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Marks(folder / "ran")))


class _Marks:
    """Unpickling it makes a folder: what an attacker's code would do."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._place),))


def _code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel"), "evil.Evil")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        pytest.param(_more_words, "the model knows 96 tokens", marks=pytest.mark.fault("68")),
        pytest.param(_cut, "cannot be loaded", marks=pytest.mark.fault("69")),
        pytest.param(_no_weights, "safetensors", marks=pytest.mark.fault("69")),
        pytest.param(
            _one_less, "lack 'layers.0.mlp.up_proj.weight'", marks=pytest.mark.fault("69")
        ),
        pytest.param(_pickled, "safetensors", marks=pytest.mark.fault("61")),
        pytest.param(_code, "--trust-remote-code", marks=pytest.mark.fault("70")),
    ],
)
def test_a_model_that_cannot_be_trusted_is_refused(
    extract: Extract, llama: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    """By the command: one sentence that names what is wrong, no cache, and no code was run."""
    folder = shutil.copytree(llama, tmp_path / "broken")
    damage(folder)
    path = write_rows(tmp_path / "toy.jsonl", rows_of(["w1", "w2"]))
    assert expected in sentence(extract(path, of=folder))
    assert not (folder / "ran").exists()


ASK = """
import sys
from llmembed.common.errors import LLMEmbedError
from llmembed.extract.backbones.models import find_model
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus
from llmembed.train import load_run
for ask in (find_model, lambda name: load_corpus(DatasetOptions(name)), load_run):
    try:
        ask("someone/something")
    except LLMEmbedError as error:
        print(error)
"""


WAYS_OUT = (
    *("HF_TOKEN", "Check the name", "hf auth login", "pass a local folder", "HF_HUB_OFFLINE"),
    *("Run the same again later", "Wait some minutes", "Check the network"),
)


@pytest.mark.slow
@pytest.mark.fault("71")
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, ""),
        (403, "GatedRepo"),
        (404, "RepoNotFound"),
        (429, ""),
        (500, ""),
        (503, ""),
        (407, "proxy"),
        (0, "offline"),
        (0, "unreachable"),
    ],
)
def test_whatever_the_hub_answers_is_one_sentence_with_the_way_out(
    tmp_path: Path, status: int, code: str
) -> None:
    """For a model, a data set and a run: no traceback, no token, and what to do about it."""
    with HubStandIn() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.refusals = [(".*", status, code)]
        environment = os.environ | {
            "HF_ENDPOINT": server.url if code != "unreachable" else "http://127.0.0.1:9",
            "HF_TOKEN": "hf_secret",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1" if code == "offline" else "0",
            "HF_HUB_ETAG_TIMEOUT": "5",
        }
        if code == "proxy":
            environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy"), server.url)
            environment |= {"HF_ENDPOINT": "http://hub.invalid", "NO_PROXY": "", "no_proxy": ""}
        done = subprocess.run(
            [sys.executable, "-Pc", ASK],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    sentences = done.stdout.splitlines()
    assert len(sentences) == 3, done.stdout
    for said in sentences:
        assert "someone/something" in said
        assert any(way in said for way in WAYS_OUT), said
        assert said.endswith(".")
        assert len(said) < 600
    assert "hf_secret" not in done.stdout + done.stderr


LABELS: dict[str, Sequence[Any]] = {
    "words": ("yes", "no"),
    "ints": (7, -1),
    "bools": (True, False),
    "floats": (0.5, 1.5),
    "ints and floats": (1, 2.5),
    "words and ints": ("yes", 1),
    "words and nothing": ("yes", None, "no"),
    "nothing": (None,),
    "lists": (["a"], ["b", "a"]),
    "objects": ({"a": 1}, {"a": 2}),
    "long": ("x" * 5000, "y"),
    "hostile": ("\x1b[2J", "<script>"),
}


REFUSED = {"floats", "ints and floats", "words and ints", "words and nothing", "nothing", "objects"}


@pytest.mark.fault("73", "76")
@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind_are_classes_or_one_sentence(
    extract: Extract, tmp_path: Path, kind: str
) -> None:
    """Each label keeps its rows, as a name; what cannot be a class is refused."""
    values = LABELS[kind]
    rows = rows_of([f"w{n}" for n in range(12)], values)
    result = extract(write_rows(tmp_path / "toy.jsonl", rows))
    if result.exit_code:
        assert kind in REFUSED, result.stderr
        sentence(result)
        return
    cache = open_cache(tmp_path / "toy.zarr")
    split = cache["train"]
    if split.label_sets is not None:
        assert split.label_sets.tolist() == [[1, int(n % 2)] for n in range(12)]
        return
    codes = split.labels.reshape(-1, len(values))
    assert (codes == codes[0]).all()
    assert len(set(codes[0])) == len(values) == len(cache.labels)


@pytest.mark.fault("76")
def test_a_split_without_labels_has_features_alone(extract: Extract, tmp_path: Path) -> None:
    """It is extracted where it is named, and a fit of it says that nothing there has a label."""
    folder = tmp_path / "toy"
    folder.mkdir()
    write_rows(folder / "train.jsonl", rows_of(toy_texts(20)))
    unlabelled = [{"text": text, "label": None} for text in toy_texts(9)]
    write_rows(folder / "more.jsonl", unlabelled)
    assert extract(folder, "--split", "train", "--split", "more").exit_code == 0
    split = open_cache(tmp_path / "toy.zarr")["more"]
    assert (split.labels == -1).all()
    assert np.isfinite(split.features(3)).all()
    arguments = ["--cache", str(tmp_path / "toy.zarr"), "--eval-split", "more"]
    result = CliRunner().invoke(fit_main, [*arguments, "--output", str(tmp_path / "run")])
    assert "9 rows of split 'more' has a label" in sentence(result)
