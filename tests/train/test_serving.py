"""A server as its clients see it, on this machine's own address."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
import socket
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from gated import LABELS, Gated, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from toy_model import toy_texts

from llmembed.common.errors import ConfigError, EngineError, LLMEmbedWarning
from llmembed.train import Run, load_run
from llmembed.train.cli.predict import predict_main
from llmembed.train.cli.serve import serve_main
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.measures import HeldOutRows
from llmembed.train.runs.held_out import DOMAIN_FILE, HELD_OUT_FILE, as_bytes
from llmembed.train.serving.batcher import Answer
from llmembed.train.serving.config import ServeConfig
from llmembed.train.serving.server import (
    RunClassifier,
    Server,
    _listen,
    doubts_of,
    ignore_what_is_told,
)

MOST_BYTES = 4000


@pytest.fixture(scope="module")
def toy() -> Iterator[Server]:
    """A server of a classifier that takes no time."""
    options = {"max_texts": 3, "max_characters": 50, "max_body_bytes": MOST_BYTES}
    with serving(Gated(), **options) as server:
        yield server


@pytest.fixture(scope="module")
def client(toy: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=toy.url, trust_env=False) as client:
        yield client


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [one for family in families for one in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_answers_are_those_of_the_run(texts_run: Run) -> None:
    """Many clients at a time get what each text alone gets from the run, of two backbones here."""
    texts, run = toy_texts(24), load_run(texts_run.path)
    alone = np.concatenate([run.predict_proba([text]) for text in texts])
    with (
        serving_run(load_run(run.path), batch_tokens=100) as server,
        ThreadPoolExecutor(12) as clients,
    ):

        def ask(start: int) -> Any:
            body = {"texts": texts[start : start + 2]}
            return httpx.post(f"{server.url}predict", json=body, trust_env=False).json()

        answers = list(clients.map(ask, range(0, 24, 2)))
    found = [one["labels"] for answer in answers for one in answer["predictions"]]
    assert [[one["label"] for one in labels] for labels in found] == [
        [LABELS[index] for index in np.argsort(-row, kind="stable")] for row in alone
    ]
    best = [[one["probability"] for one in labels] for labels in found]
    np.testing.assert_allclose(best, -np.sort(-alone, axis=1), atol=1e-5)
    assert {answer["n_truncated"] for answer in answers} == {0}


def doubting(run: Run) -> Run:
    """The run, as if of 200 held-out rows each had been as right as its probability says."""
    generator = np.random.default_rng(0)
    first = generator.random(200)
    labels = (generator.random(200) > first).astype(int)
    proba = np.stack([first, 1 - first], axis=1)
    return dataclasses.replace(run, held_out=HeldOutRows.of(proba, labels))


def test_doubts_stand_beside_the_classes(texts_run: Run) -> None:
    """They are those of the run: what is too doubtful, and the set that holds the right label."""
    run = doubting(load_run(texts_run.path))
    config = ServeConfig(run="", abstain=0.8, conformal=0.9)
    proba = np.array([[0.75, 0.25], [0.0, 1.0]])  # what the stand-in says of these texts
    expected_sets = run.label_sets(proba, 0.9)
    refused = (proba.max(axis=1) < run.abstain_below(0.8)).tolist()
    with serving(Gated(), doubts=doubts_of(run, config)) as server:
        body = {"texts": ["a b c d", "a"], "top_k": 1}
        answer = httpx.post(f"{server.url}predict", json=body, trust_env=False).json()
    told = answer["predictions"]
    assert [one["label_set"] for one in told] == expected_sets
    assert [one["abstained"] for one in told] == refused


@contextlib.contextmanager
def serving_run(run: Run, **options: Any) -> Iterator[Server]:
    """Serve a run as the command does."""
    config = ServeConfig(run="", **options)
    classifier: Any = RunClassifier(run, config)
    classifier.loaded = classifier.gate = threading.Event()
    classifier.loaded.set()
    limits = {"batch_tokens": config.batch_tokens}
    with (
        warnings.catch_warnings(),
        serving(classifier, doubts=doubts_of(run, config), **limits) as server,
    ):
        ignore_what_is_told()
        yield server


@pytest.mark.parametrize("by", ["all", "class"])
def test_doubts_are_those_of_a_prediction(texts_run: Run, tmp_path: Path, by: str) -> None:
    """Each field has the name and the value that `llmembed-predict` gives, computed together."""
    folder = shutil.copytree(texts_run.path, tmp_path / "run")
    (folder / HELD_OUT_FILE).write_bytes(as_bytes(doubting(texts_run).held_out))
    texts = [*toy_texts(5), "w3 " * 300, " "]
    options = [f"--text={text}" for text in texts]
    options += ["--ood", "--conformal=0.9", f"--conformal-by={by}", "--abstain=0.8", "--json"]
    rows = json.loads(CliRunner().invoke(predict_main, [f"--run={folder}", *options]).stdout)
    doubts = {"ood": True, "conformal": 0.9, "conformal_by": by, "abstain": 0.8}
    with serving_run(load_run(folder), **doubts) as server:
        body = {"texts": texts}
        told = httpx.post(f"{server.url}predict", json=body, trust_env=False).json()
    assert [row["note"] for row in rows] == [*[""] * 5, "truncated", "empty"]
    assert told["n_truncated"] == 1
    for one, row in zip(told["predictions"], rows, strict=True):
        fields = ("abstained", "label_set", "out_of_domain", "note")
        assert {name: one[name] for name in fields} == {name: row[name] for name in fields}
        assert list(one) == ["labels", *fields]


def test_classes_that_are_in_every_set_are_said_once(texts_run: Run) -> None:
    """When the server starts, not with each answer."""
    few = HeldOutRows.of(np.array([[0.9, 0.1]] * 40), np.zeros(40, dtype=int))
    run = dataclasses.replace(load_run(texts_run.path), held_out=few)
    config = ServeConfig(run="", conformal=0.9, conformal_by="class")
    with pytest.warns(LLMEmbedWarning, match="1 of 2 classes have too few held-out rows"):
        tell = doubts_of(run, config)
    found = Answer(proba=np.array([[0.95, 0.05]]), far=np.ones(1), is_cut=[False])
    with warnings.catch_warnings(record=True) as said:
        ignore_what_is_told()
        assert tell(["a"], found) == {"label_set": [list(run.labels)]}
    assert said == []


def test_a_run_that_cannot_tell_how_far_a_text_lies_is_not_served(
    texts_run: Run, tmp_path: Path
) -> None:
    """One of an earlier version, and one of several labels, in the sentence of a prediction."""
    folder = shutil.copytree(texts_run.path, tmp_path / "run")
    (folder / DOMAIN_FILE).unlink()
    result = CliRunner().invoke(serve_main, [str(folder), "--port", "0", "--ood"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        "is of an earlier version and does not keep what --ood needs. Fit again." in result.stderr
    )
    several = dataclasses.replace(texts_run.classifier.architecture, multilabel=True)
    run = dataclasses.replace(texts_run, classifier=Classifier(several).eval())
    with pytest.raises(ConfigError, match="--ood is for runs in which each text has one label"):
        RunClassifier(run, ServeConfig(run="", ood=True))


def test_the_schema_tells_of_doubts(client: httpx.Client) -> None:
    """Every field of an answer stands in OpenAPI, with the option that brings it."""
    fields = client.get("/openapi.json").json()["components"]["schemas"]["Prediction"]["properties"]
    option = {
        "abstained": "abstain",
        "label_set": "conformal",
        "out_of_domain": "ood",
        "note": "ood",
    }
    assert fields.keys() == {"labels", "given", *option}
    for name, of in option.items():
        assert fields[name]["description"].startswith(f"With --{of}: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"abstain": 1.0}, "--abstain is 1, and the share of answers that are to be right lies"),
        ({"conformal": float("nan")}, "--conformal is nan, and the share of sets"),
        ({"abstain": 0.9999}, "--abstain 0.9999 is more than the run"),
        ({"conformal": 0.9999}, r"--conformal 0.9999 takes 9,999 held-out rows"),
    ],
)
def test_doubts_that_cannot_be_told_are_refused_at_the_start(
    texts_run: Run, options: dict[str, float], message: str
) -> None:
    """Before the backbone is loaded, in one sentence."""
    with pytest.raises(ConfigError, match=message):
        doubts_of(doubting(texts_run), ServeConfig(run="", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--conformal", "0.9", "--conformal-by", "x"],
            "--conformal-by is 'x'. Pass all or class.",
        ),
        (["--conformal-by", "class"], "--conformal-by is for the sets of --conformal."),
    ],
)
def test_what_a_share_is_of_is_all_or_class(options: list[str], message: str) -> None:
    """And only where there are sets: the words are those of `llmembed-predict`."""
    result = CliRunner().invoke(serve_main, ["nowhere", *options])
    assert (result.exit_code, message in result.stderr) == (2, True)


def test_the_most_probable_classes_come_first(client: httpx.Client) -> None:
    """All of them, or as many as `top_k` says."""
    low, high = LABELS
    answer = client.post("/predict", json={"texts": ["a b c d", "a"], "top_k": 1}).json()
    expected = [{"labels": [{"label": low, "probability": 0.75}]}]
    expected += [{"labels": [{"label": high, "probability": 1.0}]}]
    assert answer == {"predictions": expected, "n_truncated": 0}
    answer = client.post("/predict", json={"texts": ["a b c d"]}).json()
    assert [one["label"] for one in answer["predictions"][0]["labels"]] == [low, high]
    assert client.post("/predict", json={"texts": ["a " * 9]}).json()["n_truncated"] == 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("", 400, "the body is not JSON: EOF while parsing"),
        ('{"texts": ["a"', 400, "the body is not JSON: EOF while parsing"),
        (b'{"texts": ["\xff"]}', 400, "the body is not JSON: invalid unicode code point"),
        (r'{"texts": ["\ud800"]}', 400, "the body is not JSON"),
        ("[" * 1000, 400, "the body is not JSON: recursion limit exceeded"),
        ('{"texts": ["no pair"]}', 400, "text 0 is not a pair."),
        ("null", 422, "body: Input should be an object, not null."),
        ("{}", 422, "texts: Field required."),
        ('{"texts": "a"}', 422, "texts: Input should be a valid array, not a string."),
        ('{"texts": []}', 422, "texts: List should have at least 1 item"),
        ('{"texts": ["a", "a", "a", "a"]}', 422, "texts: List should have at most 3 items"),
        ('{"texts": ["a", 3]}', 422, "texts.1: Input should be a valid string, not 3."),
        ('{"texts": [NaN]}', 422, "texts.0: Input should be a valid string, not NaN."),
        ('{"texts": [["a"]]}', 422, "texts.0: Input should be a valid string, not a list."),
        (json.dumps({"texts": ["a" * 51]}), 422, "String should have at most 50 characters"),
        ('{"texts": ["a"], "k": 1}', 422, "k: Extra inputs are not permitted."),
        ('{"texts": ["a"], "\\u001b[2J": 1}', 422, "\\x1b[2J: Extra inputs are not permitted."),
        ('{"texts": ["a"], "top_k": 0}', 422, "top_k: Input should be greater than or equal to 1."),
        ('{"texts": ["a"], "top_k": 3}', 422, "top_k: Input should be less than or equal to 2."),
        ('{"texts": ["a"], "top_k": "1"}', 422, "top_k: Input should be a valid integer, not a"),
        ('{"texts": ["a"], "top_k": 1e400}', 422, "valid integer, not Infinity."),
        (b" " * (MOST_BYTES + 1), 413, "the body has more than 4,000 bytes, which is the limit"),
    ],
)
def test_a_bad_body_is_refused_in_a_sentence(
    client: httpx.Client, body: str | bytes, status: int, message: str
) -> None:
    """The status tells whose fault it is, the sentence what is allowed; nothing is computed."""
    before = metric(client, "llmembed_texts_total")
    answer = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json().keys()) == (status, {"error"})
    assert message in answer.json()["error"]
    assert metric(client, "llmembed_texts_total") == before


@settings(max_examples=40)
@given(
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["texts", "top_k"]), inner),
        max_leaves=9,
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_body_is_a_fault_of_the_server(client: httpx.Client, body: bytes) -> None:
    """Whatever is sent, the answer is JSON: one for each text, or a sentence."""
    answer = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    if answer.status_code == 200:
        assert len(answer.json()["predictions"]) == len(json.loads(body)["texts"])
    else:
        assert answer.status_code in {400, 413, 422}
        assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data; boundary=x"])
def test_only_what_is_called_json_is_read(client: httpx.Client, kind: str) -> None:
    """A page of another site could send a form, without asking."""
    answer = client.post("/predict", content='{"texts": ["a"]}', headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert f"content type '{kind}' is not application/json." in answer.json()["error"]


def test_a_large_body_is_refused_while_it_comes(toy: Server) -> None:
    """Of a body without end, and of one that says its length, no more is read than the limit."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    endless = b"Transfer-Encoding: chunked\r\n\r\n1000\r\n" + b" " * 0x1000 + b"\r\n"
    for rest in (endless, b"Content-Length: 10000000\r\n\r\n"):
        with connected(toy) as connection:
            connection.sendall(head + rest)
            answer = b"".join(iter(lambda c=connection: c.recv(4096), b""))  # to its end
            assert answer.startswith(b"HTTP/1.1 413")


