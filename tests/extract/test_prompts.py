"""Prompts behind a text: their names, and that each is computed as if it stood there alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from toy_cache import tree
from toy_model import N_LAYERS as N_TOY_LAYERS
from toy_model import save_toy_model, toy_texts, toy_tokenizer
from zoo import N_LAYERS, ZOO, save_animal

from llmembed.cache_format import CacheWriter, SourceInfo, open_cache
from llmembed.cache_format.layout.schema import check_name
from llmembed.cache_format.tools import finalize
from llmembed.common.errors import (
    CacheMismatchError,
    ConfigError,
    ExtractionError,
    RunFormatError,
)
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.dry_run import plan_extraction
from llmembed.extract.features.branches import Branches
from llmembed.extract.features.extractor import Extractor
from llmembed.extract.features.recheck import recheck
from llmembed.extract.texts.prompts import (
    PRESETS,
    check_prompts,
    name_of,
    pooling_of,
    resolve_prompts,
)
from llmembed.train import FitConfig, LLMEmbedClassifier, fit, load_run

TEXTS = ["", *toy_texts(9, longest=14)]
PROMPTS = resolve_prompts(["w3 w4", "w3 w5 w6", "w7 w8", "w3 w4 w9 w10"])
NOT_SHARED = {  # what meets elsewhere than in full attention, or attends by code of its own
    *("mistral-window", "qwen2-window", "qwen3-next", "gemma2", "gemma3", "gpt-oss", "llama4"),
    *("falcon", "falcon-alibi", "bloom", "cohere2", "mamba"),
}
CAUSAL = [name for name in ZOO if not ZOO[name].encoder and name != "llama-bidirectional"]
BOTH_WAYS = [name for name in ZOO if name not in CAUSAL]


def extractor(folder: Path, **changes: Any) -> Extractor:
    recipe = {"max_length": 12, "compute_dtype": "float32", "dtype": "float32"}
    recipe |= {name: changes.pop(name) for name in [*changes] if name in recipe}
    options: dict[str, Any] = {
        "layers": range(N_LAYERS + 1),
        "poolings": ["mean", "last", *map(pooling_of, PROMPTS)],
        "prompts": PROMPTS,
        "token_budget": 96,
        "device": "cpu",
    }
    return Extractor(Recipe(model=str(folder), **recipe), **options | changes)


def last_states(folder: Path, rows: list[list[int]]) -> list[list[np.ndarray]]:
    """Hidden states of each row's last token, alone, `[H]` a layer, by transformers, eagerly."""
    own_code = None if folder.name == "falcon-alibi" else "eager"  # its two ways differ by 2e-3
    model: Any = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=own_code
    ).eval()
    found = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.inference_mode():
            output = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
            states = list(output.hidden_states)
            if model.config.model_type == "mamba":  # tells block 1, ..., n, and n after the norm
                states = [model.get_input_embeddings()(ids), *states[:-2], states[-1]]
        found.append([state[0, -1].double().numpy() for state in states])
    return found


def relative_error(feature: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(feature - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("animal", CAUSAL)
def test_a_prompt_is_that_of_the_text_with_it_alone(animal: str, tmp_path: Path) -> None:
    """Of every causal architecture, each prompt's features agree with transformers to 1e-5."""
    folder = save_animal(animal, tmp_path / animal)
    ours = extractor(folder)
    assert ours.way.prompts_share == (animal not in NOT_SHARED)
    tokenized = ours.tokenize(TEXTS)
    rows, features = tokenized.ids, ours.compute(tokenized)
    assert tokenized.n_truncated, "a text that is cut keeps its prompt"
    for name, prompt in PROMPTS.items():
        suffix = ours.recipe.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        expected = last_states(folder, [[*row, *suffix] for row in rows])
        for row, states in enumerate(expected):
            for layer, state in enumerate(states):
                feature = features[pooling_of(name), layer][row]
                assert relative_error(feature, state) < 1e-5, (prompt, layer, row)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.text(max_size=5))
def test_a_name_is_that_of_the_text(prompt: str, more: str) -> None:
    """Every text has one name, legal in a cache, and another text has another one."""
    check_name("pooling", pooling_of(name_of(prompt)))
    assert (name_of(prompt) == name_of(prompt + more)) == (not more)


def test_sets_and_texts_may_be_mixed() -> None:
    """What several sets share is one prompt, and a blank before a text makes no other of it."""
    found = resolve_prompts(["eol", "general", "In one word:", " In one word:"])
    assert list(found.values()) == [" In one word:", " It was", " This is about", " This is"]
    assert all(resolve_prompts([name]) for name in PRESETS)


def test_auto_names_the_classes() -> None:
    """A few classes are all named; of many the first three."""
    (few,) = resolve_prompts(["auto"], ["world_news", "sports"]).values()
    (many,) = resolve_prompts(["auto"], [f"class {n}" for n in range(20)]).values()
    assert few == " Is it world news or sports? It is"
    assert many == " The category, such as class 0, class 1, class 2, is"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sentimant", r"set of prompts 'sentimant' does not exist; did you mean 'sentiment'\?"),
        ("verdict", r"' verdict', with a blank before it, is a prompt of one"),
        (" ", r"--prompts ' ' is no text\. Pass words that stand behind each text"),
        ("\ud800 x", r"is no text\. Pass words"),
    ],
)
def test_what_is_no_prompt_is_refused(value: str, message: str) -> None:
    """A lone word is a set, known or not; blanks are none."""
    with pytest.raises(ConfigError, match=message):
        ExtractConfig(model="m", layers="1", prompts=(value,))


