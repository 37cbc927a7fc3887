"""What is computed together, and who waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from gated import Gated, expected
from hypothesis import given
from hypothesis import strategies as st

from llmembed.common.errors import ConfigError, EngineError
from llmembed.train.serving.batcher import READY, Batcher, BusyError, FailedError
from llmembed.train.serving.config import Sizes
from llmembed.train.serving.metrics import Metrics


def with_batcher(
    classifier: Gated, work: Callable[[Batcher], Awaitable[None]], **sizes: int
) -> None:
    """Do something with a batcher at work, in an event loop of its own."""

    async def main() -> None:
        defaults = {"batch_tokens": 8, "queue_tokens": 1000, "queue_requests": 100}
        batcher = Batcher(classifier, Sizes(**{**defaults, **sizes}), Metrics())
        running = asyncio.create_task(batcher.run())
        await until(lambda: batcher.state == READY)
        try:
            await work(batcher)
        finally:
            classifier.gate.set()
            running.cancel()
            await asyncio.wait({running})

    asyncio.run(main())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # the test's own time limit ends it
        await asyncio.sleep(0.001)


async def hold(batcher: Batcher, classifier: Gated) -> asyncio.Task[object]:
    task = asyncio.create_task(batcher.classify(["hold"]))
    await until(lambda: classifier.batches == [["hold"]])
    return task


@given(
    st.lists(
        st.lists(st.integers(1, 9).map(lambda n: " ".join(["w"] * n)), min_size=1, max_size=9),
        min_size=1,
        max_size=9,
    )
)
def test_every_text_is_classified_once_and_answered_in_its_place(requests: list[list[str]]) -> None:
    """Whatever is asked at a time, no batch exceeds its tokens, and each request gets its rows."""
    classifier = Gated()

    async def work(batcher: Batcher) -> None:
        answers = await asyncio.gather(*map(batcher.classify, requests))
        for texts, answer in zip(requests, answers, strict=True):
            np.testing.assert_array_equal(answer.proba, expected(texts))
            np.testing.assert_array_equal(answer.far, expected(texts)[:, 1])
            assert answer.is_cut == [len(text.split()) == 9 for text in texts]
        assert batcher._n_waiting_tokens == batcher._n_requests == 0

    with_batcher(classifier, work)
    sizes = [sum(min(8, len(text.split())) for text in batch) for batch in classifier.batches]
    assert max(sizes) <= 8
    assert sum(map(len, classifier.batches)) == sum(map(len, requests))


def test_what_waits_is_one_batch_and_requests_take_turns() -> None:
    """Nothing waits for company; texts that waited are computed together, a large request last."""
    classifier = Gated(is_open=False)

    async def work(batcher: Batcher) -> None:
        held = await hold(batcher, classifier)
        large, small = ["a a", "b b", "c c", "d d"], ["e e"]
        tasks = [held]
        for n_tokens, texts in ((8, large), (10, small)):
            tasks.append(asyncio.create_task(batcher.classify(texts)))
            await until(lambda n_tokens=n_tokens: batcher._n_waiting_tokens == n_tokens)
        classifier.gate.set()
        await asyncio.gather(*tasks)

    with_batcher(classifier, work)
    assert classifier.batches == [["hold"], ["a a", "b b", "c c", "e e"], ["d d"]]


def test_a_text_beyond_the_tokens_of_a_batch_is_a_batch() -> None:
    """It is not refused and holds up nothing."""
    classifier = Gated()

    async def work(batcher: Batcher) -> None:
        await batcher.classify(["a a a", "b"])

    with_batcher(classifier, work, batch_tokens=1)
    assert classifier.batches == [["a a a"], ["b"]]


@pytest.mark.parametrize("sizes", [{"queue_tokens": 3}, {"queue_requests": 2}])
def test_a_full_queue_refuses_and_says_for_how_long(sizes: dict[str, int]) -> None:
    """Further requests are refused at once; later there is room again."""
    classifier = Gated(is_open=False)

    async def work(batcher: Batcher) -> None:
        tasks = [await hold(batcher, classifier)]
        tasks.append(asyncio.create_task(batcher.classify(["a a a"])))
        await until(lambda: batcher._n_waiting_tokens == 3)
        with pytest.raises(BusyError, match="2 requests with 3 tokens wait already") as caught:
            await batcher.classify(["b"])
        assert caught.value.retry_after_s >= 1
        classifier.gate.set()
        await asyncio.gather(*tasks, return_exceptions=False)
        await batcher.classify(["b"])

    with_batcher(classifier, work, **sizes)
    assert classifier.batches == [["hold"], ["a a a"], ["b"]]


def test_a_request_that_is_given_up_costs_no_pass() -> None:
    """What it left in the queue is dropped, and its room is free."""
    classifier = Gated(is_open=False)

    async def work(batcher: Batcher) -> None:
        held = await hold(batcher, classifier)
        given_up = asyncio.create_task(batcher.classify(["a a"]))
        await until(lambda: batcher._n_waiting_tokens == 2)
        given_up.cancel()
        await asyncio.wait({given_up})
        assert batcher._n_waiting_tokens == 0
        classifier.gate.set()
        await held
        await batcher.classify(["b"])

    with_batcher(classifier, work)
    assert classifier.batches == [["hold"], ["b"]]


def test_a_request_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Neighbours of a text that breaks a pass are answered, what was left of its request is not.

    The log says where it happened, and no text.
    """
    classifier = Gated(is_open=False)

    async def work(batcher: Batcher) -> None:
        tasks = [await hold(batcher, classifier)]
        for n_tokens, texts in ((17, ["poison", *["w w w w w w w w"] * 2]), (18, ["good"])):
            tasks.append(asyncio.create_task(batcher.classify(texts)))
            await until(lambda n_tokens=n_tokens: batcher._n_waiting_tokens == n_tokens)
        classifier.gate.set()
        _, broken, good = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(broken, FailedError)
        np.testing.assert_array_equal(good.proba, expected(["good"]))
        assert (await batcher.classify(["later"])).is_cut == [False]

    with caplog.at_level(logging.ERROR), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("llmembed"), "propagate", True)
        with_batcher(classifier, work, batch_tokens=9)
    assert classifier.batches[1:] == [["poison", "good"], ["poison"], ["good"], ["later"]]
    assert "RuntimeError in" in caplog.text
    assert "poison" not in caplog.text


