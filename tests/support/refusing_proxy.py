"""A server between an S3 client and an S3 server that refuses all requests while it is told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from faulty_proxy import FaultyProxy, _Handler


class RefusingProxy(FaultyProxy):
    """Passes requests on, or refuses them.

    Attributes:
        refusal: status and S3's code of the answer to all requests; status 0 is no answer.
        address: where it listens.
    """

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint, busy=0, lost=0)
        self.RequestHandlerClass = _Refusing
        self.refusal: tuple[int, str] | None = None
        host, port = self.server_address[:2]
        self.address = f"http://{host!s}:{port}"


class _Refusing(_Handler):
    server: RefusingProxy

    def _refuse_or_pass_on(self) -> None:
        if self.server.refusal is None:
            self._pass_on()
            return
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, code = self.server.refusal
        if status == 0:
            self.close_connection = True
            self.connection.close()
            return
        body = f"<Error><Code>{code}</Code><Message>It is so.</Message></Error>".encode()
        self._answer(status, [("Content-Type", "application/xml")], body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _refuse_or_pass_on  # noqa: N815


@contextmanager
def refusing_proxy(endpoint: str) -> Iterator[RefusingProxy]:
    """Serve on a free port of the loopback."""
    with RefusingProxy(endpoint) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
