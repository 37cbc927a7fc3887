"""How good the fits are on complete data sets, against the paper's recipe and the best layer.

Four fits a data set, each a run of `llmembed-fit` on the features of one source: the paper's preset
(its sigma and epochs chosen on the validation share), `cooc` on the same five layers, `auto` on
everything, and scikit-learn's best single layer (`bench_fit_reference`). A run that already lies in
the working folder with the same options is not fitted again.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_fit_reference import reference

from llmembed.cache_format import open_cache
from llmembed.common.errors import LLMEmbedWarning
from llmembed.train import FitConfig, fit

FITS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "cooc": {"fusion": "cooc", "layers": "last:5", "pooling": ("mean",)},
    "auto": {"fusion": "auto"},
}
_FIGURES = ("n_eval", "accuracy", "accuracy_ci95", "macro_f1", "nll", "ece", "ece_uncalibrated")


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
        print(
            f"{name}: {json.dumps({kind: one['accuracy'] for kind, one in result[name].items()})}"
        )
    return result


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Give what the bars are about; accuracies in points."""

    def gain(kind: str, over: str) -> list[float]:
        return [100 * (one[kind]["accuracy"] - one[over]["accuracy"]) for one in result.values()]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    ours = [one[kind] for one in result.values() for kind in ("cooc", "auto")]
    return {
        "cooc over the paper's preset, mean": mean(gain("cooc", "paper")),
        "auto over the best layer, mean": mean(gain("auto", "best")),
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
    config = FitConfig(
        cache=str(cache), source=(source,), output=str(output), accelerator="cpu", **options
    )
    metrics = _known(config)
    if metrics is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LLMEmbedWarning)  # of texts in both splits
            metrics = dict(fit(config).metrics)
    kept = next(row for row in metrics["per_seed"] if row["kept"])
    chosen = {key: kept[key] for key in ("sigma", "saturated_share", "n_epochs") if key in kept}
    return {key: metrics[key] for key in _FIGURES} | chosen | {"fit_s": metrics["seconds"]["fit"]}


def _known(config: FitConfig) -> dict[str, Any] | None:
    """Give the figures of a run with these very options on this very cache, if there is one."""
    try:
        record = json.loads((config.run_path / "config.json").read_text())
        metrics: dict[str, Any] = json.loads((config.run_path / "metrics.json").read_text())
    except FileNotFoundError:
        return None
    same = record["fit"] == json.loads(json.dumps(dataclasses.asdict(config)))
    same = same and record["cache"]["fingerprint"] == open_cache(config.cache).fingerprint
    return metrics if same else None
