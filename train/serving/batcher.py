"""Who waits is computed together: one thread owns the backbone, and takes what is there.

Nothing waits for company: an idle server begins with the first request, and what comes meanwhile
is the next batch. Requests take turns, a text each, so that a large one does not hold up small
ones. A batch that fails is tried again request by request, so none fails for its neighbours; where
the backbone then fails at a text that it knew at the start, it is lost, and so is the server.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from llmembed.common.errors import EngineError, LLMEmbedError
from llmembed.train.measures import Floats
from llmembed.train.runs.predict import Counted
from llmembed.train.serving.config import Sizes

if TYPE_CHECKING:
    from llmembed.train.serving.metrics import Metrics

_LOG = logging.getLogger("llmembed.serving")
_LONGEST_RETRY_S = 60
_FAILED = "the texts could not be classified. The server's log says why."
_ENDING = "the server is ending. Ask another one."
LOADING, READY, ENDED = "loading", "ready", "ended"


Judged: TypeAlias = tuple[Floats, Floats]
"""Of N texts float64 `[N, C]`, their probabilities, and `[N]`, the share of training rows at least
as far from the others; 1 where nobody asks for it."""


class Classifier(Protocol):
    """What answers: a run with its backbone. Each method is called in one thread of its own."""

    def load(self) -> None:
        """Load what is needed and run it once; called before all else."""

    def count(self, texts: Sequence[str]) -> Counted:
        """Count the tokens of N texts; a DataError if they can't be classified."""

    def classify(self, texts: Sequence[str]) -> Judged:
        """Judge N texts."""

    def probe(self) -> None:
        """Fail if no text can be classified any more."""


class BusyError(Exception):
    """The server takes no request now."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FailedError(Exception):
    """A request's texts could not be computed."""


@dataclass(eq=False, kw_only=True)
class _Job:
    texts: Sequence[str]
    n_tokens: list[int]
    answer: asyncio.Future[Judged]
    parts: list[Judged] = field(default_factory=list)
    n_taken: int = 0

    @property
    def tokens_left(self) -> int:
        return sum(self.n_tokens[self.n_taken :])

    def receive(self, outcome: Judged | Exception) -> None:
        """Take what is said of the next texts, or the end."""
        if self.answer.done():
            return
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
            return
        self.parts.append(outcome)
        if sum(len(proba) for proba, _ in self.parts) == len(self.texts):
            proba, far = map(np.concatenate, zip(*self.parts, strict=True))
            self.answer.set_result((proba, far))


