"""The command `llmembed-serve`."""

from __future__ import annotations

import importlib.util

from llmembed.common.console import Command, answer, command
from llmembed.common.errors import MissingPackageError
from llmembed.train.cli import let_waiting_threads_sleep
from llmembed.train.serving.config import ServeConfig


class _Server(Command):
    resume_hint = "What was in flight is answered."


EXAMPLES = (
    "llmembed-serve runs/r8-cooc-0",
    "llmembed-serve runs/r8-cooc-0 --host 0.0.0.0 --port 80",
)


@command(ServeConfig, _Server, examples=EXAMPLES)
def serve_main(config: ServeConfig, *, as_json: bool, quiet: bool) -> None:
    """Answer requests with the RUN of this folder, until SIGTERM or Ctrl-C.

    POST /predict takes {"texts": ["...", ...], "top_k": 3}, / is a page to try texts, /docs lists
    the rest.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError.of(package, "serve", "llmembed-serve")
    let_waiting_threads_sleep()
    from llmembed.train.serving.server import serve

    def say(url: str) -> None:
        answer({"url": url}, f"{config.run} is served at {url}", as_json=as_json, quiet=quiet)

    serve(config, say)
