"""Targets: what a server is sent over a socket: bodies of any kind, and damaged requests."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from urllib.parse import urlsplit

from fuzzing import Targets, Try, as_bytes, check_sentence, mutated, mutated_json
from gated import Gated, serving

LIMITS = {"max_texts": 5, "max_characters": 200, "max_body_bytes": 4000}
ASKED = ({"texts": ["one two", "\u00fc \U0001f9ff"], "top_k": 1}, {"texts": ["no pair"]})
WHILE_S = 60.0  # for which an answer is waited; none takes a tenth of a second


class Client:
    """One server, and a connection for each request."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        server = stack.enter_context(serving(Gated(), **LIMITS))
        place = urlsplit(server.url)
        self.address = (str(place.hostname), int(place.port or 0))

    def send(self, request: bytes, *, to_the_end: bool = False) -> tuple[int, bytes]:
        """Send bytes, and give the status and body; 0 for a connection that is closed."""
        answer = b""
        with socket.create_connection(self.address, timeout=WHILE_S) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
                if to_the_end:  # or the server waits for what a broken head announces
                    connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(2**16):
                    answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        return (int(head.split(b" ", 2)[1]) if head else 0), body


def request(body: bytes, kind: str = "application/json") -> bytes:
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def bodies(stack: contextlib.ExitStack) -> Try:
    """A body that is JSON of another shape, or none: 200, or 4xx in a sentence."""
    client = Client(stack)

    def one(rng: random.Random) -> bool:
        asked = rng.choice(ASKED)
        if rng.random() < 0.7:
            body = as_bytes(mutated_json(rng, asked))
        else:
            body = mutated(rng, json.dumps(asked, ensure_ascii=rng.random() < 0.5).encode())
        status, answered = client.send(request(body))
        document = json.loads(answered)
        if status == 200:
            assert len(document["predictions"]) >= 1
            return True
        assert 400 <= status < 500, (status, answered[:300])
        check_sentence(document["error"])
        return False

    return one


def requests(stack: contextlib.ExitStack) -> Try:
    """A damaged request: 4xx, an answer, or the end of the connection; the server lives on."""
    client = Client(stack)
    sound = [request(as_bytes(asked)) for asked in ASKED]
    sound += [b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]
    sound += [
        request(b"x", "text/\xe9"),
        request(b"{}").replace(b"Length: 2", b"Length: " + b"9" * 5000),
    ]

    def one(rng: random.Random) -> bool:
        status, answered = client.send(mutated(rng, rng.choice(sound), sound), to_the_end=True)
        assert status < 500, (status, answered[:300])
        return status == 200

    return one


TARGETS: Targets = {"bodies": bodies, "requests": requests}
