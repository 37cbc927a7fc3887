"""What a cache holds, looked at without training: texts of every split, and layers of one.

A layer is read once, 1,024 rows at a time, into sums over its rows, so that memory holds a few
`[H]` vectors and `[C, H]` sums of classes. From these come, with n rows, H dimensions, C classes:

- norms: mean, standard deviation, least and largest of the Euclidean norms of the rows;
- outlier dimensions: those whose mean square is more than 5 times that of the average dimension,
  and the share of the sum of squares that is theirs (after Rudman, Chen and Eickhoff, "Outlier
  dimensions encode task specific knowledge", EMNLP 2023, who take the variance; the mean square
  also finds what is large in all texts alike);
- trace ratio: `tr S_b / tr S_w`, with `S_b = sum_c n_c (m_c - m)(m_c - m)^T` and `S_w = sum_c
  sum_i (x_i - m_c)(x_i - m_c)^T` (K. Fukunaga, "Introduction to statistical pattern recognition",
  1990, section 10.2). Dimensions of large variance decide it;
- explained: the mean over dimensions of `S_b / (S_b + S_w)`, so that each counts alike (of
  dimensions that do not vary, 0). Where classes have nothing to do with features it is about
  `(C - 1) / (n - 1)`, `explained_by_chance`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from llmembed.cache_format import Cache, Split, open_cache
from llmembed.common.errors import ConfigError, shown, warn
from llmembed.common.splits import TRAIN
from llmembed.train.inputs import Feature, read_features
from llmembed.train.measures import Floats, Labels
from llmembed.train.reports.charts import Line, line_chart, lines_over_depth
from llmembed.train.reports.page import render

OUTLIER = 5  # times the mean square of the average dimension
_BLOCK_ROWS = 1024  # whole blocks of any cache
_MOST_DIMENSIONS = 5  # that are named
_OVER_DEPTH = (
    ("norm_mean", "mean norm", "Norms over depth", "Mean Euclidean norm of the features"),
    (
        *("explained", "share explained", "Separation over depth"),
        "Share of the variance that classes explain, mean over dimensions",
    ),
)
_QUANTILES = {"min": 0, "median": 50, "p95": 95, "max": 100}


def describe_cache(
    path: str,
    *,
    split: str | None = None,
    source: Sequence[str] = (),
    pooling: Sequence[str] = (),
) -> dict[str, Any]:
    """Describe the texts of all splits, and each layer of one.

    Args:
        path: of the cache.
        split: whose layers are read; None is train, or the only one.
        source: which sources; none is all.
        pooling: which poolings; none is all.

    Returns:
        What `--json` prints: `splits`, `shared_texts`, `lengths` and `layers`.

    Raises:
        CacheError: the cache is missing, malformed, incomplete or damaged.
        ConfigError: it has no such split, source or pooling.
        DataError: a feature is NaN or infinite.
    """
    cache = open_cache(path)
    chosen = cache[_chosen_split(cache, split)]
    held = [
        Feature(source, pooling, layer, cache.sources[source].hidden_size)
        for source, pooling, layer in sorted(chosen.arrays)
    ]
    sources = _named("source", source, [feature.source for feature in held], path)
    poolings = _named("pooling", pooling, [feature.pooling for feature in held], path)
    features = [one for one in held if one.source in sources and one.pooling in poolings]
    labels = np.asarray(chosen.labels, dtype=np.int64)
    n_classes = len(np.unique(labels[labels >= 0]))
    if n_classes < 2:
        warn(
            f"split {chosen.name!r} of {path} has labels of {n_classes} classes, so how well its "
            "layers tell classes apart is left out. Extract it with --label-column."
        )
    splits = [cache[name] for name in cache.splits]
    return {
        "path": path,
        "dataset": cache.dataset.name,
        "n_classes": n_classes,
        "splits": [_texts(one) for one in splits],
        "shared_texts": [*_shared_texts(splits)],
        "lengths": [
            _lengths(cache, one, name) for one in splits for name in one.layouts if name in sources
        ],
        "split": chosen.name,
        "explained_by_chance": _by_chance(labels, n_classes),
        "layers": [_layer(chosen, feature, labels, len(cache.labels)) for feature in features],
    }


def _chosen_split(cache: Cache, asked: str | None) -> str:
    if asked is None and TRAIN not in cache.splits and len(cache.splits) != 1:
        raise ConfigError(
            f"{cache.path} has the splits {', '.join(cache.splits)} and no {TRAIN}. Pass one to "
            "--split."
        )
    return asked or (TRAIN if TRAIN in cache.splits else cache.splits[0])


def _named(kind: str, asked: Sequence[str], held: Sequence[str], path: str) -> set[str]:
    for name in asked:
        if name not in held:
            known = list(dict.fromkeys(held))
            raise ConfigError.unknown(kind, name, known, f"{path} holds these.")
    return set(asked or held)


def _texts(split: Split) -> dict[str, Any]:
    """Count the rows of a split, and those whose text stands there more than once."""
    labels, hashes = split.labels, split.text_hash
    _, texts, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    repeated = counts > 1
    pairs = np.unique(np.stack([texts, labels]), axis=1)
    n_labels = np.bincount(pairs[0], minlength=len(counts))
    return {
        "split": split.name,
        "n_rows": split.n_rows,
        "n_unlabelled": int((labels < 0).sum()),
        "n_texts": len(counts),
        "n_repeated_rows": int(counts[repeated].sum()),
        "n_rows_of_several_labels": int(counts[n_labels > 1].sum()),
    }


def _shared_texts(splits: Sequence[Split]) -> Iterator[dict[str, Any]]:
    """Count for each two splits the rows of the one whose text also stands in the other.

    All splits are sorted together, once, and only texts of several splits are counted by each two.
    """
    sizes = [split.n_rows for split in splits]
    of_split = np.repeat(np.arange(len(splits)), sizes)
    hashes = np.concatenate([split.text_hash for split in splits])
    pairs, n_rows = np.unique(
        np.stack([np.unique(hashes, return_inverse=True)[1], of_split]), axis=1, return_counts=True
    )
    n_splits = np.bincount(pairs[0])
    several = n_splits[pairs[0]] > 1
    _, texts = np.unique(pairs[0, several], return_inverse=True)
    counts = np.zeros((len(splits), int(texts.max(initial=-1)) + 1), dtype=np.float64)
    counts[pairs[1, several], texts] = n_rows[several]
    shared = counts @ (counts > 0).T
    for k, other in itertools.combinations(range(len(splits)), 2):
        yield {
            "splits": [splits[k].name, splits[other].name],
            "n_rows": [int(shared[k, other]), int(shared[other, k])],
        }


def _lengths(cache: Cache, split: Split, source: str) -> dict[str, Any]:
    """Give quantiles of the tokens a text, and how many texts are as long as texts can be."""
    n_tokens, limit = split.n_tokens(source), cache.sources[source].fingerprint.get("max_length")
    places = [*_QUANTILES.values()]  # of texts: no quantile lies between two
    quantiles = np.percentile(n_tokens if len(n_tokens) else [0], places, method="inverted_cdf")
    return {
        "split": split.name,
        "source": source,
        "n_tokens": int(n_tokens.sum(dtype=np.int64)),
        **{name: int(value) for name, value in zip(_QUANTILES, quantiles, strict=True)},
        "max_length": limit,
        "n_at_max_length": int((n_tokens >= limit).sum()) if isinstance(limit, int) else None,
    }


def _by_chance(labels: Labels, n_classes: int) -> float | None:
    return (n_classes - 1) / (int((labels >= 0).sum()) - 1) if n_classes > 1 else None


def _layer(split: Split, feature: Feature, labels: Labels, n_classes: int) -> dict[str, Any]:
    squares = np.zeros(feature.hidden_size)
    classes = np.zeros((n_classes, feature.hidden_size))
    labelled = np.zeros(feature.hidden_size)
    norms = np.empty(split.n_rows)
    for start in range(0, split.n_rows, _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, split.n_rows))
        x = read_features(split, [feature], rows).numpy().astype(np.float64)
        y = labels[rows]
        squared = np.square(x)
        norms[rows] = np.sqrt(squared.sum(axis=1))
        squares += squared.sum(axis=0)
        known = y >= 0
        labelled += squared[known].sum(axis=0)
        classes += _by_class(y[known], n_classes) @ x[known]
    counts = np.bincount(labels[labels >= 0], minlength=n_classes)
    return {
        **feature._asdict(),
        **_of_norms(norms),
        **_of_outliers(squares),
        **_of_classes(classes, labelled, counts),
    }


def _by_class(y: Labels, n_classes: int) -> sparse.csr_array:
    """Give `[C, n]` with a one where a row is of a class."""
    return sparse.csr_array((np.ones(len(y)), (y, np.arange(len(y)))), shape=(n_classes, len(y)))


def _of_norms(norms: Floats) -> dict[str, float | None]:
    names = ("norm_mean", "norm_std", "norm_min", "norm_max")
    if not len(norms):
        return dict.fromkeys(names)
    figures = norms.mean(), norms.std(), norms.min(), norms.max()
    return {name: float(value) for name, value in zip(names, figures, strict=True)}


def _of_outliers(squares: Floats) -> dict[str, Any]:
    """Take sums of squares `[H]`."""
    outliers = np.flatnonzero(squares > OUTLIER * squares.mean())
    largest = outliers[np.argsort(-squares[outliers], kind="stable")]
    total = float(squares.sum())
    return {
        "n_outliers": len(outliers),
        "outlier_share": float(squares[outliers].sum()) / total if total else 0.0,
        "largest_outliers": largest[:_MOST_DIMENSIONS].tolist(),
    }


def _of_classes(sums: Floats, squares: Floats, counts: Labels) -> dict[str, float | None]:
    """Take sums of classes `[C, H]`, sums of squares `[H]` and rows a class `[C]`."""
    present = counts > 0
    if present.sum() < 2:
        return {"trace_ratio": None, "explained": None}
    sums, counts = sums[present], counts[present]
    mean = sums.sum(axis=0) / counts.sum()
    means = sums / counts[:, None]
    between = counts @ np.square(means - mean)
    total = np.maximum(squares - counts.sum() * np.square(mean), between)
    # What is left of a constant dimension is rounding.
    varies = total > squares * counts.sum() * np.finfo(np.float64).eps
    within = float((total - between)[varies].sum())
    explained = between[varies] / total[varies]
    return {
        "trace_ratio": float(between[varies].sum()) / within if within else None,
        "explained": float(explained.sum()) / len(total),
    }


def cache_table(document: Mapping[str, Any]) -> str:
    """Lay out a description for a terminal."""
    of = shown(f"{document['path']}: {document['dataset']}")
    lines = [f"{of}, {document['n_classes']} classes", ""]
    for table in _tables(document):
        cells = [[*table["heads"]], *([_cell(value) for value in row] for row in table["rows"])]
        widths = [max(len(row[k]) for row in cells) for k in range(len(table["heads"]))]
        lines += [shown(table["title"])]
        lines += ["  ".join(map(str.rjust, row, widths)).rstrip() for row in cells]
        lines += [table["note"], ""]
    return "\n".join(lines[:-1])


def cache_page(document: Mapping[str, Any]) -> str:
    """Lay out a description as a page."""
    charts = [
        line_chart(title, f"{caption}, on split {document['split']}.", lines, x="layer", y=y)
        for name, y, title, caption in _OVER_DEPTH
        if (lines := _lines(document["layers"], name))
    ]
    return render("cache.html.j2", document=document, tables=[*_tables(document)], charts=charts)


def _lines(layers: Sequence[Mapping[str, Any]], name: str) -> list[Line]:
    """Give a line for each source and pooling that has several layers."""
    lines = lines_over_depth((one, one[name]) for one in layers if one[name] is not None)
    return [line for line in lines if len(line.x) > 1]


def _tables(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give title, heads, rows and a note of each table."""
    yield {
        "title": "Texts",
        "heads": ("split", "rows", "unlabelled", "texts", "rows repeated", "of several labels"),
        "rows": [tuple(one.values()) for one in document["splits"]],
        "note": "Repeated: the text stands in the split more than once; of several labels: with "
        "different labels.",
    }
    if document["shared_texts"]:
        yield {
            "title": "Texts in two splits",
            "heads": ("splits", "rows of the one", "rows of the other"),
            "rows": [(" ".join(o["splits"]), *o["n_rows"]) for o in document["shared_texts"]],
            "note": "Rows whose text also stands in the other split.",
        }
    yield {
        "title": "Tokens",
        "heads": ("split", "source", "tokens", *_QUANTILES, "max length", "as long"),
        "rows": [tuple(one.values()) for one in document["lengths"]],
        "note": "As long: texts of max length, which are cut, or just fit.",
    }
    chance = document["explained_by_chance"]
    yield {
        "title": f"Layers, on split {document['split']}",
        "heads": (
            *("source", "pooling", "layer", "norm", "deviation", "least", "largest"),
            *("outliers", "their share", "trace ratio", "explained"),
        ),
        "rows": [
            (
                *(one["source"], one["pooling"], one["layer"], one["norm_mean"], one["norm_std"]),
                *(one["norm_min"], one["norm_max"], one["n_outliers"], one["outlier_share"]),
                *(one["trace_ratio"], one["explained"]),
            )
            for one in document["layers"]
        ],
        "note": f"Outliers: dimensions whose mean square is over {OUTLIER} times the average; their"
        " share: of the sum of squares; trace ratio: of the scatter between classes to that "
        "within; explained: share of the variance that classes explain, mean over dimensions"
        + ("." if chance is None else f", by chance {chance:.4f}."),
    }


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else shown(str(value))
