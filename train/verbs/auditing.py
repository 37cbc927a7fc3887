"""The verb of `llmembed-audit`: which rows of a split look wrong, and why.

Nothing is solved for it that a fit would not solve: the folds that choose a head's strength say of
each row what classifiers think that have not seen it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmembed.cache_format import Cache, open_cache
from llmembed.common.errors import ConfigError, DataError, listed, warn
from llmembed.common.process import memory_told
from llmembed.train.config import AuditConfig
from llmembed.train.inputs import data_in_memory, read_features
from llmembed.train.inputs.select import select_features
from llmembed.train.inputs.shares import labelled_rows, refuse_texts_alone
from llmembed.train.linear.solved import HeldOut, judge_held_out
from llmembed.train.measures import Floats, Labels
from llmembed.train.measures.confident import NO_CLASS, confident_joint, doubts, overlaps
from llmembed.train.reports.audit import check_output, save_audit
from llmembed.train.reports.texts import TextsNotFoundError, find_texts

_FENCE = 2.2
"""Quartile ranges above the third quartile, from where the logarithm of a distance is an outlier
(Hoaglin and Iglewicz, "Fine-tuning some resistant rules for outlier labeling", JASA 1987)."""
_OVERLAP = 0.5
"""From which on two classes are told; 1 is labels drawn by lot."""
_LEAST_CONFUSED = 2  # rows of each of the two


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """What is thought of N rows.

    No label is judged of a row alone in its class, or whose class is one group.
    """

    seem: Labels
    """int64 `[N]`, the class that each seems to be of; its own where no label is judged."""
    doubt: Floats
    """float64 `[N]`, 0 to 1; NaN where no label is judged."""
    distances: Floats
    """float64 `[N]`."""
    same: Mapping[int, Labels]
    """Row -> all rows of its text, where they are of several classes."""
    reasons: Mapping[str, npt.NDArray[np.bool_]]
    """Reason -> bool `[N]`, whether it holds of each row."""
    joint: Floats
    """float64 `[C, C]`, estimated rows of each label and class."""
    confused: npt.NDArray[np.bool_]
    """bool `[C, C]`, whether two classes should perhaps be one."""

    @property
    def order(self) -> list[int]:
        """Rows that there is a reason to look at, the likeliest to be wrong first."""
        flagged = np.flatnonzero(np.any([*self.reasons.values()], axis=0))
        order: list[int] = flagged[
            np.argsort(-np.nan_to_num(self.doubt[flagged]), kind="stable")
        ].tolist()
        return order


def run_audit(config: AuditConfig) -> dict[str, Any]:
    """Look for wrong labels, texts of several labels, outliers and classes that should be one.

    Returns:
        What `--json` prints: figures, `classes`, and `rows`, the likeliest to be wrong first; they
        are also written, as a csv and a page.

    Raises:
        CacheError: the cache is missing, malformed, incomplete or damaged.
        ConfigError: an option does not fit the cache, there are fewer rows, or groups of them, than
            folds, memory runs out, or the output is a file.
        DataError: no row has a label, all have one label or group, none can be held out, or a
            feature is NaN.
        RunStorageError: the disk failed or refused.
    """
    started = time.perf_counter()
    check_output(config.output_path)
    cache, plan = open_cache(config.cache), config.as_fit().plan()
    refuse_texts_alone(cache)
    if config.split not in cache.splits:
        raise ConfigError.unknown("split", config.split, cache.splits, "Pass one to --split.")
    split = cache[config.split]
    if split.label_sets is not None:
        raise ConfigError(
            f"split {config.split!r} of {config.cache} has several labels a text, and an audit "
            "looks for texts whose one label is wrong. Audit a cache of one label a text."
        )
    rows = labelled_rows(split)
    groups = None if config.ignore_groups or split.groups is None else split.groups[rows]
    y = np.asarray(split.labels, dtype=np.int64)[rows]
    features = select_features(cache, split, plan.reading)
    if len(np.unique(y)) == len(y) > 1:  # before anything is read and solved
        raise _none_to_judge(len(y))
    with memory_told("Pass fewer --layers, or set CUDA_VISIBLE_DEVICES= to audit on the CPU."):
        x = read_features(split, features, rows)
        data = data_in_memory(plan.reading, x, y, cache.labels, features, groups=groups)
        read_s = time.perf_counter() - started
        held_out = judge_held_out(plan.method, data)
    found = _examine(held_out, y, split.text_hash[rows], cache.labels)
    texts, missing = _texts(cache, config.split)
    document = {
        "cache": {"path": config.cache, "fingerprint": cache.fingerprint},
        "dataset": cache.dataset.name,
        "split": config.split,
        "fusion": config.fusion,
        **held_out.details,
        "features": [feature._asdict() for feature in features],
        "n_rows": len(y),
        "n_alone": len(held_out.alone),
        "n_flagged": {reason: int(holds.sum()) for reason, holds in found.reasons.items()},
        "classes": [*_classes(found, y, cache.labels)],
        "texts_missing": missing,
        "rows": [
            {"split": config.split, **one, **({} if texts is None else {"text": texts[one["row"]]})}
            for one in _rows(found, rows, y, cache.labels)
        ],
        "output": str(config.output_path),
    }
    document["seconds"] = {"read": read_s, "total": time.perf_counter() - started}
    save_audit(config.output_path, document, defuses_formulas=config.defuse_formulas)
    return document


def _none_to_judge(n_rows: int) -> DataError:
    return DataError(
        f"each of the {n_rows} rows is the only one of its class, or in its only group, so none "
        "can be held out to judge its label. Extract two examples a class or more, of two groups."
    )


def _examine(
    held_out: HeldOut, y: Labels, text_hash: npt.NDArray[np.uint64], names: Sequence[str]
) -> _Findings:
    alone = held_out.alone.cpu().numpy()
    judged = np.setdiff1d(np.arange(len(y)), alone)
    if not len(judged):
        raise _none_to_judge(len(y))
    if len(alone):
        single = [names[k] for k in np.unique(y[alone])]
        warn(
            f"{len(single)} classes have one row each, or one group, which can't be held out, so "
            f"their labels are not judged: {listed(single)}."
        )
    proba = held_out.logits.double().softmax(dim=1).cpu().numpy()
    joint = confident_joint(proba[judged], y[judged])
    seem, doubt, is_sure = y.copy(), np.full(len(y), np.nan), np.zeros(len(y), dtype=bool)
    seem[judged] = proba[judged].argmax(axis=1)
    doubt[judged] = doubts(proba[judged], y[judged])
    is_sure[judged] = (joint.classes != y[judged]) & (joint.classes != NO_CLASS)
    # A class that is never predicted is seen with confidence in what is only a little unlike the
    # others of its label, so confidence alone would tell a fifth of R52.
    differs = seem != y
    distances = held_out.distances.double().cpu().numpy()
    heights = np.log(distances.clip(min=1e-30))
    low, high = np.percentile(heights, [25, 75])
    same = _of_several_labels(text_hash, y)
    often = np.minimum(joint.counts, joint.counts.T) >= _LEAST_CONFUSED
    return _Findings(
        seem=seem,
        doubt=doubt,
        distances=distances,
        same=same,
        reasons={
            "label": differs & is_sure,
            "doubt": differs & ~is_sure,
            "duplicate": np.isin(np.arange(len(y)), [*same]),
            "outlier": heights > high + _FENCE * (high - low),
        },
        joint=joint.calibrated(y[judged]),
        confused=often & (overlaps(joint.calibrated(y[judged])) >= _OVERLAP),
    )


def _of_several_labels(text_hash: npt.NDArray[np.uint64], y: Labels) -> dict[int, Labels]:
    """Give the rows of each text that stands there with several labels, by each of them.

    >>> hashes = np.array([7, 8, 7, 8, 9], np.uint64)
    >>> _of_several_labels(hashes, np.array([0, 1, 2, 1, 0]))
    {0: array([0, 2]), 2: array([0, 2])}
    """
    _, texts = np.unique(text_hash, return_inverse=True)
    order = np.argsort(texts, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(texts[order])) + 1)
    several = (group for group in groups if len(np.unique(y[group])) > 1)
    return {row: group for group in several for row in group.tolist()}


def _rows(
    found: _Findings, rows: Labels, y: Labels, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for k in found.order:
        others = found.same.get(k, np.array([k]))
        yield {
            "row": int(rows[k]),
            "given": names[y[k]],
            "suggested": None if found.seem[k] == y[k] else names[found.seem[k]],
            "score": None if np.isnan(found.doubt[k]) else round(float(found.doubt[k]), 6),
            "distance": round(float(found.distances[k]), 6),
            "reasons": [reason for reason, holds in found.reasons.items() if holds[k]],
            "same_text": rows[others[others != k]].tolist(),
        }


def _classes(found: _Findings, y: Labels, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Describe each two classes that should perhaps be one, the likeliest first."""
    overlap, n_rows = overlaps(found.joint), np.bincount(y, minlength=len(names))
    pairs = np.argwhere(np.triu(found.confused))
    for a, b in sorted(pairs.tolist(), key=lambda pair: -overlap[*pair]):
        yield {
            "classes": [names[a], names[b]],
            "n_rows": [int(n_rows[a]), int(n_rows[b])],
            "n_seem_other": [float(found.joint[a, b]), float(found.joint[b, a])],
            "overlap": float(overlap[a, b]),
        }


def _texts(cache: Cache, split: str) -> tuple[Sequence[str] | None, str | None]:
    """Find the texts of a split, or say why there are none."""
    try:
        return find_texts(cache, [split])[split], None
    except TextsNotFoundError as error:
        return None, str(error)