@pytest.mark.parametrize(("labels", "shown"), [(["0", "1"], "'0', '1'"), ([], "no class")])
def test_auto_needs_names(labels: list[str], shown: str) -> None:
    """Numbers say nothing of what a class is."""
    check_prompts(["auto"])
    with pytest.raises(ConfigError, match=rf"these have none: {shown}\. Pass a set, such as"):
        resolve_prompts(["auto"], labels)


@pytest.mark.parametrize("animal", BOTH_WAYS)
def test_nothing_stands_behind_a_text_that_is_read_both_ways(animal: str, tmp_path: Path) -> None:
    """Encoders refuse prompts, those too that do not say what they are, and name the template."""
    folder = save_animal(animal, tmp_path / animal)
    message = rf"{animal} reads texts in both directions\. Put the prompt around the text by --temp"
    with pytest.raises(ConfigError, match=message):
        extractor(folder, layers=[1])


def test_encoders_are_refused_before_their_weights_are_read(settings: dict[str, Any]) -> None:
    """BERT says in its configuration's classes that it is none."""
    bert = save_toy_model(Path(settings["dataset"]).parent / "toy-bert", "bert")
    config = ExtractConfig(**settings | {"model": str(bert)}, prompts=("w1 w2",), cache="c.zarr")
    (bert / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="toy-bert reads texts in both directions"):
        extract(config)


@pytest.mark.parametrize(
    ("max_length", "prompt", "message"),
    [
        (
            63,
            "w1 w2",
            r"of 2 tokens .* 63 is more than the 64 positions .* --max-length 62 or less",
        ),
        (16, "\n \n", r"prompt '\\n \\n' has no token in the vocabulary of toy-llama"),
    ],
)
def test_a_prompt_needs_tokens_and_room(
    llama: Path, max_length: int, prompt: str, message: str
) -> None:
    """A text of the full length keeps its prompt, so both must have positions."""
    recipe = Recipe(
        model=str(llama), max_length=max_length, compute_dtype="float32", dtype="float32"
    )
    with pytest.raises(ConfigError, match=message):
        recipe.refuse_prompts({"p": prompt})


def test_a_prompt_stands_before_what_closes_a_text(tmp_path: Path) -> None:
    """Where the tokenizer puts a special token at the end, the prompt comes before it."""
    folder = save_toy_model(tmp_path / "closing")
    toy_tokenizer(special_tokens=True).save_pretrained(folder)
    for shares in (True, False):
        ours = extractor(folder, layers=range(1, N_TOY_LAYERS + 1))
        ours._shares = shares
        rows = ours.tokenize(TEXTS)
        assert all(row[-1] == 3 for row in rows.ids)
        features = ours.compute(rows)
        for name, prompt in PROMPTS.items():
            suffix = ours.recipe.suffix(prompt)
            expected = last_states(folder, [[*row[:-1], *suffix] for row in rows.ids])
            for row, states in enumerate(expected):
                for layer in range(1, N_TOY_LAYERS + 1):
                    feature = features[pooling_of(name), layer][row]
                    assert relative_error(feature, states[layer]) < 1e-5


