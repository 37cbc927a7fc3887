"""Many clients of a server whose parts fail, and many writers of a store that does."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import httpx
import numpy as np
import pytest
from faulty_proxy import faulty_proxy
from gated import Gated, expected, serving
from toy_cache import as_options

from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import finalize, verify
from llmembed.cache_format.writing import blocks
from llmembed.common.errors import EngineError
from llmembed.extract import ExtractConfig, Extractor, extract
from llmembed.train import FitConfig, Run, fit, load_run

EXTRACT = "from llmembed.extract.cli import main; main()"
COMMAND = "from llmembed.train.cli.serve import serve_main; serve_main()"
SAYS_SO = {400, 413, 422, 500, 503}
"""What a server may answer instead of an answer, with a sentence."""


@pytest.fixture
def run(settings: dict[str, Any], tmp_path: Path) -> Run:
    """A run on the toy texts."""
    cache = extract(ExtractConfig(**settings, cache=str(tmp_path / "toy.zarr"))).path
    options = {"layers": "1", "fusion": "mean", "head": "ridge", "baseline": "none"}
    return fit(FitConfig(cache=cache, output=str(tmp_path / "run"), **options))  # type: ignore[arg-type]


class Trouble(Gated):
    """A backbone that fails at some batches, as a full device or a bad kernel does."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._random, self._share = random.Random(0), share
        self.n_failed = 0

    def classify(self, texts: Any) -> Any:
        """Fail now and then with what is no error of ours."""
        if self._random.random() < self._share:
            self.n_failed += 1
            raise self._random.choice([RuntimeError, MemoryError, OSError])("out of memory")
        return super().classify(texts)


def words(n: int) -> str:
    return " ".join(["w"] * n)


def is_right(texts: list[str], answer: httpx.Response) -> bool:
    """Whether each text got its own probabilities, which are told by the number of its words."""
    told = [
        {one["label"]: one["probability"] for one in row["labels"]}
        for row in answer.json()["predictions"]
    ]
    found = np.array([[row["short"], sum(row.values()) - row["short"]] for row in told])
    return bool(np.allclose(found, expected(texts), atol=1e-6))


def ask(url: str, texts: list[str], **options: Any) -> httpx.Response:
    return httpx.post(f"{url}predict", json={"texts": texts}, trust_env=False, **options)


def until(happens: Callable[[], bool]) -> None:
    while not happens():
        pass


def leave(url: str, texts: list[str], n_bytes: int) -> None:
    """Begin a request, and go away in its midst or before its answer."""
    body = json.dumps({"texts": texts}).encode()
    host, port = httpx.URL(url).host, httpx.URL(url).port
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, port)) as connection:
        connection.sendall((head.encode() + body)[:n_bytes])


