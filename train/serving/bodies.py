"""What a request may say, and what it is told: every refusal is one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from llmembed.common.errors import shown
from llmembed.train.measures import Floats, likeliest_first
from llmembed.train.serving.config import Limits

_HOW = 'Send {"texts": ["...", ...]}, as /docs tells.'
_MOST_SHOWN = 60


class RefusedError(Exception):
    """A request that is answered by a status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Label(BaseModel):
    """A class and how probable it is."""

    label: str
    probability: float


class Prediction(BaseModel):
    """What is said of one text."""

    labels: list[Label] = Field(description="Classes, the most probable first.")
    abstained: bool | None = Field(
        default=None, description="With --abstain: whether it is too doubtful to be answered."
    )
    label_set: list[str] | None = Field(
        default=None, description="With --conformal: classes among which the right one is."
    )
    out_of_domain: float | None = Field(
        default=None,
        description="With --ood: share of training rows at least as far from the others as the "
        "text; 0.01 or less: likely of another domain.",
    )
    note: str | None = Field(
        default=None,
        description="With --ood: empty, truncated (cut at the run's max-length), or nothing.",
    )
    given: list[str] | None = Field(
        default=None,
        description="Labels that the text is given, the most probable first, where a text may have "
        "several; else missing, and it is the first class.",
    )


class Predictions(BaseModel):
    """What is said of all texts of a request, in their order."""

    predictions: list[Prediction]
    n_truncated: int = Field(description="Texts that were cut at the run's max-length.")


class Problem(BaseModel):
    """Why a request was not answered."""

    error: str


def body_model(limits: Limits, n_classes: int) -> type[BaseModel]:
    """Make the model of a body: `texts`, and `top_k` of so many classes if it is given."""
    text = Annotated[str, Field(max_length=limits.max_characters)]
    return create_model(
        "Texts",
        __config__=ConfigDict(extra="forbid", strict=True),
        texts=(
            Annotated[list[text], Field(min_length=1, max_length=limits.max_texts)],
            Field(description="Texts to classify."),
        ),
        top_k=(
            Annotated[int, Field(ge=1, le=n_classes)] | None,
            Field(default=None, description="Classes to tell of each text; all without it."),
        ),
    )


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Read a body of JSON, no further than the limit.

    Raises:
        RefusedError: it is too large, or is not called JSON.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(
            415,
            f"content type '{shown(kind)[:_MOST_SHOWN]}' is not application/json. Name it so, and "
            "send JSON.",
        )
    too_large = RefusedError(
        413,
        f"the body has more than {most_bytes:,} bytes, which is the limit of this server. Send "
        "fewer texts at a time.",
    )
    declared = request.headers.get("content-length", "0")
    if int(declared) > most_bytes:  # digits: the server has checked them
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise too_large
    return bytes(body)


def parse(model: type[BaseModel], body: bytes) -> Any:
    """Read a body.

    Raises:
        RefusedError: it is not JSON, or not what the model says.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        # The first is enough; what was sent may be a text, which is not said again.
        first = error.errors(include_url=False)[0]
        where = shown(".".join(map(str, first["loc"])))[:_MOST_SHOWN]
        if first["type"] == "json_invalid":
            reason = first["ctx"]["error"]
            raise RefusedError(400, f"the body is not JSON: {reason}. {_HOW}") from error
        given = f", not {_short(first['input'])}" if first["type"].endswith("_type") else ""
        reason = f"{where or 'body'}: {first['msg']}{given}"
        raise RefusedError(422, f"{reason}. {_HOW}") from error


def _short(value: Any) -> str:
    """Show a value, or of text, lists and objects what it is.

    >>> _short(3), _short(None), _short([1])
    ('3', 'null', 'a list')
    """
    kinds: dict[type, str] = {list: "a list", dict: "an object", str: "a string"}
    return kinds.get(type(value)) or json.dumps(value)[:_MOST_SHOWN]


def answer(
    proba: Floats,
    labels: Sequence[str],
    top_k: int | None,
    n_truncated: int,
    doubts: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    thresholds: Floats | None = None,
) -> dict[str, Any]:
    """Lay out `Predictions`, the most probable classes first; of equals, the first.

    What is doubted is a value of each text, by the name of the field.

    >>> answer(np.array([[0.25, 0.75]]), ["no", "yes"], 1, 0)["predictions"]
    [{'labels': [{'label': 'yes', 'probability': 0.75}]}]
    """
    orders = np.argsort(-proba, axis=1, kind="stable")[:, :top_k].tolist()
    told: list[dict[str, Any]] = [
        {"labels": [{"label": labels[c], "probability": row[c]} for c in order]}
        | {name: values[n] for name, values in doubts.items()}
        for n, (order, row) in enumerate(zip(orders, proba.tolist(), strict=True))
    ]
    if thresholds is not None:
        for one, given in zip(told, likeliest_first(proba, thresholds), strict=True):
            one["given"] = [labels[c] for c in given]
    return {"predictions": told, "n_truncated": n_truncated}
