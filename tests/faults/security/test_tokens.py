"""Tokens and passwords are told to nobody."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import click
import httpx
import pytest
from canaries import CANARY, SECRETS, files_with
from toy_commands import EXTRACTED, run, start
from watching import told, watched

from llmembed.cache_format.cli import main as cache_main
from llmembed.extract.cli import main as extract_main
from llmembed.train.cli.fit import fit_main
from llmembed.train.cli.predict import predict_main
from llmembed.train.cli.report import report_main

Tries = Callable[[int], None]
PLACES = (
    "https://user:{}@127.0.0.1:9/cache.zarr",
    "http://{}@127.0.0.1:9/cache.zarr",
    "ftp://user:{}@127.0.0.1:9/cache.zarr",
    "s3://user:{}@bucket/cache.zarr",
    "nothing://user:{}@host/cache.zarr",
    "https://127.0.0.1:9/cache.zarr?X-Amz-Signature={}",
    "hf://user:{}@datasets/a/b",
)


def environment_of(folder: Path) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    return watched(folder, {**plain, **SECRETS, "HF_HUB_OFFLINE": "0"})


@pytest.mark.slow
@pytest.mark.fault("S5")
def test_tokens_are_told_to_nobody(world: Path, tmp_path: Path, tries: Tries) -> None:
    """From extraction to an answered request, with --debug: in no output, file or command line."""
    environment = environment_of(tmp_path / "watch")
    given = ["--model", "toy", "--dataset", "topics", "--debug", *EXTRACTED[:-1]]
    lines = [
        ["extract", *given, "--cache", "two.zarr", "--devices", "2", "--device", "cpu"],
        ["extract", *given, "--cache", "rank.zarr", "--rank", "0", "--world", "2"],
        ["extract", *given, "--cache", "rank.zarr", "--rank", "1", "--world", "2"],
        ["cache", "finalize", "rank.zarr", "--debug"],
        ["fit", "--cache", "two.zarr", "--output", "r", "--store-texts", "--debug"],
        ["predict", "--run", "r", "--text", "w1 w2", "--debug"],
        ["extract", "--model", "no/such-model", *given[2:], "--cache", "x.zarr"],
    ]
    for line in lines:
        process = start(*line, environment=environment)
        for output in process.communicate():
            assert CANARY not in output, line
        assert process.returncode == (1 if "no/such" in str(line) else 0), line
    server = start("serve", "r", "--port", "0", "--json", "--debug", environment=environment)
    assert server.stdout is not None
    url = json.loads(server.stdout.readline())["url"]
    for path in ("predict", "metrics", "docs", "openapi.json", ""):
        body = json.dumps({"texts": ["w1"]}) if path == "predict" else None
        verb, kind = ("POST" if body else "GET"), {"Content-Type": "application/json"}
        answer = httpx.request(verb, url + path, content=body, headers=kind, trust_env=False)
        assert (answer.status_code, CANARY in answer.text) == (200, False)
    server.terminate()
    for output in server.communicate():
        assert CANARY not in output
    events = told(tmp_path / "watch")
    started = [line for event, line in events if event == "subprocess.Popen"]
    assert len(started) >= 2  # the processes of --devices
    assert not [line for line in started if CANARY in " ".join(line)]
    assert files_with(world, CANARY) == []
    assert files_with(Path(os.environ["LLMEMBED_HOME"]), CANARY) == []
    tries(len(SECRETS) * (len(lines) + 6))


@pytest.mark.fault("S5")
def test_passwords_in_urls_are_not_repeated(world: Path, tries: Tries) -> None:
    """A place with a password or a signature is refused without them, with --debug too."""
    number = 0
    for place in (one.format(CANARY) for one in PLACES):
        for command, *arguments in (
            (extract_main, "--model", "toy", "--dataset", "topics", "--cache", place, *EXTRACTED),
            (fit_main, "--cache", place),
            (cache_main, "info", place),
            (cache_main, "copy", "topics.zarr", place),
            (report_main, "--cache", place),
            (extract_main, "--model", place, "--dataset", "topics", *EXTRACTED),
            (extract_main, "--model", "toy", "--dataset", place, *EXTRACTED),
            (predict_main, "--run", place, "--text", "w1"),
        ):
            assert isinstance(command, click.Command)
            result = run(command, *map(str, arguments))
            assert result.exit_code in {1, 2}, (arguments, result.output)
            assert CANARY not in result.output, result.output
            assert isinstance(result.exception, SystemExit), result.exception
            number += 1
    assert files_with(world, CANARY) == []
    tries(number)