@pytest.mark.fault("L2")
def test_under_load_each_answer_is_right_or_says_why_not(
    tries: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    """While passes fail, clients vanish and others wait, no text gets the answer of another."""
    classifier, outcomes = Trouble(0.2), Counter[str]()
    with (
        serving(classifier, batch_tokens=30, queue_requests=12) as server,
        ThreadPoolExecutor(16) as clients,
    ):

        def act(seed: int) -> None:
            chosen = random.Random(seed)
            texts = [words(chosen.randint(1, 8)) for _ in range(chosen.randint(1, 4))]
            if chosen.random() < 0.2:
                leave(server.url, texts, chosen.randint(1, 200))
                outcomes["left"] += 1
                return
            answer = ask(server.url, texts)
            if answer.status_code == 200:
                assert is_right(texts, answer)
                outcomes["right"] += 1
            else:
                assert answer.status_code in SAYS_SO
                assert answer.json()["error"].endswith(".")
                outcomes[str(answer.status_code)] += 1

        for done in [clients.submit(act, seed) for seed in range(300)]:
            done.result()
        classifier._share = 0.0
        for n_words in range(1, 9):
            assert is_right([words(n_words)], ask(server.url, [words(n_words)]))
        assert server.batcher._n_requests == server.batcher._n_waiting_tokens == 0
    assert min(outcomes["right"], outcomes["left"], outcomes["500"], classifier.n_failed) > 0
    tries(300)


class PanicError(BaseException):
    """What a library in Rust raises where it panics: no Exception."""


@pytest.mark.fault("L2")
@pytest.mark.parametrize("end", [SystemExit, PanicError])
@pytest.mark.parametrize("place", ["classify", "count"])
def test_what_would_end_the_process_fails_one_request(
    monkeypatch: pytest.MonkeyPatch, end: type[BaseException], place: str
) -> None:
    """`sys.exit` or a panic below a request is told to that one; all others are answered."""
    classifier = Gated()
    act = getattr(classifier, place)

    def ending(texts: list[str]) -> Any:
        if "end" in texts:
            raise end(7)
        return act(texts)

    monkeypatch.setattr(classifier, place, ending)
    with serving(classifier) as server:
        for n_words in (1, 2):
            failed = ask(server.url, ["end"])
            assert (failed.status_code, failed.json()["error"][-1]) == (500, ".")
            assert is_right([words(n_words)], ask(server.url, [words(n_words)]))


@pytest.mark.fault("L2")
def test_an_exit_while_the_backbone_loads_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends with what happened, and nobody waits for it."""
    classifier = Gated()
    classifier.loaded.clear()

    def leave_at_once() -> None:
        classifier.loaded.wait()
        sys.exit(7)

    monkeypatch.setattr(classifier, "load", leave_at_once)
    raises = pytest.raises(EngineError, match=r"ended while it was loaded: SystemExit in .*\.")
    with raises, serving(classifier) as server:
        classifier.loaded.set()
        until(lambda: server.should_exit)


@pytest.mark.fault("L2")
def test_slow_clients_hold_up_nobody(tries: Callable[[int], None]) -> None:
    """Clients that send a byte and wait cost no other one its answer."""
    with serving(Gated()) as server, contextlib.ExitStack() as slow:
        url = httpx.URL(server.url)
        for _ in range(60):
            connection = slow.enter_context(socket.create_connection((url.host, url.port)))
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{")
        for n_words in range(1, 9):
            assert is_right([words(n_words)], ask(server.url, [words(n_words)]))
    tries(60)


def started(run: Path) -> tuple[subprocess.Popen[str], str]:
    """Start the command, and wait until it has told its address."""
    command = [sys.executable, "-Pc", COMMAND, str(run), "--port", "0", "--json"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["url"]


def told(answer: httpx.Response, labels: tuple[str, ...]) -> Any:
    rows = answer.json()["predictions"]
    by_name = [{one["label"]: one["probability"] for one in row["labels"]} for row in rows]
    return [[row[label] for label in labels] for row in by_name]


@pytest.mark.slow
@pytest.mark.fault("L2")
def test_a_server_outlives_its_folder_and_is_started_again_when_killed(run: Run) -> None:
    """With its run removed or replaced it answers as before; after SIGKILL a new one does."""
    texts = ["w1 w2 w3", "w4", "w5 w6 " * 5]
    proba = load_run(run.path).predict_proba(texts)
    process, url = started(run.path)
    aside = run.path.with_name("aside")
    with ThreadPoolExecutor(4) as clients:
        going, wrong = threading.Event(), []

        def keep_asking() -> int:
            n_asked = 0
            while not going.is_set():
                answer = told(ask(url, texts), run.labels)
                if not np.allclose(answer, proba, atol=1e-5):
                    wrong.append(answer)
                n_asked += 1
            return n_asked

        asking = [clients.submit(keep_asking) for _ in range(3)]
        run.path.rename(aside)
        shutil.copytree(aside, run.path)
        shutil.rmtree(run.path)
        for _ in range(5):
            ask(url, texts)
        going.set()
        assert min(one.result() for one in asking) > 0
        assert not wrong
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(httpx.TransportError):
        ask(url, texts)
    _, message = subprocess.Popen(
        [sys.executable, "-Pc", COMMAND, str(run.path), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ).communicate()
    assert message.startswith("error: ")
    assert "Traceback" not in message
    aside.rename(run.path)
    process, url = started(run.path)
    np.testing.assert_allclose(told(ask(url, texts), run.labels), proba, atol=1e-5)
    process.terminate()
    process.communicate()
    assert process.returncode == 0


FAULTS: dict[str, dict[str, float]] = {
    "a fifth is 503": {"busy": 0.2, "lost": 0.0},
    "answers are lost": {"busy": 0.0, "lost": 0.15},
    "connections are reset": {"busy": 0.0, "lost": 0.0, "reset": 0.15},
    "slow": {"busy": 0.0, "lost": 0.0, "slow_s": 0.05},
    "all at once": {"busy": 0.2, "lost": 0.05, "reset": 0.05, "slow_s": 0.01},
}


@contextlib.contextmanager
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, **faults: float) -> Iterator[Any]:
    """An empty bucket behind a proxy of these faults, for this process and those it starts."""
    with faulty_proxy(endpoint, busy=0.0, lost=0.0) as (place, proxy):
        options = {"endpoint_url": place, "key": "testing", "secret": "testing"}
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        for name, value in options.items():
            monkeypatch.setenv(f"FSSPEC_S3_{name.upper()}", value)
        name = f"bucket-{uuid.uuid4().hex}"
        fsspec.filesystem("s3").mkdir(name)
        for fault, share in faults.items():
            setattr(proxy, fault, share)
        yield f"s3://{name}/toy.zarr", proxy


@pytest.mark.slow
@pytest.mark.fault("L3", "22", "23", "24")
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_ranks_in_parallel_write_right_rows_to_a_bad_store(
    settings: dict[str, Any],
    whole: dict[str, bytes],
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    faults: dict[str, float],
    tries: Callable[[int], None],
) -> None:
    """Three ranks at a time, run again where one gives up: the bytes of the local cache."""
    with bucket(s3_endpoint, monkeypatch, **faults) as (url, proxy):
        left, n_rounds = [0, 1, 2], 0
        while left:
            n_rounds += 1
            assert n_rounds < 5, "ranks do not come to their end"
            lines = [
                as_options(settings | {"cache": url, "rank": rank, "world": 3}) for rank in left
            ]
            started = [subprocess.Popen([sys.executable, "-Pc", EXTRACT, *line]) for line in lines]
            codes = [process.wait() for process in started]
            assert set(codes) <= {0, 1}
            left = [rank for rank, code in zip(left, codes, strict=True) if code]
        for name in faults:
            setattr(proxy, name, 0.0)
        finalize(url)
        store = open_store(url)
        assert verify(store).damage == ()
        assert {key: store.get(key) for key in store.walk()} == whole
        tries(sum(proxy.counts.values()) - (proxy.counts["fine"] if "slow_s" not in faults else 0))


@pytest.mark.fault("24", "L3")
def test_blocks_do_not_pile_up_before_a_slow_store(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one block is written, one other is computed, however long that takes."""
    launched, written, ahead = Counter[str](), Counter[str](), []
    launch, commit = Extractor.launch, blocks.commit

    def counted(*arguments: Any) -> Any:
        launched["n"] += 1
        ahead.append(launched["n"] - written["n"])
        return launch(*arguments)

    def slow(*arguments: Any) -> None:
        time.sleep(0.2)
        commit(*arguments)
        written["n"] += 1

    monkeypatch.setattr(Extractor, "launch", counted)
    monkeypatch.setattr(blocks, "commit", slow)
    url = f"memory://{uuid.uuid4().hex}/toy.zarr"
    assert extract(ExtractConfig(**settings, cache=url)).n_rows_computed == 300
    assert (written["n"], max(ahead)) == (5, 2)
