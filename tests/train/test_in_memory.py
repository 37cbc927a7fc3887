"""Features that have no room on the device: they go through it in blocks of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from clustered import MakeCache, load

from llmembed.train import FitConfig
from llmembed.train.inputs import draw_folds
from llmembed.train.linear import closed, devices, moments, solved
from llmembed.train.linear.choice import choose_head
from llmembed.train.linear.moments import Problem
from llmembed.train.linear.sweep import Grid, sweep

N, WIDTH, N_CLASSES, BLOCK = 300, 8, 3, 32
ON_ITS_DEVICE = {"__get__", "__getitem__", "__len__", "index_select", "reshape", "mean"}
"""What may be done to features in memory: shape, device, rows, columns, their mean."""


class InMemory(torch.Tensor):
    """Features that are not on the device: a few rows are moved at a time, else nothing is done."""

    most_rows = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "to":
            cls.most_rows = max(cls.most_rows, len(args[0]))
            return args[0].as_subclass(torch.Tensor)
        if name == "as_subclass":
            return super().__torch_function__(func, types, args, kwargs or {})
        assert name in ON_ITS_DEVICE, f"{name} of features that are not on the device"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def grid() -> Grid:
    """Four features, in no block of rows alike; the last row is alone in its class."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, N_CLASSES - 1, N)
    y[-1] = N_CLASSES - 1
    x = generator.normal(size=(N, 4, WIDTH))
    x[:, 1, 0] += y
    x[:, 2, 1] -= y
    folds = [torch.from_numpy(rows) for rows in draw_folds(y, np.arange(N), 5, generator)]
    return Grid(
        x=torch.from_numpy(x.reshape(N, -1).astype(np.float32)),
        y=torch.from_numpy(y),
        widths=(WIDTH,) * 4,
        deep=(2, 3),
        folds=folds,
        class_weights=torch.ones(N_CLASSES),
        head="lda",
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (moments, "_CHUNK_ROWS"),
        (moments, "_BLOCK_ROWS"),
        (closed, "_CHUNK_ROWS"),
    ):
        monkeypatch.setattr(module, name, BLOCK)
    monkeypatch.setattr(InMemory, "most_rows", 0)


def in_memory(grid: Grid) -> Grid:
    return dataclasses.replace(grid, x=grid.x.as_subclass(InMemory))


@pytest.mark.parametrize("heads", [("ridge",), ("lda",), ("linear",), ("ridge", "lda", "linear")])
def test_a_head_is_the_same(
    grid: Grid, heads: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Scores of all strengths and the head, by blocks of rows and by all at once."""
    fields = ("x", "y", "folds", "class_weights")
    whole = choose_head(Problem(**{name: getattr(grid, name) for name in fields}), heads)
    request.getfixturevalue("small_blocks")
    streamed = in_memory(grid)
    found = choose_head(Problem(**{name: getattr(streamed, name) for name in fields}), heads)
    assert (found.head, found.strength) == (whole.head, whole.strength)
    atol = 1e-3 if found.head == "linear" else 2e-6  # its steps end 1e-6 nats above the optimum
    torch.testing.assert_close(found.scores, whole.scores, rtol=1e-6, atol=atol)
    for name in ("weight", "bias"):
        ours, theirs = (getattr(one.solve(), name) for one in (found, whole))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=atol)
    assert 0 < InMemory.most_rows <= BLOCK


def test_a_sweep_is_the_same(grid: Grid, request: pytest.FixtureRequest) -> None:
    """Every candidate, and the head that it solves for."""
    whole = sweep(grid)
    request.getfixturevalue("small_blocks")
    for found, expected in zip(sweep(in_memory(grid)), whole, strict=True):
        assert found == dataclasses.replace(
            expected,
            temperature=pytest.approx(expected.temperature, rel=1e-4),  # type: ignore[arg-type]
        )
        ours, theirs = found.solve(), expected.solve()
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=2e-6)
    assert 0 < InMemory.most_rows <= BLOCK


@pytest.mark.parametrize(("free", "place"), [(1e9, "meta"), (1e3, "cpu")])
def test_features_are_moved_where_they_have_room(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, free: float, place: str
) -> None:
    """All else is on the device either way."""
    config = FitConfig(cache=str(make_cache()), fusion="auto")
    monkeypatch.setattr(solved, "device_of", lambda *_: torch.device("meta"))
    monkeypatch.setattr(solved, "free_bytes", lambda _: free)
    made = solved.grid_of(config.plan().method, load(config), 0)
    assert (made.x.device.type, made.device.type) == (place, "meta")
    assert {one.device.type for one in (*made.folds, made.class_weights)} == {"meta"}


def test_what_fits_is_counted() -> None:
    """Twice the features, a Gram matrix a fold and nine more, and scores: 0.8 of what is free."""
    n_bytes = devices.solving_bytes((1000, 10), n_folds=5, n_classes=2)
    assert n_bytes == 8 * 1000 * 10 + 4 * 14 * 100 + 120 * 2000
    assert devices.fits(n_bytes, n_bytes / 0.79)
    assert not devices.fits(n_bytes, n_bytes / 0.81)
