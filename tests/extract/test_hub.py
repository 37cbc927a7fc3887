"""What the Hub refuses, by a stand-in that listens on this machine alone."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for gated, private, unknown and absent revisions of models."""

    seen: ClassVar[list[str]] = []
    """Paths that were asked for."""

    def do_GET(self) -> None:
        self.seen.append(self.path)
        code, reason = 404, "RepoNotFound"
        if "/gated/" in self.path:
            code, reason = 403, "GatedRepo"
        elif "/private/" in self.path:
            code = 401
        if self.path.endswith("/revision/v9"):
            code, reason = 404, "RevisionNotFound"
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_CONNECT = do_GET  # noqa: N815 - the names that http.server calls

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_hub_s_refusals_say_what_to_do(hub: str) -> None:
    """Gated, private, unknown, no such revision: one sentence each, and no token in it."""
    code = """
import sys
from llmembed.common.errors import ModelNotFoundError
from llmembed.extract.backbones.models import find_model
for model, revision in (("gated/a", None), ("private/a", None), ("no/a", None), ("ok/a", "v9")):
    try:
        find_model(model, revision)
    except ModelNotFoundError as error:
        print(error)
"""
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_secret"}
    environment["HF_HUB_OFFLINE"] = "0"
    done = subprocess.run(
        [sys.executable, "-Pc", code], env=environment, capture_output=True, text=True, check=True
    )
    gated, private, unknown, revision = done.stdout.splitlines()
    assert "model 'gated/a' is gated. Accept its licence at" in gated
    assert "the Hub shows no model 'private/a'. Check the name; for a private model" in private
    assert "the Hub shows no model 'no/a'" in unknown
    assert "model 'ok/a' has no revision 'v9'. Pass a commit, branch or tag" in revision
    assert "hf_secret" not in done.stdout + done.stderr


OFFLINE = """
import sys, warnings
warnings.simplefilter("ignore")
from llmembed.common.errors import LLMEmbedError
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus
from llmembed.extract.backbones.models import find_model
texts = DatasetOptions("no/texts")
for find, what in ((find_model, "llama2-7b"), (find_model, "no/model"), (load_corpus, texts)):
    try:
        find(what)
    except LLMEmbedError as error:
        print(error)
"""


@pytest.mark.parametrize("offline", ["1", "0"])
def test_offline_nothing_is_asked(hub: str, tmp_path: Path, offline: str) -> None:
    """With HF_HUB_OFFLINE=1 models and data sets that are not here are named, without a request.

    Every request would come to the stand-in, which is the Hub and the proxy to all else: so without
    the setting it sees some.
    """
    Hub.seen.clear()
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), hub)
    environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": offline}
    done = subprocess.run(
        [sys.executable, "-Pc", OFFLINE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    errors = done.stdout.splitlines()
    names = ("Llama-2-7b", "no/model", "no/texts")
    assert all(name in error for name, error in zip(names, errors, strict=True)), errors
    assert bool(Hub.seen) == (offline == "0"), Hub.seen


UNREACHABLE = """
import sys
from llmembed.common.errors import DatasetNotFoundError
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus
try:
    load_corpus(DatasetOptions("no/texts"))
except DatasetNotFoundError as error:
    print(error)
import datasets
print(datasets.config.HF_HUB_OFFLINE, "torch" in sys.modules)
"""


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    """Where nothing listens the reason is told after one try, and no other try is logged."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-Pc", UNREACHABLE],
            env=os.environ
            | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
    error, state = done.stdout.splitlines()
    assert "data set 'no/texts' could not be loaded from the Hub: " in error
    assert "refused, and no copy of it is on this machine. Check the name, the network" in error
    assert state == "False False"
    assert "Retrying" not in done.stderr
