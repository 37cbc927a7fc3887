"""What `GET /metrics` tells, in the words of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = tuple(2**n for n in range(11))
_TOKENS = tuple(2**n for n in range(4, 17))


class Metrics:
    """Counts of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = one = CollectorRegistry()
        ProcessCollector(registry=one)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"llmembed_{name}", text, labels, registry=one)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"llmembed_{name}", text, registry=one)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"llmembed_{name}", text, registry=one, buckets=buckets)

        self.requests = counter("requests", "Requests to /predict, by their answer", ("status",))
        self.texts = counter("texts", "Texts classified")
        self.tokens = counter("tokens", "Tokens of the texts classified")
        self.truncated = counter("truncated_texts", "Texts cut at the run's max-length")
        self.failures = counter("failed_batches", "Batches that ended in an error")
        self.ready = gauge("ready", "1 once the backbone is loaded and warm")
        self.queue_requests = gauge("queue_requests", "Requests that are not answered yet")
        self.queue_tokens = gauge("queue_tokens", "Tokens that wait")
        self.batch_texts = histogram("batch_texts", "Texts computed together", _TEXTS)
        self.batch_tokens = histogram("batch_tokens", "Tokens computed together", _TOKENS)
        self.batch_seconds = histogram("batch_seconds", "Time to compute a batch", _SECONDS)
        self.request_seconds = histogram(
            "request_seconds", "Time from a request to its answer", _SECONDS
        )
