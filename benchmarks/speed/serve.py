"""What a server holds: many clients at a time, against one request at a time and one full batch.

    python benchmarks serve                              # 200 clients for 60 s, on loopback

The server is `llmembed-serve` as a process, with a run on MiniLM; the clients are a process of
their own, each with one connection and one text of 14 words (16 tokens) a request, and the next
request when the last is answered. *A full batch* is one request of 256 such texts, 4,096 tokens,
alone. *One at a time* is one client, before and after the many. Both processes share the cores.
Answers under load are compared with those that the run gives for each text alone.
"""

from __future__ import annotations

import asyncio
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import numpy as np
from harness import least, most

if TYPE_CHECKING:
    from llmembed.train import Run

SERVE = "from llmembed.train.cli.serve import serve_main; serve_main()"
WORDS = ("oil", "bank", "gold", "rate", "share", "price", "dollar", "year", "trade", "profit")
A_TEXT, A_BATCH, N_DIFFERENT = 14, 256, 50
BARS = {
    "failed requests": most(0),
    "p99 over one full batch": most(5),
    "throughput over one request at a time": least(5),
    "largest difference from each text alone": most(0.02),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a server, or be its clients."""
    parser = harness.command_line(__doc__, "speed/serve.json")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--at", help="be the clients of the server at this port")
    options = parser.parse_args(arguments)
    if options.at:
        print(json.dumps(asyncio.run(clients(int(options.at), options.clients, options.seconds))))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(a_run(Path(folder), options.model), options.clients, options.seconds)
    for name, figure in result["figures"].items():
        print(BARS[name].line(name, figure))
    harness.finish(result, options.output)


def made_up(n: int) -> list[str]:
    """Make different texts."""
    chosen = random.Random(0)  # noqa: S311 - no secret
    return [" ".join(chosen.choices(WORDS, k=A_TEXT)) for _ in range(n)]


def a_run(folder: Path, model: str) -> Run:
    from llmembed.extract import ExtractConfig, extract  # clients need none of this
    from llmembed.train import FitConfig, fit

    texts, path = made_up(400), folder / "texts.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [(text, ("other", "oil")[text.startswith(WORDS[:5])]) for text in texts]
        csv.writer(file).writerows([("text", "label"), *rows])
    cache = str(folder / "texts.zarr")
    wanted = ExtractConfig(
        model=model, layers="-1", pooling=("mean",), dataset=str(path), cache=cache
    )
    extract(wanted)
    return fit(FitConfig(cache=cache, fusion="mean", output=str(folder / "run")))


def measure(run: Run, n_clients: int, seconds: float) -> dict[str, Any]:
    """Start a server, load it, and end it by SIGTERM."""
    command = [sys.executable, "-c", SERVE, str(run.path), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        port = url.rpartition(":")[2].rstrip("/")
        full, _ = harness.median_s(lambda: post(url, made_up(A_BATCH)), rounds=5)
        one = [in_process(port, 1, seconds / 6)]
        many = in_process(port, n_clients, seconds)
        one.append(in_process(port, 1, seconds / 6))
        server.terminate()
    assert server.returncode == 0
    alone = [run.predict_proba([text]).max() for text in made_up(N_DIFFERENT)]
    answers = [found.pop("answers") for found in (*one, many)][-1]
    differences = [abs(a - b) for a, b in zip(answers, alone, strict=True) if a is not None]
    rate = statistics.mean(found["a_second"] for found in one)
    return harness.load() | {
        "full_batch_s": full,
        "one": one,
        "many": many,
        "figures": {
            "failed requests": many["n_failed"],
            "p99 over one full batch": many["p99_s"] / full,
            "throughput over one request at a time": many["a_second"] / rate,
            "largest difference from each text alone": max(differences),
        },
    }


def post(url: str, texts: Sequence[str]) -> Any:
    body, headers = json.dumps({"texts": texts}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}predict", body, headers)  # noqa: S310 - loopback
    with urllib.request.urlopen(request) as answer:  # noqa: S310 - loopback
        return json.load(answer)


def in_process(port: str, n_clients: int, seconds: float) -> dict[str, Any]:
    command = [sys.executable, str(harness.HERE), "serve", "--at", port]
    command += ["--clients", str(n_clients), "--seconds", str(seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def clients(port: int, n_clients: int, seconds: float) -> dict[str, Any]:
    """Ask as fast as answers come; what failed, how long answers took, what they were."""
    requests = []
    for text in made_up(N_DIFFERENT):
        body = json.dumps({"texts": [text], "top_k": 1}).encode()
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    taken: list[float] = []
    answers: dict[int, float] = {}
    n_failed = 0
    began = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal n_failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < began + seconds:
            number = (number + 1) % N_DIFFERENT
            started = time.perf_counter()
            writer.write(requests[number])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            answer = json.loads(await reader.readexactly(length))
            taken.append(time.perf_counter() - started)
            if head.startswith(b"HTTP/1.1 200"):
                (best,) = answer["predictions"][0]["labels"]
                answers[number] = best["probability"]
            else:
                n_failed += 1
        writer.close()

    ended = await asyncio.gather(*map(client, range(n_clients)), return_exceptions=True)
    n_failed += sum(isinstance(one, BaseException) for one in ended)
    return {
        "n_clients": n_clients,
        "n_requests": len(taken),
        "n_failed": n_failed,
        "a_second": len(taken) / (time.perf_counter() - began),
        "median_s": float(np.median(taken)),
        "p99_s": float(np.percentile(taken, 99)),
        "answers": [answers.get(number) for number in range(N_DIFFERENT)],
    }
