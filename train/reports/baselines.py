"""What every run stands beside: the majority class, and TF-IDF with logistic regression.

The second needs the texts. It depends on the data set alone, so it is computed once and kept in the
user's cache folder; it trains on all rows of the training split that are not evaluated, those that
early stopping watches included, whatever the seed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from llmembed.cache_format import Cache, open_cache
from llmembed.common.replace import replacing
from llmembed.train.inputs import FitData
from llmembed.train.measures import Floats, Labels, summarise, summarise_sets
from llmembed.train.reports.texts import TextsNotFoundError, find_texts

NAMES = {"majority": "majority class", "tfidf": "TF-IDF + logistic regression"}
_WORDS = {"ngram_range": (1, 2), "sublinear_tf": True, "min_df": 2}  # of TfidfVectorizer
# Of LogisticRegression, one class against the rest: of 52 classes a tenth of the time of a softmax.
_FIT = {"C": 10.0, "solver": "liblinear"}
_MOST_WEIGHTS = 20_000_000  # n-grams by classes, 8 bytes each
_MOST_WORK = 400_000_000  # n-grams in all texts by classes, about a minute
_FIGURES = ("accuracy", "accuracy_ci95", "macro_f1", "nll", "ece")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled rows of a split, without their texts."""

    split: str
    rows: Labels
    """int64 `[N]`."""
    y: Labels
    """int64 `[N]`, index of the class of each; of several labels a text `[N, C]`."""


def measure_baselines(data: FitData, place: str, kind: str) -> dict[str, dict[str, Any]]:
    """Measure the baselines on the evaluation rows of a fit.

    Args:
        data: of the fit.
        place: the cache it was read from.
        kind: `tfidf`, or `none` for the majority class alone.

    Returns:
        Of `majority` and `tfidf` the figures of metrics.json, or `missing`, why there are none.
    """
    shares, y = data.shares, data.y.numpy()
    drawn = shares.validation if shares.validation_split is None else shares.validation[:0]
    rows = np.sort(np.concatenate([shares.train, drawn]))
    train = Examples(split=shares.train_split, rows=rows, y=y[rows])
    judged = Examples(split=shares.eval_split, rows=shares.eval, y=data.y_eval.numpy())
    if not len(judged.rows):
        return {}
    found = {"majority": _majority(train, judged, data.labels)}
    if kind == "tfidf":
        try:
            found["tfidf"] = _kept_tfidf(open_cache(place), train, judged)
        except TextsNotFoundError as error:
            found["tfidf"] = {"missing": str(error)}
    return found


def size_of_features(cache: Cache, data: FitData) -> dict[str, int]:
    """Count the rows that a fit read, their tokens, and the bytes of their features."""
    shares, sources = data.shares, {feature.source for feature in data.features}
    names = (shares.train_split, shares.eval_split, shares.validation_split)
    splits = [cache[name] for name in dict.fromkeys(names) if name is not None]
    return {
        "n_rows": sum(split.n_rows for split in splits),
        "n_tokens": sum(int(split.n_tokens(one).sum()) for split in splits for one in sources),
        "features": sum(
            split.n_rows * one.hidden_size * np.dtype(split.layouts[one.source].dtype).itemsize
            for split in splits
            for one in data.features
        ),
    }


def settings() -> dict[str, Any]:
    """Name all that TF-IDF with logistic regression is told."""
    told = {"ngram_range": "1-2 words", "classes": "one against the rest"}
    return {**_WORDS, **told, **_FIT, "scikit-learn": version("scikit-learn")}


def _majority(train: Examples, judged: Examples, labels: Sequence[str]) -> dict[str, Any]:
    """Judge the shares of the classes in the training rows, each counted once more.

    Of several labels a text, those that half of the rows have are given, or none.
    """
    if train.y.ndim == 1:
        counts = np.bincount(train.y, minlength=len(labels)) + 1.0
        n = counts.sum()
    else:
        counts, n = train.y.sum(axis=0) + 1.0, len(train.y) + 2.0
    log_proba = np.tile(np.log(counts / n), (len(judged.y), 1))
    return {
        **_figures(log_proba, judged.y, labels),
        "label": labels[int(counts.argmax())],
        "n_train": len(train.y),
    }


def _figures(log_proba: Floats, y: Labels, labels: Sequence[str]) -> dict[str, Any]:
    if y.ndim == 1:
        summary = summarise(log_proba, y, labels)
    else:
        summary = summarise_sets(log_proba, y, labels, np.full(len(labels), 0.5))
    return {name: summary[name] for name in _FIGURES}


def _kept_tfidf(cache: Cache, train: Examples, judged: Examples) -> dict[str, Any]:
    """Take the figures from the user's cache folder, or compute them and put them there."""
    from llmembed.extract.backbones.models import user_cache_folder

    identity = {
        "settings": settings(),
        "data": cache.fingerprint_of(splits={train.split, judged.split}, sources=()),
        "rows": [hashlib.sha256(one.rows.tobytes()).hexdigest() for one in (train, judged)],
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    note = user_cache_folder() / "baselines" / f"{key}.json"
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["identity"] == identity:
            return {**kept["figures"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not kept yet, or unreadable
    texts = find_texts(cache, [*dict.fromkeys((train.split, judged.split))])
    figures = _tfidf(texts, train, judged, cache.labels)
    _keep(note, {"identity": identity, "figures": figures})
    return figures


def _keep(note: Path, document: Mapping[str, Any]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as new:
            new.write_text(json.dumps(document), encoding="utf-8")
    except OSError as error:  # without it the next fit computes it again
        _log.info("the baseline is not kept in %s: %s", note.parent, error)


def _tfidf(
    texts: Mapping[str, Sequence[str]], train: Examples, judged: Examples, labels: Sequence[str]
) -> dict[str, Any]:
    """Fit and judge; a class that no training row has gets the share of one row more."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    started = time.perf_counter()
    vectorizer = TfidfVectorizer(**_WORDS, max_features=_MOST_WEIGHTS // len(labels))
    try:
        x = vectorizer.fit_transform([texts[train.split][row] for row in train.rows])
    except ValueError as error:
        raise TextsNotFoundError("no word is in two of the training texts") from error
    if x.nnz * len(labels) > _MOST_WORK:
        raise TextsNotFoundError("so many words and classes would take minutes")
    _log.info(
        "baseline: TF-IDF with logistic regression on %s texts, once for this data set; "
        "--baseline none leaves it out",
        f"{len(train.rows):,}",
    )
    proba = np.full((len(judged.rows), len(labels)), 1 / (len(train.rows) + len(labels)))
    given = vectorizer.transform([texts[judged.split][row] for row in judged.rows])
    if train.y.ndim == 1:
        model = OneVsRestClassifier(LogisticRegression(**_FIT)).fit(x, train.y)
        proba[:, model.classes_] = model.predict_proba(given)
        proba /= proba.sum(axis=1, keepdims=True)
    else:
        counts = train.y.sum(axis=0)
        proba[:, counts == len(train.y)] = 1 - proba[0, 0]
        for k in np.flatnonzero((counts > 0) & (counts < len(train.y))):
            one = LogisticRegression(**_FIT).fit(x, train.y[:, k])
            proba[:, k] = one.predict_proba(given)[:, 1]
    return {
        **_figures(np.log(np.maximum(proba, np.finfo(np.float64).tiny)), judged.y, labels),
        "n_train": len(train.rows),
        "n_features": x.shape[1],
        "settings": settings(),
        "seconds": time.perf_counter() - started,
    }
