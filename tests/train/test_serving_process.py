"""The server as a process, and its page in a real browser."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from gated import LABELS, Gated, serving
from playwright.sync_api import Page, sync_playwright

from llmembed.train import Run

pytestmark = pytest.mark.slow
# A shell's job in the background ignores Ctrl-C.
HANDLED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
COMMAND = "from llmembed.train.cli.serve import serve_main; serve_main()"


def started(run: Run, code: str = HANDLED + COMMAND) -> subprocess.Popen[str]:
    command = [sys.executable, "-Pc", code, str(run.path), "--port", "0", "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def start(run: Run) -> tuple[subprocess.Popen[str], httpx.URL]:
    """Start the command, and wait until it has told its address."""
    process = started(run)
    assert process.stdout is not None
    return process, httpx.URL(json.loads(process.stdout.readline())["url"])


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_what_is_in_flight_is_answered_before_the_end(
    texts_run: Run, sent: signal.Signals, code: int
) -> None:
    """A request that came before the signal is read to its end and answered; no other one is."""
    process, url = start(texts_run)
    body = json.dumps({"texts": ["w1 w2"] * 200}).encode()
    head = (
        "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 100")  # it is being read
        process.send_signal(sent)
        while is_listening(url):
            pass
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"]) == 200
    _, said = process.communicate()
    assert (process.returncode, "Traceback" in said) == (code, False)
    assert ("interrupted. What was in flight is answered." in said) == (code == 130)


def test_who_stops_it_while_it_loads_waits_for_nothing(texts_run: Run) -> None:
    """A thread that loads cannot be told to stop: the process ends at once, with exit code 0."""
    forever = (
        "import time; from llmembed.train.serving.server import RunClassifier;"
        "RunClassifier.load = lambda self: time.sleep(3600);"
    )
    process = started(texts_run, forever + COMMAND)
    assert process.stderr is not None
    url = httpx.URL(process.stderr.readline().split()[5]).join("/livez")
    while not is_listening(url) or httpx.get(url, trust_env=False).status_code != 200:
        pass
    process.terminate()
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def is_listening(url: httpx.URL) -> bool:
    try:
        socket.create_connection((url.host, url.port)).close()
    except OSError:
        return False
    return True


def test_no_text_and_no_warning_of_a_text_is_said(texts_run: Run) -> None:
    """What is cut or empty is told by the answer alone, not by a line of log for each request."""
    process, url = start(texts_run)
    body = {"texts": ["w1 " * 100, ""]}
    answer = httpx.post(url.join("/predict"), json=body, trust_env=False).json()
    process.terminate()
    stdout, said = process.communicate()
    assert (answer["n_truncated"], process.returncode, stdout) == (1, 0, "")
    assert said.startswith("Loading the backbone; until then http://127.0.0.1:")
    assert len(said.splitlines()) == 1


@pytest.fixture(scope="module")
def browser() -> Any:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture(params=["light", "dark"])
def page(browser: Any, request: pytest.FixtureRequest) -> Any:
    """A narrow page that fails its test if it says an error, or asks for anything else."""
    page = browser.new_page(color_scheme=request.param, viewport={"width": 400, "height": 800})
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda one: page.asked.append(httpx.URL(one.url).path))
    yield page
    page.close()


def check(page: Page) -> None:
    """Nothing that a screen reader would miss; as wide as the window."""
    found = Axe().run(page).response["violations"]
    assert [one["id"] for one in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_a_text_is_tried_by_keyboard(page: Any) -> None:
    """The answer is told in words and in a table; names of classes are text, never HTML."""
    with serving(Gated()) as server:
        page.goto(server.url)
        check(page)
        page.keyboard.press("Tab")  # the link to the addresses
        page.keyboard.press("Tab")
        page.keyboard.type("a b c d")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.get_by_role("status").filter(has_text="short: 75.0 %").wait_for()
        assert page.get_by_role("rowheader").all_inner_texts() == list(LABELS)
        assert page.locator("tbody img").count() == 0
        check(page)
        page.get_by_label("Text to classify").fill("a " * 9)
        page.get_by_role("button").click()
        page.get_by_role("status").filter(has_text="the text was cut").wait_for()
        page.get_by_role("link").click()
        page.get_by_role("heading", name="POST /predict").wait_for()
        check(page)
    assert (page.said, page.asked) == ([], ["/", "/predict", "/predict", "/docs"])


def test_the_page_tells_why_there_is_no_answer(page: Any) -> None:
    """A refusal by its own sentence, and a server that has gone."""
    with serving(Gated(), takes_pairs=True, max_characters=9) as server:
        page.goto(server.url)
        page.get_by_label("First text of the pair").fill("a b c d e f g")
        page.get_by_label("Second text").fill("a")
        page.get_by_role("button").click()
        page.get_by_role("status").filter(has_text="at most 9 characters").wait_for()
        check(page)
    page.get_by_role("button").click()
    page.get_by_role("status").filter(has_text="The server does not answer").wait_for()
