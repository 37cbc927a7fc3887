"""How good the fits are on complete data sets, against the paper's recipe and the best layer.

Three fits a data set, each a run of `llmembed-fit` on the features of one source: the paper's
preset (its sigma and epochs chosen on the validation share), `cooc` on the same five layers, and
`auto` on everything. A run that already lies in the working folder with the same options is not
fitted again.

Beside them stands the single layer that scikit-learn's LogisticRegressionCV would choose, all on
the training split, features standardised. A screen judges features (layers and poolings of one
source) by three folds at the strengths that win everywhere: every third layer, then the neighbours
of the best. LogisticRegressionCV (Cs=10, cv=5) decides among the finalists, along its grid from the
strongest penalty on: the weaker half takes nine tenths of the time and is tried only as far as it
wins. That still takes minutes a data set (hours without the screen), so the results are kept in
`results/speed/fit_reference.json`, beside the fingerprint of the cache they belong to, and an
interrupted run goes on where it stopped.

The oracle's layer, chosen by the evaluation split, is recorded too; no honest method has it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.preprocessing import StandardScaler

from llmembed.cache_format import Cache, open_cache
from llmembed.common.errors import LLMEmbedWarning
from llmembed.train import FitConfig, fit

FITS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "cooc": {"fusion": "cooc", "layers": "last:5", "pooling": ("mean",)},
    "auto": {"fusion": "auto"},
}
FIGURES = ("n_eval", "accuracy", "accuracy_ci95", "macro_f1", "nll", "ece", "ece_uncalibrated")
GRID = np.logspace(-4, 4, 10)  # what Cs=10 means
HALF_GRID = (0, 1, 2, 3, 4)
N_FOLDS, N_SCREEN_FOLDS, STRIDE, MAX_STEPS = 5, 3, 3, 2000
SCREEN = ((2, 3), 2)  # strengths, from the strongest penalty on, and how many finalists there are
SCREENS = {"r52": ((2,), 1)}  # 52 classes take minutes a feature


class Feature(NamedTuple):
    """A layer and a pooling of the source."""

    pooling: str
    layer: int


def measure(caches: Mapping[str, Path], source: str, work: Path, known: Path) -> dict[str, Any]:
    """Fit and evaluate everything, data set by data set.

    Args:
        caches: cache of each data set.
        source: source whose features are used.
        work: folder of the runs.
        known: file of what scikit-learn found.
    """
    result: dict[str, Any] = {}
    for name, path in caches.items():
        row = {kind: _fit(path, source, work / f"{name}-{kind}", FITS[kind]) for kind in FITS}
        result[name] = {**row, **reference(open_cache(path), name, source, known)}
        accuracy = {kind: one["accuracy"] for kind, one in result[name].items()}
        print(f"{name}: {json.dumps(accuracy)}")
    return result


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Give what the bars are about; accuracies in points."""

    def gain(kind: str, over: str) -> list[float]:
        return [100 * (one[kind]["accuracy"] - one[over]["accuracy"]) for one in result.values()]

    ours = [one[kind] for one in result.values() for kind in ("cooc", "auto")]
    return {
        "cooc over the paper's preset, mean": statistics.mean(gain("cooc", "paper")),
        "auto over the best layer, mean": statistics.mean(gain("auto", "best")),
        "auto over the best layer, worst": min(gain("auto", "best")),
        "ECE after calibration, worst": max(one["ece"] for one in ours),
        "ECE after less before, worst": max(one["ece"] - one["ece_uncalibrated"] for one in ours),
    }


def table(result: Mapping[str, Any]) -> str:
    """Lay the accuracies out for reading."""
    kinds = ("paper", "cooc", "best", "oracle", "auto")
    lines = ["            " + "".join(f"{kind:>9}" for kind in kinds) + "   ECE of auto"]
    for name, row in result.items():
        cells = "".join(f"{100 * row[kind]['accuracy']:9.2f}" for kind in kinds)
        ece = f"{row['auto']['ece']:.3f} (before {row['auto']['ece_uncalibrated']:.3f})"
        lines.append(f"{name:<12}{cells}   {ece}")
    return "\n".join(lines)


def _fit(cache: Path, source: str, output: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    common: dict[str, Any] = {"cache": str(cache), "source": (source,), "output": str(output)}
    config = FitConfig(**common, accelerator="cpu", baseline="none", **options)
    metrics = _known(config)
    if metrics is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LLMEmbedWarning)  # of texts in both splits
            metrics = dict(fit(config).metrics)
    kept = next(row for row in metrics["per_seed"] if row["kept"])
    chosen = {key: kept[key] for key in ("sigma", "saturated_share", "n_epochs") if key in kept}
    return {key: metrics[key] for key in FIGURES} | chosen | {"fit_s": metrics["seconds"]["fit"]}


