"""Products of float32 in what is solved: float32, whatever the user chose for other work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from clustered import MakeCache, load

from llmembed.train import FitConfig
from llmembed.train.verbs.fitting import train


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "options",
    [
        {"fusion": "concat", "head": "ridge"},
        {"fusion": "concat", "head": "linear"},
        {"fusion": "mean", "head": "lda"},
        {"fusion": "auto"},
    ],
)
def test_a_choice_of_fast_products_changes_no_solved_fit(
    make_cache: MakeCache, options: dict[str, str]
) -> None:
    """On a CPU that multiplies in bfloat16 on request, a solved head stays the same, bit by bit."""
    config = FitConfig(cache=str(make_cache()), accelerator="cpu", **options)  # type: ignore[arg-type]
    data, outcomes = load(config), []
    with precision("medium"):
        products = [data.x.T @ data.x]
    products.append(data.x.T @ data.x)
    if torch.equal(*products):
        pytest.skip("this CPU has no fast products")
    for name in ("highest", "medium"):
        with precision(name):
            trained = train(config.plan(), data).best
            logits = trained.classifier.logits_all(data.x_eval)
        outcomes.append([*trained.classifier.state_dict().values(), logits])
    for own, other in zip(*outcomes, strict=True):
        assert torch.equal(own, other)
