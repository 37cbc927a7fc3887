"""The server as a process: it listens before it can answer, and ends when all is answered."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import uvicorn

from llmembed.common.console import EXIT_INTERRUPTED
from llmembed.common.errors import ConfigError, LLMEmbedWarning
from llmembed.train.measures import Floats
from llmembed.train.measures.doubt import answered
from llmembed.train.runs.folder import load_run
from llmembed.train.runs.predict import Counted, notes_on
from llmembed.train.runs.run import Run
from llmembed.train.serving.app import Served, make_app
from llmembed.train.serving.batcher import Answer, Batcher, Classifier, Judged
from llmembed.train.serving.config import ServeConfig
from llmembed.train.serving.metrics import Metrics

_LOG = logging.getLogger("llmembed.serving")
_GRACE_S, _KEEP_ALIVE_S = 30, 75
_TOLD_BY_THE_ANSWER = r".*( were| was) cut at |.* got the feature of the lone token"
_TOLD_AT_THE_START = r".* classes have too few held-out rows"
_PROBE = "one text"


class RunClassifier:
    """A run that answers; its backbone stays where the config puts it.

    Raises:
        ConfigError: the run does not keep what tells how far a text lies from those of the
            training, and the config asks for it.
    """

    def __init__(self, run: Run, config: ServeConfig) -> None:
        self._run, self._config = run, config
        self._domain = run.require_domain() if config.ood else None
        self._probe = [f"{_PROBE}\x1f{_PROBE}" if run.takes_pairs else _PROBE]

    def load(self) -> None:
        """Load the backbone, classify a text, make the counter of tokens."""
        self.probe()
        self._count = self._run.token_counter()

    def count(self, texts: Sequence[str]) -> Counted:
        """Count tokens."""
        return self._count(texts)

    def classify(self, texts: Sequence[str]) -> Judged:
        """Give probabilities and, where it is asked for, how far texts lie from the training."""
        return self._run.judge(
            texts,
            self._config.device,
            self._domain,
            model=self._config.model,
            trust_remote_code=self._config.trust_remote_code,
        )

    def probe(self) -> None:
        """Classify a text that is no user's."""
        self.classify(self._probe)


class Server(uvicorn.Server):
    """A server that holds its address, and knows why it ended.

    Raises:
        ConfigError: the address is taken.
    """

    def __init__(
        self,
        config: ServeConfig,
        served: Served,
        classifier: Classifier,
        on_ready: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._listener = _listen(config.host, config.port)
        host, port = self._listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        self._why: BaseException | None = None
        metrics = Metrics()
        self.batcher = Batcher(classifier, config.sizes, metrics, lambda: on_ready(self.url))
        settings = uvicorn.Config(
            make_app(served, self.batcher, metrics, config.limits, self._end),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
        )
        super().__init__(settings)

    def answer(self) -> None:
        """Answer requests until told to stop.

        Raises:
            LLMEmbedError: the backbone can't be loaded, or is lost.
            KeyboardInterrupt: Ctrl-C ended it.
        """
        self.run(sockets=[self._listener])
        if self._why is not None:
            raise self._why

    def _end(self, why: BaseException | None) -> None:
        self._why, self.should_exit = why, True


def serve(config: ServeConfig, on_ready: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C; what is in flight then is answered, for 30 s.

    Args:
        config: what to serve, where, how much of it.
        on_ready: told the address as soon as requests are answered.

    Raises:
        ConfigError: the address is taken.
        LLMEmbedError: the run or its backbone can't be loaded, or the backbone is lost.
        KeyboardInterrupt: Ctrl-C ended it.
    """
    run = load_run(config.run)
    served = Served(
        name=run.path.resolve().name,
        labels=run.labels,
        thresholds=run.thresholds,
        takes_pairs=run.takes_pairs,
        version=version("llmembed-cache"),
        doubts=doubts_of(run, config),
    )
    server = Server(config, served, RunClassifier(run, config), on_ready)
    _LOG.info("Loading the backbone; until then %shealthz answers 503.", server.url)
    ignore_what_is_told()
    # uvicorn raises what ended it once more; of SIGTERM nothing is left to be done.
    before = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        server.answer()
    finally:
        signal.signal(signal.SIGTERM, before)
        if server.batcher.is_loading:
            # A thread that loads a backbone cannot be told to stop, and has nothing to lose.
            sys.stdout.flush()
            os._exit(EXIT_INTERRUPTED if sys.exception() else 0)


def doubts_of(
    run: Run, config: ServeConfig
) -> Callable[[Sequence[str], Answer], dict[str, list[Any]]]:
    """Make what tells the doubts that the config asks for, of texts and what is said of them.

    Raises:
        ConfigError: the rows that the run held out do not reach a share, or it keeps none.
    """
    below = None if config.abstain is None else run.abstain_below(config.abstain)

    def label_sets(proba: Floats) -> list[list[str]]:
        assert config.conformal is not None
        return run.label_sets(proba, config.conformal, by_class=config.conformal_by == "class")

    if config.conformal is not None:
        label_sets(np.empty((0, len(run.labels))))  # refuses, or says which classes are too small

    def tell(texts: Sequence[str], found: Answer) -> dict[str, list[Any]]:
        told: dict[str, list[Any]] = {}
        if below is not None:
            told["abstained"] = (~answered(found.proba, below)).tolist()
        if config.conformal is not None:
            told["label_set"] = label_sets(found.proba)
        if config.ood:
            told["out_of_domain"] = found.far.round(6).tolist()
            told["note"] = notes_on(texts, found.is_cut)
        return told

    return tell


def ignore_what_is_told() -> None:
    """Ignore warnings of what each answer says, and of what was said at the start."""
    for said in (_TOLD_BY_THE_ANSWER, _TOLD_AT_THE_START):
        warnings.filterwarnings("ignore", said, LLMEmbedWarning)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
        # asyncio sets it only where it knows the protocol. Without it an answer, sent in two parts,
        # waits 40 ms for the client's word that the first has come.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"host {host}, port {port}: {reason}. Pass another --host or --port."
        ) from error
