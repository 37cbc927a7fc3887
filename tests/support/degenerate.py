"""Tiny training sets that leave a classifier little or nothing to go by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

EXTREMES = (0.0, 6e-8, 1e-3, 1.0, -1.0, 12_860.0, 65_504.0, -65_504.0)  # float16 holds them all
_GAPS = ((0.0, 1.0), (-1.0, 1.0), (1e-3, 12_860.0), (0.0, 1e-3), (-65_504.0, 65_504.0))
_COLUMNS = ("constant", "outlier", "noise", "copy")


@dataclass(frozen=True)
class TinySet:
    """Features of a few layers, and the class of each row.

    Attributes:
        x: float32 `[N, L, H]`, whose values are those of float16.
        y: int64 `[N]`.
        n_classes: C; the last may have no row.
        is_separable: whether each class has columns of its own, far from those of the others.
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    n_classes: int
    is_separable: bool = False


@st.composite
def labels(draw: st.DrawFn) -> tuple[npt.NDArray[np.int64], int]:
    """Classes of at least one row each, in any order, and how many have a name."""
    counts = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    y = draw(st.permutations(np.repeat(np.arange(len(counts)), counts).tolist()))
    return np.array(y), len(counts) + draw(st.integers(0, 1))


@st.composite
def separable_sets(draw: st.DrawFn) -> TinySet:
    """One column a class that is high for its rows, among columns that say nothing or mislead."""
    (y, n_classes), n_layers = draw(labels()), draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    noise = draw(st.sampled_from([0.0, 0.01, 0.05]))
    others = draw(st.lists(st.sampled_from(_COLUMNS), max_size=3))
    low, high = np.array(draw(st.sampled_from(_GAPS)))
    layers = []
    for _ in range(n_layers):
        own = np.where(y[:, None] == np.arange(y.max() + 1), high, low)
        own = own + noise * (high - low) * generator.uniform(-1, 1, own.shape)
        layers.append([*own.T, *(_column(kind, own, generator) for kind in others)])
    return TinySet(_as_stored(np.array(layers).transpose(2, 0, 1)), y, n_classes, is_separable=True)


@st.composite
def any_sets(draw: st.DrawFn) -> TinySet:
    """Few distinct rows of few distinct values, repeated within and across classes."""
    y, n_classes = draw(labels())
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    values = draw(st.lists(st.sampled_from(EXTREMES), min_size=1, max_size=3))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    texts = generator.choice(values, size=(draw(st.integers(1, 4)), *shape))
    if draw(st.booleans()):
        texts = texts + generator.normal(size=texts.shape)
    return TinySet(_as_stored(texts[generator.integers(0, len(texts), len(y))]), y, n_classes)


def identical(counts: tuple[int, ...]) -> TinySet:
    """Give classes whose texts are all the same."""
    y = np.repeat(np.arange(len(counts)), counts)
    text = np.random.default_rng(0).normal(size=(1, 2, 6))
    return TinySet(_as_stored(np.repeat(text, len(y), axis=0)), y, len(counts))


def two_texts(n_each: int = 10) -> TinySet:
    """Give two classes of one text each, again and again."""
    y = np.repeat([0, 1], n_each)
    texts = np.random.default_rng(0).normal(size=(2, 3, 24))
    return TinySet(_as_stored(texts[y]), y, 2, is_separable=True)


def one_row_a_class(n_classes: int = 100) -> TinySet:
    """Give as many classes as rows."""
    x = np.random.default_rng(0).normal(size=(n_classes, 2, n_classes))
    return TinySet(_as_stored(x), np.arange(n_classes), n_classes, is_separable=True)


def _column(
    kind: str, own: npt.NDArray[np.float64], generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    n_rows = len(own)
    if kind == "constant":
        return np.full(n_rows, generator.choice(EXTREMES))
    if kind == "outlier":
        return np.where(np.arange(n_rows) == generator.integers(n_rows), 12_860.0, 1e-3)
    return generator.normal(size=n_rows) if kind == "noise" else own[:, 0]


def _as_stored(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return np.clip(x, -65_504, 65_504).astype(np.float16).astype(np.float32)