def test_a_lost_backbone_ends_the_server() -> None:
    """Where the text of the start fails too, everybody is told, and the loop ends in a sentence."""
    classifier = Gated(is_open=False)

    async def main() -> None:
        sizes = Sizes(batch_tokens=1, queue_tokens=10, queue_requests=10)
        batcher = Batcher(classifier, sizes, Metrics())
        running = asyncio.create_task(batcher.run())
        await until(lambda: batcher.state == READY)
        tasks = [await hold(batcher, classifier), asyncio.create_task(batcher.classify(["a"]))]
        await until(lambda: batcher._n_waiting_tokens == 1)
        classifier.is_lost = True
        classifier.gate.set()
        with pytest.raises(EngineError, match="no longer classifies what it did at the start"):
            await running
        for task in tasks:
            with pytest.raises(BusyError, match="the server is ending"):
                await task
        with pytest.raises(BusyError, match="the server is ending"):
            await batcher.classify(["b"])

    asyncio.run(main())


def test_who_comes_before_the_backbone_is_told_so() -> None:
    """Nothing is queued while it loads; a load that fails ends the loop with its sentence."""
    classifier = Gated()
    classifier.loaded.clear()

    async def main() -> None:
        sizes = Sizes(batch_tokens=1, queue_tokens=10, queue_requests=10)
        batcher = Batcher(classifier, sizes, Metrics())
        running = asyncio.create_task(batcher.run())
        await until(lambda: batcher.is_loading)
        with pytest.raises(BusyError, match="the backbone is not loaded yet"):
            await batcher.classify(["a"])

        def fail() -> None:
            raise ConfigError("no such backbone.")

        classifier.loaded.set()
        await until(lambda: batcher.state == READY)
        running.cancel()
        await asyncio.wait({running})
        classifier.load = fail  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match="no such backbone"):
            await Batcher(classifier, sizes, Metrics()).run()

    asyncio.run(main())