@dataclass(eq=False, kw_only=True)
class _Part:
    """Texts of a job that are in a batch."""

    job: _Job
    start: int
    stop: int

    @property
    def texts(self) -> Sequence[str]:
        return self.job.texts[self.start : self.stop]

    @property
    def n_tokens(self) -> int:
        return sum(self.job.n_tokens[self.start : self.stop])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request is told."""

    proba: Floats
    """float64 `[N, C]`."""
    far: Floats
    """float64 `[N]`, the share of training rows at least as far from the others; 1 unless asked."""
    is_cut: Sequence[bool]
    """Whether each of the N texts was cut."""


class Batcher:
    """The queue, and the loop that empties it; all but the classifier's work in one event loop."""

    def __init__(
        self,
        classifier: Classifier,
        sizes: Sizes,
        metrics: Metrics,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.state, self.is_loading = LOADING, False
        self._classifier, self._sizes, self._metrics = classifier, sizes, metrics
        self._on_ready = on_ready
        self._waiting: deque[_Job] = deque()
        self._n_requests = self._n_waiting_tokens = 0
        self._tokens_a_second = math.inf
        self._awake = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, "backbone")
        self._counting = ThreadPoolExecutor(1, "tokens")

    async def classify(self, texts: Sequence[str]) -> Answer:
        """Wait for the probabilities of a request's texts; if cancelled, those left are dropped.

        Raises:
            BusyError: the backbone is not there, or too much waits already.
            DataError: these texts are not what the run classifies.
            FailedError: the backbone failed at them.
        """
        self._refuse_if_busy(self._n_requests >= self._sizes.queue_requests)
        loop, job = asyncio.get_running_loop(), None
        self._set_requests(+1)
        try:
            counted = await loop.run_in_executor(self._counting, self._count, texts)
            self._refuse_if_busy()
            job = _Job(texts=texts, n_tokens=counted.n_tokens, answer=loop.create_future())
            self._waiting.append(job)
            self._set_tokens(job.tokens_left)
            self._awake.set()
            proba, far = await job.answer
        finally:
            self._set_requests(-1)
            if job is not None and job in self._waiting:
                self._drop(job)
        self._metrics.truncated.inc(counted.n_truncated)
        return Answer(proba=proba, far=far, is_cut=counted.is_cut)

    async def run(self) -> None:
        """Load, then answer until cancelled.

        Raises:
            LLMEmbedError: the backbone can't be loaded, or is lost.
        """
        loop = asyncio.get_running_loop()
        batch: list[_Part] = []
        try:
            await loop.run_in_executor(self._worker, self._load)
            self.state = READY
            self._on_ready()
            self._metrics.ready.set(1)
            while True:
                while batch := self._take():
                    started = time.monotonic()
                    outcomes = await loop.run_in_executor(self._worker, self._compute, batch)
                    self._measure(batch, outcomes, time.monotonic() - started)
                    for part, outcome in zip(batch, outcomes, strict=True):
                        part.job.receive(outcome)
                self._awake.clear()
                await self._awake.wait()
        finally:
            self._metrics.ready.set(0)
            self.state = ENDED
            for job in (*(part.job for part in batch), *self._waiting):
                job.receive(BusyError(_ENDING))

    def _load(self) -> None:
        self.is_loading = True
        try:
            self._classifier.load()
        except SystemExit as error:
            raise EngineError(
                f"the backbone ended while it was loaded: {_described(error)} Load it alone with "
                "llmembed-predict to see why."
            ) from error
        finally:
            self.is_loading = False

    def _count(self, texts: Sequence[str]) -> Counted:
        """Count tokens, in a thread of its own."""
        try:
            return self._classifier.count(texts)
        except LLMEmbedError:
            raise
        except BaseException as error:
            self._metrics.failures.inc()
            _LOG.error("Tokens were not counted (texts: %d): %s", len(texts), _described(error))
            raise FailedError(_FAILED) from error

    def _refuse_if_busy(self, too_many: bool = False) -> None:
        if self.state != READY:
            is_loading = self.state == LOADING
            raise BusyError(
                "the backbone is not loaded yet. Try again when GET /healthz is ready."
                if is_loading
                else _ENDING
            )
        if too_many or self._n_waiting_tokens >= self._sizes.queue_tokens:
            seconds = math.ceil(self._n_waiting_tokens / self._tokens_a_second)
            raise BusyError(
                f"{self._n_requests} requests with {self._n_waiting_tokens:,} tokens wait already. "
                "Try again later, as Retry-After says.",
                min(max(1, seconds), _LONGEST_RETRY_S),
            )

    def _drop(self, job: _Job) -> None:
        self._waiting.remove(job)
        self._set_tokens(-job.tokens_left)

    def _take(self) -> list[_Part]:
        """Take a text of each request in turn, up to the tokens of a batch, and one at least."""
        parts: dict[_Job, _Part] = {}
        n_tokens = 0
        while self._waiting:
            job = self._waiting[0]
            if job.answer.done():  # given up, or failed
                self._drop(job)
                continue
            needed = job.n_tokens[job.n_taken]
            if parts and n_tokens + needed > self._sizes.batch_tokens:
                break
            self._waiting.popleft()
            part = parts.setdefault(job, _Part(job=job, start=job.n_taken, stop=job.n_taken))
            n_tokens += needed
            job.n_taken = part.stop = part.stop + 1
            if job.n_taken < len(job.texts):
                self._waiting.append(job)
        self._set_tokens(-n_tokens)
        return list(parts.values())

    def _compute(self, batch: Sequence[_Part]) -> list[Judged | Exception]:
        """Classify a batch, in the backbone's thread; each part gets its rows, or what failed."""
        texts = [text for part in batch for text in part.texts]
        try:
            judged = self._classifier.classify(texts)
        except BaseException as error:  # noqa: BLE001 - the server lives on, a panic or exit too
            self._metrics.failures.inc()
            _LOG.error("A batch failed (texts: %d): %s", len(texts), _described(error))
            try:
                self._classifier.probe()
            except BaseException as lost:  # noqa: BLE001 - any end of it
                raise EngineError(
                    "the backbone no longer classifies what it did at the start: "
                    f"{_described(lost)} Start the server again."
                ) from error
            if len(batch) > 1:
                return [outcome for part in batch for outcome in self._compute([part])]
            return [FailedError(_FAILED)]
        ends = np.cumsum([len(part.texts) for part in batch])
        proba, far = (np.split(rows, ends[:-1]) for rows in judged)
        return list(zip(proba, far, strict=True))

    def _measure(
        self, batch: Sequence[_Part], outcomes: Sequence[Judged | Exception], seconds: float
    ) -> None:
        n_texts = sum(len(one[0]) for one in outcomes if not isinstance(one, Exception))
        n_tokens = sum(part.n_tokens for part in batch)
        self._tokens_a_second = n_tokens / max(seconds, 1e-9)
        self._metrics.texts.inc(n_texts)
        self._metrics.tokens.inc(n_tokens)
        self._metrics.batch_texts.observe(n_texts)
        self._metrics.batch_tokens.observe(n_tokens)
        self._metrics.batch_seconds.observe(seconds)

    def _set_requests(self, change: int) -> None:
        self._n_requests += change
        self._metrics.queue_requests.set(self._n_requests)

    def _set_tokens(self, change: int) -> None:
        self._n_waiting_tokens += change
        self._metrics.queue_tokens.set(self._n_waiting_tokens)


def _described(error: BaseException) -> str:
    """Say what happened, for a log: a message that is not ours could hold a text."""
    if isinstance(error, LLMEmbedError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {where.filename}, line {where.lineno}."
