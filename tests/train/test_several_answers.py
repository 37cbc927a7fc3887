"""What a run of several labels says of new texts: in Python, on the terminal, in files, served."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from llmembed.common.errors import ConfigError
from llmembed.train import Run
from llmembed.train.cli.predict import predict_main
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.runs import folder
from llmembed.train.runs.answers import Answers
from llmembed.train.serving.bodies import Predictions, answer

LABELS = ("joy", "love", "fear")
PROBA = np.array([[0.6, 0.1, 0.75], [0.125, 0.25, 0.3]])
HALF = np.full(3, 0.5)


def answers(**given: object) -> Answers:
    texts = ("so happy, so scared", "nothing")
    options = {"texts": texts, "labels": LABELS, "proba": PROBA, "with_all": False}
    return Answers(**{**options, "thresholds": HALF, **given})  # type: ignore[arg-type]


def test_lines_join_labels() -> None:
    """The likeliest label comes first, with its probability; a text may have none."""
    assert [*answers().lines()] == [
        "fear, joy\t0.7500, 0.6000\tso happy, so scared",
        "\t\tnothing",
    ]


def test_rows_hold_lists() -> None:
    """JSON and tables have a list of labels, and one of their probabilities beside it."""
    first, second = answers(with_all=True).rows()
    assert (first["label"], first["probability"]) == (["fear", "joy"], [0.75, 0.6])
    assert (second["label"], second["probability"]) == ([], [])
    assert second["probabilities"] == {"joy": 0.125, "love": 0.25, "fear": 0.3}
    assert answers(top_k=1).table()["label_1"] == ["fear", "fear"]


def test_a_server_tells_what_is_given() -> None:
    """Beside all labels by their probability; of runs of one label a text there is no such word."""
    told = answer(PROBA, LABELS, 2, 0, thresholds=HALF)
    assert [one["given"] for one in told["predictions"]] == [["fear", "joy"], []]
    assert told["predictions"][0]["labels"][0] == {"label": "fear", "probability": 0.75}
    Predictions.model_validate(told)
    assert "given" not in answer(PROBA, LABELS, 2, 0)["predictions"][0]


@pytest.fixture
def run(texts_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose labels are those of real texts, each with a probability of its own."""
    known = texts_run.classifier
    architecture = dataclasses.replace(known.architecture, multilabel=True)
    classifier = Classifier(architecture).eval()
    thresholds = torch.tensor([0.2, 0.5])
    known_weights = known.state_dict()
    known_weights["base.bias"] = known_weights["base.bias"] + 1  # both are more probable
    classifier.load_state_dict(known_weights | {"thresholds": thresholds})
    found = dataclasses.replace(texts_run, classifier=classifier)
    monkeypatch.setattr(folder, "load_run", lambda _: found)
    return found


def test_predictions_are_lists(run: Run) -> None:
    """A label is given from its threshold on; probabilities don't add up to 1."""
    texts = ["a b c", "one two three four five six seven eight nine ten eleven twelve"]
    proba = run.predict_proba(texts)
    for row, given in zip(proba, run.predict(texts), strict=True):
        order = np.argsort(-row, kind="stable")
        assert given == [run.labels[k] for k in order if row[k] >= np.float32([0.2, 0.5])[k]]
    assert not np.allclose(proba.sum(axis=1), 1)


def test_files_hold_lists(run: Run, tmp_path: Path) -> None:
    """Parquet and jsonl hold lists, csv the same list as JSON."""
    texts = ["a b c", "one two three four five six seven eight nine ten eleven twelve"]
    expected = run.predict(texts)
    given = [word for text in texts for word in ("--text", text)]
    for suffix in ("parquet", "jsonl", "csv"):
        output = tmp_path / f"answers.{suffix}"
        line = ["--run", "run", *given, "--output", str(output), "--proba"]
        result = CliRunner().invoke(predict_main, line)
        assert result.exit_code == 0, result.output
        if suffix == "parquet":
            found = pq.read_table(output)["label"].to_pylist()
        elif suffix == "jsonl":
            found = [json.loads(row)["label"] for row in output.read_text().splitlines()]
        else:
            with output.open(newline="", encoding="utf-8") as file:
                found = [json.loads(row["label"]) for row in csv.DictReader(file)]
        assert found == expected


@pytest.mark.parametrize("option", ["--abstain", "--conformal", "--ood"])
def test_doubts_are_refused(run: Run, option: str) -> None:
    """The command says in one sentence that they are for one label a text."""
    line = ["--run", "run", "--text", "a", option, *(["0.9"] if option != "--ood" else [])]
    result = CliRunner().invoke(predict_main, line)
    assert result.exit_code == 1
    assert f"{option} is for runs in which each text has one label" in result.stderr
    with pytest.raises(ConfigError, match="--abstain is for runs"):
        run.predict(["a"], abstain=0.9)
