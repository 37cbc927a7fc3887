"""The paper's open questions at toy size: domain shift, head ablation, and the picture."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clustered import clustered, of_sets, write_cache
from regression.places import Places
from regression.suites import CachePlan, FitPlan, SourcePlan, load_suite
from studies import ablation, audit, domains, doubt, few, several, transfer
from toy_model import save_toy_model, toy_texts

from llmembed.cache_format import open_cache
from llmembed.common.errors import LLMEmbedWarning
from llmembed.extract import ExtractConfig, extract
from llmembed.train.fusions import HEADS

pytestmark = pytest.mark.slow

SUITE = """
about = "toy"
[sources.tiny]
layers = "1,2"
max_length = 64
[caches.one]
dataset = "one"
splits = {{ train = 0, test = 0 }}
fingerprint = "{one}"
[caches.two]
dataset = "two"
splits = {{ train = 0, test = 0 }}
fingerprint = "{two}"
[fits.mean]
fusion = "mean"
head = "ridge"
"""


def plan(path: Path) -> CachePlan:
    return CachePlan(
        name=path.stem,
        dataset="",
        splits={"train": 0, "test": 0},
        fingerprint=open_cache(path).fingerprint,
        sources=(SourcePlan(name="tiny", layers="1,2"),),
    )


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A cache whose classes lie apart."""
    return write_cache(tmp_path / "one.zarr", {"train": clustered(90, 0), "test": clustered(60, 1)})


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Other rows with the same classes, two of which have changed their names in the test split."""
    features, labels = clustered(60, 3)
    splits = {"train": clustered(90, 2), "test": (features, (labels + 1) % 3)}
    return write_cache(tmp_path / "two.zarr", splits)


def test_a_run_is_tested_on_its_own_and_on_the_other_data(one: Path, two: Path) -> None:
    """What was learned on one set holds on its own rows, not on the other's renamed classes."""
    unseen = transfer.unseen(["a b c d e f"] * 20 + ["else"] * 40, ["x a b c d e f"])
    domains = [
        transfer.Domain(plan=plan(path), cache=str(path), unseen=unseen) for path in (one, two)
    ]
    fit = FitPlan(name="mean", options={"fusion": "mean", "head": "ridge"})
    rows = {(r["trained_on"], r["tested_on"]): r for r in transfer.transfer(fit, domains)}
    assert rows["one", "one"]["all"]["accuracy"] > 0.9
    assert rows["one", "two"]["all"]["accuracy"] < 0.1
    assert rows["two", "one"]["all"]["accuracy"] > 0.9
    assert [rows["one", "two"][part]["n"] for part in ("all", "unseen")] == [60, 40]


def test_a_shift_needs_two_sets_with_the_same_classes(one: Path, tmp_path: Path) -> None:
    """Other classes are refused with both lists, and one set alone with what to pass."""
    other = write_cache(tmp_path / "two.zarr", labels=("a", "b", "c"))
    prints = {path.stem: open_cache(path).fingerprint for path in (one, other)}
    (tmp_path / "toy.toml").write_text(SUITE.format(**prints))
    suite = load_suite(str(tmp_path / "toy.toml"))
    places = Places(work=tmp_path)
    with pytest.raises(ValueError, match="one has the classes earn, grain, trade and two a, b, c"):
        transfer.read_domains(suite, {"one": "x", "two": "y"}, places)
    with pytest.raises(ValueError, match="is between two data sets, and 1 were named"):
        transfer.read_domains(suite, {"one": "x"}, places)