def _known(config: FitConfig) -> dict[str, Any] | None:
    """Give the figures of a run with these very options on this very cache, if there is one."""
    record, metrics = (
        harness.read(Path(str(config.output)) / f"{name}.json") for name in ("config", "metrics")
    )
    if not record or not metrics:
        return None
    same = record["fit"] == json.loads(json.dumps(dataclasses.asdict(config)))
    same = same and record["cache"]["fingerprint"] == open_cache(config.cache).fingerprint
    return metrics if same else None


def reference(cache: Cache, name: str, source: str, path: Path) -> dict[str, Any]:
    """Give what scikit-learn finds on one data set, from the file as far as it is there."""
    strengths, n_finalists = SCREENS.get(name, SCREEN)
    known = harness.read(path)
    entry = known.setdefault(name, {})
    if entry.get("fingerprint") != cache.fingerprint:
        entry = known[name] = {"fingerprint": cache.fingerprint, "screen": {}, "finalists": {}}
    arrays = cache["train"].arrays
    features = sorted(Feature(pooling, k) for own, pooling, k in arrays if own == source)
    label = functools.partial(_label, source)

    def judge(part: str, chosen: Sequence[Feature], tried: Sequence[int], n_folds: int) -> None:
        for feature in chosen:
            if label(feature) not in entry[part]:
                rows = _rows(cache, source, feature)
                entry[part][label(feature)] = _judge(rows, tried, n_folds)
                harness.write(known, path)

    def best(part: str, among: Sequence[Feature]) -> list[Feature]:
        """Order the features that were judged, the best first."""
        judged = [feature for feature in among if label(feature) in entry[part]]
        return sorted(judged, key=lambda one: -float(entry[part][label(one)]["held_out_accuracy"]))

    every_third = [feature for feature in features if feature.layer % STRIDE == 0]
    judge("screen", every_third, strengths, N_SCREEN_FOLDS)
    top = best("screen", features)[0]
    near = [one for one in features if abs(one.layer - top.layer) < STRIDE]
    near = [one for one in near if one.pooling == top.pooling]
    judge("screen", near, strengths, N_SCREEN_FOLDS)
    finalists = best("screen", features)[:n_finalists]
    judge("finalists", finalists, HALF_GRID, N_FOLDS)
    winner = label(best("finalists", finalists)[0])
    every = entry["screen"] | entry["finalists"]
    oracle = max(every, key=lambda feature: float(every[feature]["accuracy"]))
    return {
        "best": {"feature": winner, **entry["finalists"][winner]},
        "oracle": {"feature": oracle, **every[oracle]},
    }


def _label(source: str, feature: Feature) -> str:
    return f"layer {feature.layer} ({source}, {feature.pooling})"


def _rows(cache: Cache, source: str, feature: Feature) -> list[Any]:
    """Read a feature, standardised by its training split: x, y and those of the evaluation."""
    splits = [cache["train"], cache["test" if "test" in cache.splits else "validation"]]
    raw = [one.features(feature.layer, source, feature.pooling).astype("f8") for one in splits]
    scaler = StandardScaler().fit(raw[0])
    pairs = zip(map(scaler.transform, raw), splits, strict=True)
    return [part for x, split in pairs for part in (x, split.labels)]


def _judge(rows: Sequence[Any], strengths: Sequence[int], n_folds: int) -> dict[str, Any]:
    """Try strengths, and from the half of the grid on weaker ones as long as the last one wins."""
    tried = list(strengths)
    while True:
        found = _search(rows, GRID[tried], n_folds)
        at_end = found["strength"] == GRID[tried[-1]] and tried[-1] >= HALF_GRID[-1]
        if not at_end or tried[-1] == len(GRID) - 1:
            return found
        tried.append(tried[-1] + 1)


def _search(rows: Sequence[Any], strengths: Any, n_folds: int) -> dict[str, Any]:
    x, y, x_eval, y_eval = rows
    model = LogisticRegressionCV(
        Cs=strengths,
        cv=n_folds,
        max_iter=MAX_STEPS,
        scoring="accuracy",
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        cpu_s, _ = harness.cpu_seconds(lambda: model.fit(x, y))
    return {
        "strength": float(model.C_),
        "held_out_accuracy": float(model.scores_.mean(axis=0).max()),
        "accuracy": float(model.score(x_eval, y_eval)),
        "n_steps": int(model.n_iter_.max()),
        "cpu_s": cpu_s,
    }
