"""The single layer that scikit-learn's LogisticRegressionCV would choose: what `auto` has to beat.

All on the training split, features standardised. A screen judges features (layers and poolings of
one source) by three folds at the strengths that win everywhere: every third layer, then the
neighbours of the best. LogisticRegressionCV (Cs=10, cv=5) decides among the finalists, along its
grid from the strongest penalty on: the weaker half takes nine tenths of the time and is tried only
as far as it wins. That still takes minutes a data set (hours without the screen), so the results
are kept in `results/bench_fit_reference.json`, beside the fingerprint of the cache they belong
to, and an interrupted run goes on where it stopped.

The oracle's layer, chosen by the evaluation split, is recorded too; no honest method has it.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegressionCV
from sklearn.preprocessing import StandardScaler

from llmembed.cache_format import Cache, Split
from llmembed.train.config import FitConfig
from llmembed.train.inputs.select import Feature, select_features
from llmembed.train.inputs.shares import EVAL_SPLITS

GRID = np.logspace(-4, 4, 10)  # what Cs=10 means
N_FOLDS = 5
_MAX_STEPS = 2000

Floats = npt.NDArray[np.float64]
Strengths = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Screen:
    """How the features are judged before the finalists are."""

    strengths: tuple[int, ...] = (2, 3)
    """Positions in the grid, from the strongest penalty on."""
    n_finalists: int = 2
    """Features that LogisticRegressionCV decides among."""


_N_FOLDS, _STRIDE = 3, 3  # of a screen
_HALF_GRID = (0, 1, 2, 3, 4)
SCREENS = {"r52": Screen(strengths=(2,), n_finalists=1)}  # 52 classes take minutes a feature


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one feature, standardised by its training split."""

    x: Floats
    """float64 `[N, H]`."""
    y: npt.NDArray[np.int32]
    """int32 `[N]`, classes."""
    x_eval: Floats
    """float64 `[n, H]`."""
    y_eval: npt.NDArray[np.int32]
    """int32 `[n]`, classes."""


def reference(cache: Cache, name: str, source: str, path: Path) -> dict[str, Any]:
    """Give what scikit-learn finds on one data set, from the file as far as it is there."""
    screen = SCREENS.get(name, Screen())
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entry = known.setdefault(name, {})
    if entry.get("fingerprint") != cache.fingerprint:
        entry = known[name] = {"fingerprint": cache.fingerprint, "screen": {}, "finalists": {}}
    config = FitConfig(cache=str(cache.path), source=(source,))
    features = select_features(cache, cache["train"], config)

    def judge(part: str, chosen: Sequence[Feature], strengths: Strengths, n_folds: int) -> None:
        for feature in chosen:
            if str(feature) not in entry[part]:
                entry[part][str(feature)] = _judge(rows_of(cache, feature), strengths, n_folds)
                _write(path, known)

    every_third = [feature for feature in features if feature.layer % _STRIDE == 0]
    judge("screen", every_third, screen.strengths, _N_FOLDS)
    best = _best(features, entry["screen"])[0]
    near = [feature for feature in features if abs(feature.layer - best.layer) < _STRIDE]
    near = [feature for feature in near if feature.pooling == best.pooling]
    judge("screen", near, screen.strengths, _N_FOLDS)
    finalists = _best(features, entry["screen"])[: screen.n_finalists]
    judge("finalists", finalists, _HALF_GRID, N_FOLDS)
    winner = _best(finalists, entry["finalists"])[0]
    every = entry["screen"] | entry["finalists"]
    oracle = max(every, key=lambda feature: float(every[feature]["accuracy"]))
    return {
        "best": {"feature": str(winner), **entry["finalists"][str(winner)]},
        "oracle": {"feature": oracle, **every[oracle]},
    }


def rows_of(cache: Cache, feature: Feature) -> Rows:
    """Read one feature of the training and the evaluation split."""
    splits = [cache["train"], cache[next(name for name in EVAL_SPLITS if name in cache.splits)]]
    raw = [_read(split, feature) for split in splits]
    scaler = StandardScaler().fit(raw[0])
    return Rows(
        x=scaler.transform(raw[0]),
        y=splits[0].labels,
        x_eval=scaler.transform(raw[1]),
        y_eval=splits[1].labels,
    )


def _read(split: Split, feature: Feature) -> Floats:
    return split.features(feature.layer, feature.source, feature.pooling).astype(np.float64)


def _judge(rows: Rows, strengths: Strengths, n_folds: int) -> dict[str, Any]:
    """Try strengths, and from the half of the grid on weaker ones as long as the last one wins."""
    tried = list(strengths)
    while True:
        found = _fit(rows, GRID[tried], n_folds)
        at_end = found["strength"] == GRID[tried[-1]] and tried[-1] >= _HALF_GRID[-1]
        if not at_end or tried[-1] == len(GRID) - 1:
            return found
        tried.append(tried[-1] + 1)


def _fit(rows: Rows, strengths: Floats, n_folds: int) -> dict[str, Any]:
    started = time.process_time()
    model = LogisticRegressionCV(
        Cs=strengths,
        cv=n_folds,
        max_iter=_MAX_STEPS,
        scoring="accuracy",
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        model.fit(rows.x, rows.y)
    return {
        "strength": float(model.C_),
        "held_out_accuracy": float(model.scores_.mean(axis=0).max()),
        "accuracy": float(model.score(rows.x_eval, rows.y_eval)),
        "n_steps": int(model.n_iter_.max()),
        "cpu_s": time.process_time() - started,
    }


def _best(features: Sequence[Feature], judged: dict[str, Any]) -> list[Feature]:
    """Order the features that were judged, the best first."""
    known = [feature for feature in features if str(feature) in judged]
    return sorted(known, key=lambda one: -float(judged[str(one)]["held_out_accuracy"]))


def _write(path: Path, document: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)