def connected(server: Server) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port))


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/predict", 405), ("POST", "/", 405), ("GET", "/x", 404)]
)
def test_an_unknown_address_is_told(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    """In the same form as every other refusal."""
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/json")
    assert f"there is no {method} of this address. GET /docs" in answer.json()["error"]


def test_life_and_readiness_are_told_apart() -> None:
    """While the backbone loads the process is alive, not ready, and refuses texts with 503."""
    classifier = Gated()
    classifier.loaded.clear()
    with serving(classifier) as server, httpx.Client(base_url=server.url, trust_env=False) as ask:
        assert (ask.get("/livez").status_code, ask.get("/healthz").status_code) == (200, 503)
        refused = ask.post("/predict", json={"texts": ["a"]})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "the backbone is not loaded yet" in refused.json()["error"]
        assert metric(ask, "llmembed_ready") == 0
        classifier.loaded.set()
        while ask.get("/healthz").status_code == 503:
            pass
        assert ask.get("/healthz").json() == {"status": "ready"}
        assert ask.post("/predict", json={"texts": ["a"]}).status_code == 200


def test_a_client_that_leaves_costs_no_pass_and_a_full_queue_answers_503() -> None:
    """One holds the backbone, one waits, the next is refused; then the second leaves."""
    classifier = Gated(is_open=False)
    with (
        serving(classifier, queue_tokens=1) as server,
        httpx.Client(base_url=server.url, trust_env=False) as ask,
        ThreadPoolExecutor(2) as others,
    ):

        def post(text: str) -> httpx.Response:
            url = f"{server.url}predict"
            return httpx.post(url, json={"texts": [text]}, trust_env=False, timeout=60)

        held = others.submit(post, "hold")
        while not classifier.batches:
            pass
        with connected(server) as leaving:
            body = b'{"texts": ["leaving"]}'
            head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while metric(ask, "llmembed_queue_tokens") == 0:
                pass
            refused = ask.post("/predict", json={"texts": ["refused"]})
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert "2 requests with 1 tokens wait already" in refused.json()["error"]
        while metric(ask, "llmembed_queue_tokens") == 1:
            pass
        stays = others.submit(post, "stays")
        while metric(ask, "llmembed_queue_tokens") == 0:
            pass
        classifier.gate.set()
        assert [held.result().status_code, stays.result().status_code] == [200, 200]
        assert metric(ask, "llmembed_requests_total", status="499") == 1
    assert classifier.batches == [["hold"], ["stays"]]


def test_a_failure_is_a_sentence_and_no_text_is_logged(
    client: httpx.Client, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server lives on; neither log nor terminal nor answer repeats what was sent."""
    with caplog.at_level(logging.DEBUG):
        answer = client.post("/predict", json={"texts": ["poison"]})
        assert answer.status_code == 500
        assert answer.json()["error"].startswith("the texts could not be classified.")
        client.post("/predict", json={"texts": ["poison", 3]})
        assert client.post("/predict", json={"texts": ["poisonous"]}).status_code == 200
    seen = capfd.readouterr()
    assert "poison" not in caplog.text + seen.out + seen.err


def test_a_server_whose_backbone_is_lost_ends_with_a_sentence() -> None:
    """Who asked is told to ask another server; whoever watches this one starts it again."""
    classifier, answers = Gated(), []

    def ask() -> None:
        with serving(classifier) as server:
            classifier.is_lost = True
            body = {"texts": ["a"]}
            answers.append(httpx.post(f"{server.url}predict", json=body, trust_env=False))

    with pytest.raises(EngineError, match="no longer classifies what it did at the start"):
        ask()
    assert (answers[0].status_code, "the server is ending." in answers[0].text) == (503, True)


def test_what_the_metrics_count(client: httpx.Client) -> None:
    """Requests by status, texts, tokens, batches and times grow by what was asked."""
    names = {
        "llmembed_texts_total": 2,
        "llmembed_tokens_total": 9,
        "llmembed_truncated_texts_total": 1,
        "llmembed_batch_texts_sum": 2,
        "llmembed_batch_tokens_sum": 9,
        "llmembed_batch_seconds_count": 1,
        "llmembed_request_seconds_count": 2,
    }
    before = {name: metric(client, name) for name in names}
    refused = metric(client, "llmembed_requests_total", status="400")
    client.post("/predict", json={"texts": ["a", "a " * 9]})
    client.post("/predict", content="{", headers={"Content-Type": "application/json"})
    grown = {name: metric(client, name) - value for name, value in before.items()}
    assert grown == names
    assert metric(client, "llmembed_requests_total", status="400") == refused + 1
    assert metric(client, "llmembed_queue_requests") == metric(client, "llmembed_queue_tokens") == 0


def test_the_page_of_addresses_lists_the_schema_and_needs_no_other(client: httpx.Client) -> None:
    """All that OpenAPI says stands on it; nothing on either page leads elsewhere."""
    schema, page = client.get("/openapi.json").json(), client.get("/docs").text
    assert schema["paths"].keys() == {"/predict", "/healthz", "/livez", "/metrics"}
    assert all(
        f"<h2>{next(iter(one)).upper()} {at}</h2>" in page for at, one in schema["paths"].items()
    )
    texts = schema["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert texts["schema"]["properties"]["texts"]["maxItems"] == 3
    assert all(f'id="{name}"' in page for name in schema["components"]["schemas"])
    for one in (client.get("/docs"), client.get("/")):
        assert "default-src 'none'" in one.headers["Content-Security-Policy"]
        assert "<toy>" not in one.text
        led = set(re.findall(r'(?:src|href)="(.*?)"', one.text))
        assert led <= {".", "data:,", "docs", "openapi.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 65_536}, "port 65536 is out of range: it must lie between 0 and 65535."),
        ({"max_texts": 0}, "must lie between 1 and 2147483647. Pass another --max-texts."),
    ],
)
def test_numbers_out_of_range(options: dict[str, int], message: str) -> None:
    """They are refused before anything is read."""
    with pytest.raises(ConfigError) as caught:
        ServeConfig(run="r", **options)
    assert message in str(caught.value)


def test_a_server_that_cannot_begin_says_why(texts_run: Run, monkeypatch: Any) -> None:
    """No run, a taken port, a wrong place of backbones, a missing package: exit 1, a sentence."""

    def error(*arguments: str) -> str:
        result = CliRunner().invoke(serve_main, [*arguments])
        assert (result.exit_code, result.stdout) == (1, "")
        return result.stderr

    run = str(texts_run.path)
    assert "nowhere is not a folder, so there is no run" in error("nowhere")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"host 127.0.0.1, port {port}: Address already in use" in error(run, "--port", port)
    assert "Pass another --host or --port." in error(run, "--host", "256.0.0.1")
    moved = error(run, "--port", "0", "--model", "nowhere")
    assert "nowhere' is one place, and the run" in moved
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "uvicorn" else name
    )
    assert "Run pip install 'llmembed-cache[serve]'" in error(run)


def test_backbones_without_room_for_each_other_are_not_served(
    texts_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be loaded again for every request: the server ends and says so."""
    monkeypatch.setattr("llmembed.train.runs.predict.has_room", lambda device: False)
    run = load_run(texts_run.path)
    with pytest.raises(ConfigError, match="would be loaded again for every request"):
        RunClassifier(run, ServeConfig(run="")).load()


def test_tokens_are_counted_as_the_backbone_does(texts_run: Run) -> None:
    """The most of any source, up to max-length, which texts are cut at; a pair is two texts."""
    run = load_run(texts_run.path)
    classifier = RunClassifier(run, ServeConfig(run=""))
    classifier.load()
    counted = classifier.count(["w1 w2", "w1 " * 100, ""])
    assert (counted.n_tokens, counted.n_truncated) == ([4, 64, 2], 1)  # BERT adds two
    assert counted.is_cut == [False, True, False]
    assert math.isclose(classifier.classify(["w1"])[0].sum(), 1)


def test_a_run_on_pairs_is_warmed_by_a_pair(texts_run: Run) -> None:
    """A text alone would not be understood."""
    sources = json.loads(json.dumps(texts_run.config["sources"]))
    for source in sources.values():
        source["recipe"]["text_pair"] = True
    run = dataclasses.replace(texts_run, config={**texts_run.config, "sources": sources})
    assert RunClassifier(run, ServeConfig(run=""))._probe == ["one text\x1fone text"]


def test_the_image_starts_what_there_is() -> None:
    """The Dockerfile names a command, an extra and options that exist, and no root user."""
    root = Path(__file__).parents[2]
    lines = (root / "Dockerfile").read_text()
    assert "llmembed-cache[serve]" in lines
    assert "USER llmembed" in lines
    assert "constraints.txt" in lines
    start = json.loads(lines.rpartition("ENTRYPOINT ")[2].splitlines()[0])
    run = json.loads(lines.rpartition("\nCMD ")[2].splitlines()[0])
    assert start[0] == "llmembed-serve"
    assert serve_main.make_context("llmembed-serve", start[1:] + run).params["host"] == "0.0.0.0"  # noqa: S104
    assert ".venv*" in (root / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_answer_does_not_wait_for_the_client_to_confirm_its_first_part(host: str) -> None:
    """Whoever connects gets each part at once (TCP_NODELAY)."""
    with (
        _listen(host, 0) as listener,
        socket.create_connection(listener.getsockname()[:2]),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