def test_heads_of_every_depth_are_built(
    one: Path,
    two: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights are those of the layers asked for; every head has a row, on screen and on file."""
    prints = {path.stem: open_cache(path).fingerprint for path in (one, two)}
    (tmp_path / "toy.toml").write_text(SUITE.format(**prints))
    monkeypatch.setattr(HEADS, "_specs", {**HEADS._specs})  # for this test alone
    command = ["--suite", str(tmp_path / "toy.toml"), "--caches", str(tmp_path), "--data", "one"]
    command += ["--layers", "1,2", "--seeds", "1", "--output", str(tmp_path / "rows.json")]
    assert ablation.main(command) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "rows.json").read_text()) == document
    n_weights = {row["head"]: row["n_parameters"]["one"] for row in document["rows"]}
    assert n_weights["depth 0"] == n_weights["ridge, solved"] == 33 * 3
    assert n_weights["width 16"] == 33 * 16 + 17 * 3
    assert n_weights["depth 2"] == 33 * 256 + 257 * 256 + 257 * 3
    assert len(n_weights) == len(ablation.HEADS)


def test_the_smallest_head_near_the_best_is_named() -> None:
    """Of heads within 0.2 points the one with the fewest weights; farther ones do not count."""
    rows = [
        {"head": "best", "mean_accuracy": 0.9, "n_parameters": {"a": 500}},
        {"head": "near", "mean_accuracy": 0.8985, "n_parameters": {"a": 50}},
        {"head": "far", "mean_accuracy": 0.897, "n_parameters": {"a": 5}},
    ]
    assert ablation.answer(rows) == {"best": "best", "smallest": "near"}


def test_the_picture_is_drawn_from_the_records_alone(tmp_path: Path) -> None:
    """An SVG file comes out, the same bytes each time."""
    plots = pytest.importorskip("studies.plots", exc_type=ModuleNotFoundError)
    cases = {f"mr/{fit}-{k:02d}": {"accuracy": 0.8} for fit in ("single", "last") for k in (0, 3)}
    (tmp_path / "paper.json").write_text(json.dumps({"cases": cases}))
    drawn = []
    for _ in range(2):
        plots.main(["--results", str(tmp_path)])
        drawn.append({path.name: path.read_bytes() for path in tmp_path.glob("*.svg")})
    assert drawn[0] == drawn[1]
    assert drawn[0].keys() == {"accuracy_depth.svg"}
    assert b"<svg" in drawn[0]["accuracy_depth.svg"]


def test_an_audit_is_held_to_the_labels_that_were_flipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The share that stands first is told beside its bar; texts of other labels are refused."""
    features, true = clustered(300, 0)
    given = true.copy()
    given[:15] = (given[:15] + 1) % 3
    path = write_cache(tmp_path / "c.zarr", {"train": (features, given), "test": clustered(60, 1)})
    pq.write_table(pa.table({"label": given, "true_label": true}), tmp_path / "train.parquet")
    arguments = ["--data", f"toy={tmp_path}", "--cache", str(path), "--fusions", "mean"]
    arguments += ["--output", str(tmp_path / "found.json")]
    assert audit.main(arguments) == 0
    document = json.loads((tmp_path / "found.json").read_text())
    assert (document["n_rows"], document["n_flipped"]) == (300, 15)
    listed = document["fusions"][0]["found"]
    assert listed >= 0.8
    assert f"{listed:10.4g}   at least 0.8" in capsys.readouterr().out
    labels = np.zeros(300, np.int32)
    pq.write_table(pa.table({"label": labels, "true_label": true}), tmp_path / "train.parquet")
    assert audit.main(arguments) == 1


def test_promises_are_compared_with_what_is_found(tmp_path: Path) -> None:
    """Each rule is judged on published and drawn rows; others are told from the test."""
    folder, output = tmp_path / "toy", tmp_path / "doubt.json"
    folder.mkdir()
    for split, n in (("train", 120), ("test", 60), ("oos_test", 20)):
        texts = toy_texts(n)
        labels = [-1 if split == "oos_test" else int(len(text.split()) > 10) for text in texts]
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / f"{split}.parquet")
    (folder / "labels.json").write_text(json.dumps(["short", "long"]))
    options = [f"--data=toy={folder}", f"--caches={tmp_path}", f"--output={output}", "--layers=2"]
    model = str(save_toy_model(tmp_path / "model", "bert"))
    for draws in (2, 1):
        with pytest.warns(LLMEmbedWarning):
            assert doubt.main([*options, f"--model={model}", f"--draws={draws}"]) == 0
        if draws == 2:
            output.write_text(output.read_text().replace('"toy"', '"other"'))
    everything = json.loads(output.read_text())["data"]
    assert list(everything) == ["other", "toy"]
    assert [row["n_draws"] for row in everything["other"]["drawn"]] == [2] * 9
    found = everything["toy"]
    assert len(found["published"]) == len(found["drawn"]) == 9
    assert all(0 <= found["accuracy"][of] <= 1 for of in ("held_out", "test"))
    assert {row["rule"] for row in found["drawn"]} == {"abstain", "sets", "sets by class"}
    assert all(0 <= row["found"] <= 1 for row in found["drawn"])
    assert 0 <= found["out_of_scope"]["out_of_domain"] <= 1