def test_prompts_leave_the_other_features_as_they_are(llama: Path) -> None:
    """Mean and last are those of the text without prompts; prompts may also be asked for alone."""
    layers = range(1, N_TOY_LAYERS + 1)
    ours = extractor(llama, layers=layers)
    tokenized = ours.tokenize(TEXTS)
    both = ours.compute(tokenized)
    plain = extractor(llama, layers=layers, poolings=["mean", "last"]).compute(tokenized)
    poolings = [pooling_of(name) for name in list(PROMPTS)[1:3]]
    few = extractor(llama, layers=layers, poolings=poolings).compute(tokenized)
    assert {pooling for pooling, _ in few} == {*poolings}
    for key, feature in (plain | few).items():
        np.testing.assert_allclose(both[key], feature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_both_ways_give_the_same(llama: Path, dtype: str) -> None:
    """Shared or not, in both arithmetics; `mean_padded`, which reads pads, wants the second way."""
    ours = extractor(llama, layers=[1, 3], compute_dtype=dtype)
    poolings = ["mean_padded", *ours.poolings]
    apart = extractor(llama, layers=[1, 3], compute_dtype=dtype, poolings=poolings)
    assert (ours.way.prompts_share, apart.way.prompts_share) == (True, False)
    tokenized = ours.tokenize(TEXTS)
    found, expected = ours.compute(tokenized), apart.compute(tokenized)
    for key, feature in found.items():
        assert relative_error(feature, expected[key]) < {"bfloat16": 5e-2, "float32": 1e-5}[dtype]


def test_a_wrong_tree_is_found_by_the_first_batch(llama: Path) -> None:
    """If prompts saw each other, nothing would be stored."""
    ours = extractor(llama, layers=[1, 3])
    assert ours._branches is not None
    ours._branches.sees[:] = True
    with pytest.raises(ExtractionError, match=r"pooling last\.w3-.* of the first batch differs by"):
        ours.compute(ours.tokenize(TEXTS))


def test_a_model_that_fails_the_trial_goes_the_plain_way(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not give the same in the trial is not used, and the model is left as it was."""
    monkeypatch.setattr(Branches, "sees", np.ones((7, 7), dtype=bool))
    ours = extractor(llama, layers=[1, 3])
    assert (ours.way.prompts_share, ours.way.attention) == (False, "sdpa")


def test_a_cache_gets_what_it_lacks_of_prompts(settings: dict[str, Any], tmp_path: Path) -> None:
    """Prompts come one after the other or at once, and the texts of all of them are recorded."""
    cache, at_once = str(tmp_path / "c.zarr"), str(tmp_path / "at-once.zarr")
    extract(ExtractConfig(**settings, cache=cache))
    assert "prompts" not in (tmp_path / "c.zarr" / "zarr.json").read_text()
    first = extract(ExtractConfig(**settings, cache=cache, prompts=("w1 w2",)))
    assert first.n_rows_computed == 300
    assert extract(ExtractConfig(**settings, cache=cache, prompts=("w1 w2",))).n_rows_computed == 0
    extract(ExtractConfig(**settings, cache=cache, prompts=("w1 w3",)))
    extract(ExtractConfig(**settings, cache=at_once, prompts=("w1 w3", "w1 w2")))
    one_by_one, together = open_cache(cache), open_cache(at_once)
    prompts = resolve_prompts(["w1 w2", "w1 w3"])
    for found in (one_by_one, together):
        assert found.sources["toy-llama"].prompts == prompts
    assert one_by_one["train"].arrays == together["train"].arrays
    for _, pooling, layer in together["train"].arrays:
        np.testing.assert_allclose(
            one_by_one["train"].features(layer, pooling=pooling).astype(np.float32),
            together["train"].features(layer, pooling=pooling).astype(np.float32),
            rtol=2e-3,
            atol=2e-3,
        )
    rechecked = recheck(cache, model=settings["model"], n_rows=5)
    assert (rechecked.n_arrays, rechecked.differences) == (8, ())


def test_processes_and_a_resumed_one_make_the_same(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Ranks, and workers of --devices, compute prompts of texts that differ as one process does."""
    texts = [f"w{n % 7} w{n % 11} w{n % 13} w{n % 5}" for n in range(200)]
    assert len({*texts}) == 200
    rows = "".join(f"{text},{'ab'[n % 2]}\n" for n, text in enumerate(texts))
    (tmp_path / "texts.csv").write_text(f"text,label\n{rows}")
    settings |= {"prompts": ("w1 w2", "w1 w3"), "dataset": str(tmp_path / "texts.csv")}
    whole = extract(ExtractConfig(**settings, cache=str(tmp_path / "whole.zarr"))).path
    shared = str(tmp_path / "ranks.zarr")
    for rank in range(2):
        extract(ExtractConfig(**settings, cache=shared, rank=rank, world=2))
    finalize(shared)
    workers = extract(
        ExtractConfig(**settings, cache=str(tmp_path / "w.zarr"), device="cpu", devices="2")
    ).path
    expected = tree(Path(whole))
    assert expected == tree(Path(shared)) == tree(Path(workers))


def test_a_plan_counts_the_tokens_of_prompts(settings: dict[str, Any], tmp_path: Path) -> None:
    """Two prompts of two tokens, the first of which they share, are three tokens a text."""
    settings |= {"cache": str(tmp_path / "c.zarr")}
    plain = plan_extraction(ExtractConfig(**settings))
    prompted = plan_extraction(ExtractConfig(**settings, prompts=("w1 w2", "w1 w3")))
    assert prompted.n_tokens == pytest.approx(plain.n_tokens + 3 * 300, abs=1)
    assert prompted.tokens == plain.tokens


def test_a_name_cannot_stand_for_two_prompts(settings: dict[str, Any], tmp_path: Path) -> None:
    """Six digits could be those of two texts; then nothing is written."""
    cache = str(tmp_path / "c.zarr")
    extract(ExtractConfig(**settings, cache=cache, prompts=("w1 w2",)))
    found = open_cache(cache)
    source = found.sources["toy-llama"]
    (name,) = source.prompts
    other = SourceInfo(**vars(source) | {"prompts": {name: " w8"}})
    message = rf"prompt '{name}' of source 'toy-llama' .* is ' w1 w2', but ' w8' was given\. Change"
    with (
        CacheWriter(cache, dataset=found.dataset) as writer,
        pytest.raises(CacheMismatchError, match=message),
    ):
        writer.add_source(other)


def test_a_run_predicts_by_the_prompts_it_was_fitted_on(
    settings: dict[str, Any], write_csv: Any, tmp_path: Path
) -> None:
    """A run carries the prompts it uses, and only those; a new text's features are the cache's."""
    settings |= {"cache": str(tmp_path / "c.zarr"), "prompts": ("w1 w2", "w1 w3")}
    settings |= {"dataset": str(write_csv("own.csv"))}
    extract(ExtractConfig(**settings))
    names = list(resolve_prompts(settings["prompts"]))
    config = FitConfig(
        cache=settings["cache"],
        fusion="concat",
        pooling=(pooling_of(names[1]),),
        output=str(tmp_path / "run"),
        baseline="none",
    )
    run = fit(config)
    record = run.path / "config.json"
    assert names[0] not in record.read_text()
    assert names[1] in record.read_text()
    all_texts = toy_texts(150)
    rows = [row for row, text in enumerate(all_texts) if len(text.split()) <= 16]
    texts = [all_texts[row] for row in rows]
    cache = open_cache(settings["cache"])["train"]
    columns = [cache.features(layer, pooling=config.pooling[0])[rows] for layer in (1, 3)]
    x = torch.from_numpy(np.concatenate(columns, axis=1).astype(np.float32))
    loaded = load_run(run.path)
    with torch.inference_mode():
        expected = loaded.classifier(x).double().softmax(dim=1).numpy()
    np.testing.assert_allclose(loaded.predict_proba(texts), expected, atol=1e-2)
    record.write_text(re.sub(rf'"{names[1]}": " w1 w3"', "", record.read_text()))
    with pytest.raises(RunFormatError, match=rf"pooling 'last\.{names[1]}' does not exist"):
        load_run(run.path).predict(texts)


def test_the_estimator_takes_prompts(llama: Path) -> None:
    """A text, a list or `auto`, made of the classes, are features beside mean and last."""
    texts, classes = toy_texts(40), ["oil", "trade"] * 20
    options: dict[str, Any] = {"layers": "1,3", "max_length": 32, "device": "cpu"}
    for prompts, n in (("w1 w2", 1), (["w1 w2", "w3 w4"], 2), ("auto", 1)):
        ours = LLMEmbedClassifier(model=str(llama), prompts=prompts, accelerator="cpu", **options)
        ours.fit(texts, classes)
        assert len({feature.pooling for feature in ours.features_}) == 2 + n
        assert ours.predict(texts[:3]).shape == (3,)


def test_a_lone_prompt_in_python_is_taken_as_it_is() -> None:
    """Its blanks and commas are its own: ' topic' is a prompt of one word, and not the set."""
    asked = {"model": "m", "layers": "1"}
    assert ExtractConfig(**asked, prompts=" topic").prompts == (" topic",)  # type: ignore[arg-type]
    assert ExtractConfig(**asked, prompts="In one, or two:").prompts == ("In one, or two:",)  # type: ignore[arg-type]
