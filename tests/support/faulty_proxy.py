"""A server between an S3 client and an S3 server that refuses, resets, delays, loses answers."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_BY_HOP = {"transfer-encoding", "connection"}


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on, of which some are refused, and others are done but not answered.

    Args:
        endpoint: the server behind, `http://host:port`.
        busy: share of requests that are answered 503.
        lost: share of requests whose answer is lost.
        reset: share of requests whose connection ends before they are done.
        slow_s: seconds that each answer takes longer.
        seed: of the choice.
    """

    daemon_threads = True

    def __init__(
        self,
        endpoint: str,
        *,
        busy: float,
        lost: float,
        reset: float = 0.0,
        slow_s: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = urlsplit(endpoint).netloc
        self.busy, self.lost, self.reset, self.slow_s = busy, lost, reset, slow_s
        self.counts = {"busy": 0, "lost": 0, "reset": 0, "fine": 0}
        self._random, self._one_at_a_time = random.Random(seed), threading.Lock()

    def fate(self) -> str:
        """Choose what becomes of a request, and count it."""
        with self._one_at_a_time:
            draw = self._random.random()
            busy, lost = self.busy, self.busy + self.lost
            limits = (("busy", busy), ("lost", lost), ("reset", lost + self.reset))
            found = next((name for name, limit in limits if draw < limit), "fine")
            self.counts[found] += 1
            return found

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = self.server.fate()
        if fate == "busy":
            self._answer(503, [("Content-Type", "application/xml")], _BUSY)
            return
        if fate == "reset":
            self._cut_off()
            return
        time.sleep(self.server.slow_s)
        behind = http.client.HTTPConnection(self.server.behind)
        behind.request(self.command, self.path, body, dict(self.headers))
        answer = behind.getresponse()
        content = answer.read()
        behind.close()
        if fate == "lost":
            self._cut_off()
            return
        self._answer(answer.status, answer.getheaders(), content)

    def _cut_off(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        head = self.command == "HEAD"
        for name, value in headers:
            if name.lower() not in _BY_HOP and (head or name.lower() != "content-length"):
                self.send_header(name, value)
        if not head:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(b"" if head else content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def faulty_proxy(
    endpoint: str, *, busy: float, lost: float, **more: Any
) -> Iterator[tuple[str, FaultyProxy]]:
    """Serve on a free port of the loopback; give the address and the counts."""
    with FaultyProxy(endpoint, busy=busy, lost=lost, **more) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        host, port = server.server_address[:2]
        yield f"http://{host!s}:{port}", server
        server.shutdown()
        thread.join()