def test_several_labels_stand_beside_one_vs_rest(tmp_path: Path) -> None:
    """Both ways have all figures on the same rows, ours with thresholds of its own."""
    splits = {"train": of_sets(150, 0), "test": of_sets(80, 1)}
    cache, output = write_cache(tmp_path / "toy.zarr", splits), tmp_path / "several.json"
    line = [f"--cache={cache}", f"--output={output}", "--rows=120", "--head=linear"]
    assert several.main([*line, "--fusion=concat"]) == 0
    found = json.loads(output.read_text())
    assert (found["n_train"], found["n_test"], found["labels"]) == (120, 80, 3)
    assert {*found["ways"]} == {"ours", "one-vs-rest", "one-vs-rest, thresholds"}
    assert all(0.5 < way["micro_f1"] <= 1 for way in found["ways"].values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two languages with texts, and the caches of two sources beside them."""
    model = str(save_toy_model(tmp_path / "model", "bert"))
    (tmp_path / "caches").mkdir()
    for k, name in enumerate(("tweet_sentiment_a", "tweet_sentiment_b")):
        (tmp_path / name).mkdir()
        for split, rows in (("train", slice(k, 50 + k)), ("test", slice(60, 90))):
            texts = toy_texts(90)[rows]
            labels = [int(len(text.split()) > 10) for text in texts]
            table = pa.table({"text": texts, "label": labels})
            pq.write_table(table, tmp_path / name / f"{split}.parquet")
        for source, layers in (("llm", "1,2"), ("encoder", "2")):
            extract(
                ExtractConfig(
                    model=model,
                    layers=layers,
                    source=source,
                    dataset=str(tmp_path / name),
                    cache=str(tmp_path / "caches" / f"{name}.zarr"),
                    pooling=("mean",),
                    max_length=64,
                )
            )
    return tmp_path


def test_domains_are_compared_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method has a figure with its interval, each language is tested on each; all kept."""
    arguments = [f"--caches={folder / 'caches'}", f"--output={folder / 'found.json'}"]
    arguments += ["--source=llm", "--encoder=encoder", "--layers=1,2", "--quick"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LLMEmbedWarning)
        assert domains.main(arguments) == 0
        found = json.loads((folder / "found.json").read_text())
        assert domains.main(arguments) == 0
    assert json.loads((folder / "found.json").read_text()) == found
    assert found["data"].keys() == {"tweet_sentiment_a", "tweet_sentiment_b"}
    for entry in found["data"].values():
        assert entry.keys() == domains.METHODS.keys()
        for one in entry.values():
            assert one["interval"][0] <= one["accuracy"] <= one["interval"][1]
            assert one["n"] == 30
    assert len(found["transfer"]) == 2 * 2 * 2
    assert "| mean |" in capsys.readouterr().out
    assert domains.main([*arguments, "--layers=1"]) == 1
    assert "Pass two or more to --layers" in capsys.readouterr().err


def test_few_texts_are_drawn_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A draw is made once; SetFit's answers come from the interpreter that is named."""
    stand_in = folder / "setfit"
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, sys\nasked = json.load(sys.stdin)\n"
        "for draw in asked['draws']:\n"
        "    print(json.dumps({'predicted': [0] * len(asked['new']), 'seconds': 1.0}))\n"
    )
    stand_in.chmod(0o755)
    arguments = [f"--caches={folder / 'caches'}", f"--output={folder / 'few.json'}"]
    arguments += ["--data=tweet_sentiment_a", "--rows=4", "--draws=2", f"--setfit={stand_in}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LLMEmbedWarning)
        assert few.main(arguments) == 0
        found = json.loads((folder / "few.json").read_text())["data"]["tweet_sentiment_a"]
        assert few.main([*arguments, "--draws=3"]) == 0
    more = json.loads((folder / "few.json").read_text())["data"]["tweet_sentiment_a"]
    assert more.keys() == {
        *(f"{s}: {m}" for s in ("llm", "encoder") for m in few.METHODS),
        "setfit",
    }
    for method, one in more.items():
        assert one["sizes"]["4"]["accuracy"][:2] == found[method]["sizes"]["4"]["accuracy"]
        assert len(one["sizes"]["4"]["accuracy"]) == 3
    assert "| llm: default |" in capsys.readouterr().out
