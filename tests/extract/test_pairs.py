"""Pairs of texts: premise and hypothesis, question and answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from toy_model import toy_texts

from llmembed.cache_format import open_cache
from llmembed.common.errors import ConfigError, DataError
from llmembed.extract import ExtractConfig, Extractor, extract
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus
from llmembed.train.runs.predict import read_input

FIRST, SECOND = toy_texts(24, longest=7), toy_texts(48, longest=4)[24:]


@pytest.fixture
def pairs(write_csv: Any) -> Path:
    """24 pairs, the last of which stands there twice."""
    rows = [*zip(FIRST, SECOND, strict=True), (FIRST[-1], SECOND[-1])]
    path: Path = write_csv(
        "pairs.csv", [",".join(row) for row in rows], header=("premise,hypothesis", "label")
    )
    path.write_text(path.read_text().replace('"', ""))
    return path


def config(model: Path, pairs: Path, **changes: Any) -> ExtractConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "layers": "1,3",
        "dataset": str(pairs),
        "text_column": "premise,hypothesis",
        "cache": str(pairs.with_suffix(".zarr")),
        "max_length": 16,
        "compute_dtype": "float32",
        "dtype": "float32",
    }
    return ExtractConfig(**settings | changes)


def test_pairs_are_joined_as_the_tokenizer_does(bert: Path, pairs: Path) -> None:
    """BERT gets [CLS] a [SEP] b [SEP] with token types, one pair at a time as in any batch."""
    result = extract(config(bert, pairs))
    assert (result.n_rows, result.n_duplicates) == ({"train": 25}, 1)
    features = open_cache(result.path)["train"].features(3, pooling="mean")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    model: Any = transformers.AutoModel.from_pretrained(bert).eval()
    for row, (first, second) in enumerate(zip(FIRST, SECOND, strict=True)):
        inputs = tokenizer(
            first, second, max_length=16, return_token_type_ids=True, return_tensors="pt"
        )
        assert inputs["token_type_ids"].max() == 1
        with torch.inference_mode():
            expected = model(**inputs).last_hidden_state[0].mean(dim=0).numpy()
        error = np.linalg.norm(features[row] - expected) / np.linalg.norm(expected)
        assert error < 1e-5


def test_a_template_places_both_texts(llama: Path, pairs: Path) -> None:
    """With a template a pair is one text, in any order and with words around."""
    source = extract(config(llama, pairs, template="{text_b} w1 {text_a}"))
    features = open_cache(source.path)["train"].features(3, pooling="mean")
    recipe = {**open_cache(source.path).sources["toy-llama"].recipe}
    plain = Extractor(
        recipe | {"template": None, "text_pair": False}, layers=[3], poolings=["mean"]
    ).features([f"{b} w1 {a}" for a, b in zip(FIRST, SECOND, strict=True)])
    np.testing.assert_allclose(features[:24], plain["mean", 3], rtol=1e-4, atol=1e-5)


def test_new_pairs_are_read_as_the_old_ones(bert: Path, pairs: Path) -> None:
    """What prediction reads from two columns is what extraction read; one text alone is refused."""
    texts = read_input(pairs, "premise,hypothesis").texts
    corpus = load_corpus(DatasetOptions(str(pairs), text_column="premise,hypothesis"))
    assert texts == corpus.splits["train"].batch(slice(None))
    path = extract(config(bert, pairs)).path
    recipe = open_cache(path).sources["toy-bert"].recipe
    extractor = Extractor(recipe, layers=[3], poolings=["mean"])
    assert extractor.features(texts[:1])["mean", 3].shape == (1, 16)
    with pytest.raises(DataError, match="text 1 is not a pair"):
        extractor.features([texts[0], "w1 w2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "premise,hypotheses"}, "did you mean 'hypothesis'?"),
        ({"text_column": "a,b,c"}, "--text-column a,b,c names 3 columns. Name one or two."),
        ({"template": "say {text}"}, "does not fit the texts, which are pairs. Give it {text_a}"),
        (
            {"text_column": "premise", "template": "{text_a} {text_b}"},
            "does not fit the texts, which are single. Give it {text}",
        ),
    ],
)
def test_what_does_not_fit_pairs_is_refused(
    llama: Path, pairs: Path, changes: dict[str, Any], message: str
) -> None:
    """Columns that are not there and templates of the other kind end in one sentence."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        extract(config(llama, pairs, **changes))
    assert not pairs.with_suffix(".zarr").exists()


def test_a_text_that_holds_the_separator_is_refused(pairs: Path) -> None:
    """U+001F inside a text would make three of two."""
    lines = pairs.read_text().splitlines()
    lines[4] = lines[4].replace(" ", "\x1f", 1)
    pairs.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"split 'train', row 3: the text holds U\+001F"):
        load_corpus(DatasetOptions(str(pairs), text_column="premise,hypothesis"))
