from __future__ import annotations

import csv
import json
import os
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import xxhash
from clustered import HIDDEN_SIZE, clustered, source_info, write_split
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

from llmembed.cache_format import CacheWriter, DatasetInfo, open_cache
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus
from llmembed.train import FitConfig, fit
from llmembed.train.reports import texts as texts_module
from llmembed.train.reports.texts import TextsNotFoundError, find_texts

WORDS = {"earn": "profit dividend quarter", "grain": "wheat corn harvest", "rare": "ship port"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache folder of the user, so that nothing is kept yet."""
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def texts_and_labels(split: str, n: int) -> tuple[list[str], np.ndarray]:
    """Texts whose words tell two classes apart, mostly; the third class is in no training row."""
    generator = np.random.default_rng(len(split))
    labels = (np.arange(n) % (3 if split == "test" else 2)).astype(np.int32)
    names = [*WORDS]
    of = np.where(generator.random(n) < 0.1, 1 - labels.clip(max=1), labels)
    chosen = [" ".join(generator.choice(WORDS[names[k]].split(), 4)) for k in of]
    return [f"{text} {split}{row % 9} {row}" for row, text in enumerate(chosen)], labels


def hashes_of(texts: list[str]) -> np.ndarray:
    return np.array([xxhash.xxh3_64_intdigest(one.encode()) for one in texts], dtype=np.uint64)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of a folder of csv files, without the third class in training."""
    folder = tmp_path / "set"
    folder.mkdir()
    provenance = {"origin": str(folder), "text_column": "text", "label_column": "label"}
    dataset = DatasetInfo(name="set", labels=tuple(WORDS), provenance=provenance)
    with CacheWriter(tmp_path / "set.zarr", dataset=dataset) as writer:
        writer.add_source(source_info("tiny", HIDDEN_SIZE))
        for split, n in (("train", 80), ("test", 45)):
            texts, labels = texts_and_labels(split, n)
            with (folder / f"{split}.csv").open("w", newline="") as file:
                rows = [(text, [*WORDS][k]) for text, k in zip(texts, labels, strict=True)]
                csv.writer(file).writerows([("text", "label"), *rows])
            features, _ = clustered(n, n)
            write_split(writer, split, "tiny", features, labels, hashes=hashes_of(texts))
    return tmp_path / "set.zarr"


def baselines(cache: Path, **options: Any) -> dict[str, Any]:
    options = {"fusion": "mean", "head": "ridge", "overwrite": True, **options}
    config = FitConfig(cache=str(cache), output=str(cache.with_name("run")), **options)
    return dict(fit(config).metrics["baselines"])


def test_the_majority_class_has_the_shares_of_the_training_rows(cache: Path, home: Path) -> None:
    """Of 80 rows 40, 40 and 0 have a class; each class counts one more, so that none is 0."""
    found = baselines(cache, baseline="none")
    assert set(found) == {"majority"}
    majority = found["majority"]
    assert (majority["label"], majority["n_train"]) == ("earn", 80)
    assert majority["accuracy"] == pytest.approx(15 / 45)
    expected = -np.log([41 / 83, 41 / 83, 1 / 83]).mean()
    assert majority["nll"] == pytest.approx(expected)
    assert majority["ece"] == pytest.approx(41 / 83 - 1 / 3)
    assert not home.exists()


def test_tfidf_is_what_scikit_learn_says(cache: Path, home: Path) -> None:
    """Fitted by hand on the same rows, two classes give the same figures, the third its floor."""
    found = baselines(cache)["tfidf"]
    (train, y), (test, y_test) = texts_and_labels("train", 80), texts_and_labels("test", 45)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = LogisticRegression(C=10.0, solver="liblinear").fit(vectorizer.fit_transform(train), y)
    proba = np.full((45, 3), 1 / 83)
    proba[:, :2] = model.predict_proba(vectorizer.transform(test))
    proba /= proba.sum(axis=1, keepdims=True)
    predicted = proba.argmax(axis=1)
    assert found["accuracy"] == (predicted == y_test).mean()
    assert found["macro_f1"] == pytest.approx(f1_score(y_test, predicted, average="macro"))
    assert found["nll"] == pytest.approx(log_loss(y_test, proba))
    assert found["n_features"] == len(vectorizer.vocabulary_)


def test_only_the_first_fit_of_a_data_set_pays(cache: Path, home: Path) -> None:
    """Another fusion, seed and source of the same rows take what is kept, texts or no texts."""
    first = baselines(cache)["tfidf"]
    (cache.with_name("set")).rename(cache.with_name("elsewhere"))
    assert baselines(cache, fusion="gated", head="auto", seed=3, epochs=1)["tfidf"] == first
    (note,) = (home / "baselines").iterdir()
    note.write_text(json.dumps({"identity": "another", "figures": {"accuracy": 1}}))
    missing = baselines(cache)["tfidf"]["missing"]
    assert missing == "set is not where it was"


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    cache: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are computed and shown, and not kept."""
    home.write_text("a file, where the folder would be")
    assert "accuracy" in baselines(cache)["tfidf"]


def test_texts_are_found_whatever_part_was_extracted(cache: Path) -> None:
    """A file with more rows in another order still has them: each split had a limit of its own."""
    path = cache.with_name("set") / "test.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, "unknown,earn", *rows[::-1], "another,grain", ""]))
    assert find_texts(open_cache(cache), ["test"])["test"] == texts_and_labels("test", 45)[0]


def test_texts_that_were_changed_are_not_shown(cache: Path) -> None:
    """One other letter, and they are not the texts of the cache."""
    opened = open_cache(cache)
    assert find_texts(opened, ["test"]) == {"test": texts_and_labels("test", 45)[0]}
    path = cache.with_name("set") / "test.csv"
    path.write_text(path.read_text().replace("profit", "prophet", 1))
    with pytest.raises(TextsNotFoundError, match=r"^the texts of 'test' in set are others by now"):
        find_texts(opened, ["test"])
    path.write_text("text\n")
    with pytest.raises(TextsNotFoundError, match=r"^set could not be read again"):
        find_texts(opened, ["test"])


def test_the_network_is_not_asked_for_texts(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub data set is found where `datasets` keeps copies, or said not to be here."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "kept"))
    opened = open_cache(cache)
    opened.dataset.provenance["origin"] = "SomeOne/Some_Set"  # type: ignore[index]
    with pytest.raises(TextsNotFoundError, match="no copy of the data set SomeOne/Some_Set is on"):
        find_texts(opened, ["test"])
    os.makedirs(tmp_path / "kept" / "SomeOne___some-set")  # noqa: PTH103
    with pytest.raises(TextsNotFoundError, match="Some_Set could not be read again"):
        find_texts(opened, ["test"])


def test_texts_of_a_configuration_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache records which configuration of a Hub data set it was made of, where one was given."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for name in ("apple", "pear"):
        made = datasets.Dataset.from_dict(
            {"text": [f"{name} {row}" for row in range(4)], "label": [0, 1, 0, 1]}
        )
        folder = tmp_path / "me___fruit" / name / "0.0.0" / "kept"
        folder.mkdir(parents=True)
        table, place = made.data.table, str(folder / "fruit-train.arrow")
        with pa.OSFile(place, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        info = {
            "builder_name": "parquet",
            "dataset_name": "fruit",
            "config_name": name,
            "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
            "splits": {"train": {"name": "train", "num_examples": 4, "dataset_name": "fruit"}},
            "features": made.features.to_dict(),
        }
        (folder / "dataset_info.json").write_text(json.dumps(info))
    corpus = load_corpus(DatasetOptions("me/fruit", config="pear"))
    dataset = DatasetInfo(name="fruit", labels=corpus.labels, provenance=corpus.provenance)
    train = corpus.splits["train"]
    with CacheWriter(tmp_path / "fruit.zarr", dataset=dataset) as writer:
        writer.add_split("train", labels=train.labels, text_hash=train.text_hash)
    cache = open_cache(tmp_path / "fruit.zarr")
    assert find_texts(cache, ["train"])["train"] == [f"pear {row}" for row in range(4)]
    assert "config" not in DatasetOptions("me/fruit").recorded


def test_too_many_rows_are_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report does not read what takes minutes."""
    monkeypatch.setattr(texts_module, "MOST_ROWS", 44)
    with pytest.raises(TextsNotFoundError, match="there are 45, more than 44"):
        find_texts(open_cache(cache), ["test"])


def test_texts_without_a_common_word_have_no_baseline(cache: Path, home: Path) -> None:
    """It is said, and the fit goes on."""
    folder = cache.with_name("set")
    texts = [f"word{row}" for row in range(80)]
    rows = "\n".join(f"{text},{[*WORDS][k % 2]}" for k, text in enumerate(texts))
    (folder / "train.csv").write_text(f"text,label\n{rows}\n")
    opened = open_cache(cache)
    hashes = hashes_of(texts)
    assert not np.array_equal(opened["train"].text_hash, hashes)
    dataset = DatasetInfo(name="set", labels=tuple(WORDS), provenance=opened.dataset.provenance)
    other = cache.with_name("other.zarr")
    with CacheWriter(other, dataset=dataset) as writer:
        writer.add_source(source_info("tiny", HIDDEN_SIZE))
        labels = texts_and_labels("train", 80)[1]
        write_split(writer, "train", "tiny", clustered(80, 0)[0], labels, hashes=hashes)
    assert baselines(other)["tfidf"] == {"missing": "no word is in two of the training texts"}
