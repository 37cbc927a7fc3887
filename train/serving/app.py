"""The addresses of a server: /predict for programs, / for people, and what watches over it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llmembed.common.errors import DataError
from llmembed.train.measures import Floats
from llmembed.train.serving.batcher import READY, Answer, Batcher, BusyError, FailedError
from llmembed.train.serving.bodies import (
    Predictions,
    Problem,
    RefusedError,
    answer,
    body_model,
    parse,
    read_body,
)
from llmembed.train.serving.config import Limits
from llmembed.train.serving.metrics import Metrics

_CLIENT_LEFT = 499  # in the metrics; nobody reads it
_HERE = Path(__file__).parent
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader([_HERE, _HERE.parent / "reports" / "templates"]),
    autoescape=True,
)
_SAID_OF = {
    400: "The body is not JSON, or a text is not what the run classifies.",
    413: "The body is too large.",
    415: "The body is not called application/json.",
    422: "The body holds something else than texts, or too many or too long ones.",
    500: "The backbone failed at these texts.",
    503: "The backbone is not loaded yet, or too much waits; Retry-After says when to try again.",
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": said} for code, said in _SAID_OF.items()
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the pages say of a run."""

    name: str
    labels: Sequence[str]
    takes_pairs: bool
    version: str
    doubts: Callable[[Sequence[str], Answer], Mapping[str, Sequence[Any]]] = lambda *_: {}
    """Of N texts and what is said of them, further fields of each answer, by name."""
    thresholds: Floats | None = None


def make_app(
    served: Served,
    batcher: Batcher,
    metrics: Metrics,
    limits: Limits,
    on_end: Callable[[BaseException | None], None],
) -> FastAPI:
    """Make the application; `on_end` is told when the batcher ends by itself, and why."""

    def ended(working: asyncio.Task[None]) -> None:
        if not working.cancelled():
            on_end(working.exception())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(batcher.run())
        working.add_done_callback(ended)
        yield
        working.cancel()
        await asyncio.wait({working})

    app = FastAPI(
        title=f"llmembed: {served.name}",
        version=served.version,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        exception_handlers={HTTPException: _no_such_place},
    )
    predict = _Predict(served, batcher, metrics, limits)
    schema = predict.body.model_json_schema()
    app.post(
        "/predict",
        summary="Classify texts.",
        response_model=Predictions,
        response_model_exclude_none=True,
        responses={
            code: {"model": Problem, "description": said} for code, said in _SAID_OF.items()
        },
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
    )(predict.answer)

    @app.get("/healthz", summary="200 once the backbone is loaded and warm, 503 before and after.")
    async def healthz() -> JSONResponse:
        status = 200 if batcher.state == READY else 503
        return JSONResponse({"status": batcher.state}, status)

    @app.get("/livez", summary="200 as long as the process answers, while it loads, too.")
    async def livez() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/metrics", summary="Counts and times, for Prometheus.")
    async def all_metrics() -> Response:
        content = generate_latest(metrics.registry)
        return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return _page("docs.html.j2", served, schema=app.openapi(), base=request.base_url)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return _page("page.html.j2", served)

    return app


class _Predict:
    """POST /predict."""

    def __init__(self, served: Served, batcher: Batcher, metrics: Metrics, limits: Limits) -> None:
        self.body = body_model(limits, len(served.labels))
        self._served, self._batcher, self._metrics, self._limits = served, batcher, metrics, limits

    async def answer(self, request: Request) -> Response:
        started = time.monotonic()
        response = await self._response(request)
        self._metrics.requests.labels(response.status_code).inc()
        self._metrics.request_seconds.observe(time.monotonic() - started)
        return response

    async def _response(self, request: Request) -> Response:
        """Answer a request, or say why not."""
        try:
            asked = parse(self.body, await read_body(request, self._limits.max_body_bytes))
            found = await _unless_gone(request, self._batcher.classify(asked.texts))
        except RefusedError as error:
            # Of a body that is not read to its end, no more is wanted.
            headers = {"Connection": "close"} if error.status in {413, 415} else {}
            return _problem(error.status, str(error), **headers)
        except DataError as error:
            return _problem(400, str(error))
        except BusyError as error:
            return _problem(503, str(error), **{"Retry-After": str(error.retry_after_s)})
        except FailedError as error:
            return _problem(500, str(error))
        except ClientDisconnect:
            return Response(status_code=_CLIENT_LEFT)
        doubts = self._served.doubts(asked.texts, found)
        said = (asked.top_k, sum(found.is_cut), doubts, self._served.thresholds)
        return JSONResponse(answer(found.proba, self._served.labels, *said))


async def _unless_gone(request: Request, answering: Any) -> Answer:
    """Wait for an answer, and no longer than the client does.

    Raises:
        ClientDisconnect: it has gone.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    found, leaving = asyncio.ensure_future(answering), asyncio.create_task(gone())
    try:
        await asyncio.wait({found, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if found.done():
            answer: Answer = found.result()
            return answer
        raise ClientDisconnect
    finally:
        leaving.cancel()
        found.cancel()


def _problem(status: int, message: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)


async def _no_such_place(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"there is no {request.method} of this address. GET /docs lists what there is."
    return _problem(error.status_code, message, **(error.headers or {}))


def _page(name: str, served: Served, **values: Any) -> HTMLResponse:
    """Fill a page, which may load and send nothing but what stands in it and goes to here."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    content = _TEMPLATES.get_template(name).render(served=served, nonce=nonce, **values)
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(content, headers=headers)
