"""Other domains and languages: where do several layers beat one, and what do others reach?

On each data set, with the features of a language model (all layers and poolings of its source) and
of a sentence encoder, the same rows for all:

- `single`: the layer and pooling that folds of the training rows prefer, with LDA;
- `mean`, `max`, `concat`, `cooc` and `auto-4` (`auto`) of four layers, mean over tokens;
- `auto`: the stack of all features; `default`: what `llmembed-fit` does with all of them;
- `LogisticRegressionCV`: scikit-learn's, five strengths by five folds, on the features of `single`;
- `TF-IDF`: words and pairs of words with logistic regression;
- `encoder`: `auto` on the sentence encoder.

Of tweets in several languages with the same classes, `auto` of each is also tested on the others.

    llmembed-extract --dataset texts/NAME --model smollm2-135m --layers 3:31:3
                     --pooling mean,last --max-length 128 --split train,test --cache PLACE/NAME.zarr
    llmembed-extract --dataset texts/NAME --model minilm --layers all
                     --max-length 128 --split train,test --cache PLACE/NAME.zarr
    python benchmarks domains --caches PLACE [--data mr,r8,ohsumed] [--layers 12,15,18,24] [--quick]

Texts are read again where they were extracted from. Seconds are CPU seconds, choosing, fitting and
predicting, from the cached features (TF-IDF from the texts). Every figure is kept in the file of
`--output` as soon as it is there: the same line goes on where it was stopped, and makes anew what
is of other features. Evaluation rows choose nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from in_memory import (
    Ints,
    Rows,
    at_most,
    eval_split_of,
    identity,
    predicted_by,
    read_rows,
)
from regression.cases import one_thread
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from llmembed.cache_format import Cache, open_cache
from llmembed.common.errors import ConfigError
from llmembed.train import FitConfig
from llmembed.train.linear.solved import grid_of
from llmembed.train.measures import wilson_interval
from llmembed.train.reports.texts import find_texts

LANGUAGES = "tweet_sentiment_"
QUICK_ROWS = 300
STRENGTHS, MOST_STEPS = np.logspace(-4, 0, 5), 500


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set: its cache, the rows of it that are used, and what to compare."""

    name: str
    cache: Cache
    train_rows: Ints
    judged: Ints
    source: str
    """Of the language model."""
    encoder: str
    """Source of the sentence encoder."""
    layers: tuple[int, ...]
    """Those that are fused by the fusions of few layers."""

    @functools.cached_property
    def rows(self) -> Rows:
        return read_rows(self.cache, self.source, self.train_rows, self.judged)

    @functools.cached_property
    def of_encoder(self) -> Rows:
        return read_rows(self.cache, self.encoder, self.train_rows, self.judged)

    @functools.cached_property
    def depth(self) -> Rows:
        """Keep the layers to fuse, mean over tokens."""
        kept = [
            k
            for k, one in enumerate(self.rows.features)
            if one.layer in self.layers and one.pooling == "mean"
        ]
        if len(kept) < 2:
            raise ConfigError(
                f"{self.cache.path} has of layers {', '.join(map(str, self.layers))} of "
                f"{self.source!r}, mean over tokens, only {len(kept)}. Pass two or more "
                "to --layers."
            )
        return self.rows.at(kept)

    @functools.cached_property
    def single(self) -> Rows:
        """Keep the feature that folds of the training rows prefer."""
        config = FitConfig(cache="texts", accelerator="cpu", fusion="auto")
        grid = grid_of(config.plan().method, self.rows.data(config), config.seed)
        every = range(len(self.rows.features))
        accuracy = [grid.choose("single", [k]).merit for k in every]
        return self.rows.at([max(every, key=accuracy.__getitem__)])

    def tfidf(self) -> Ints:
        """Fit TF-IDF with logistic regression, as the reports of runs do."""
        eval_split = eval_split_of(self.cache)
        texts = find_texts(self.cache, ["train", eval_split])
        train, new = (
            [texts[name][row] for row in rows]
            for name, rows in (("train", self.train_rows), (eval_split, self.judged))
        )
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        one_class = LogisticRegression(C=10.0, solver="liblinear")
        model = make_pipeline(words, OneVsRestClassifier(one_class))
        predicted: Ints = model.fit(train, self.rows.y).predict(new)
        return predicted


def logistic_cv(rows: Rows) -> Ints:
    """Fit scikit-learn's LogisticRegressionCV on standardised features."""
    model = make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(
            Cs=STRENGTHS,
            cv=5,
            max_iter=MOST_STEPS,
            scoring="accuracy",
            l1_ratios=(0,),
            use_legacy_attributes=False,
        ),
    )
    predicted: Ints = model.fit(rows.x, rows.y).predict(rows.x_eval)
    return predicted


METHODS: dict[str, Callable[[DataSet], Ints]] = {
    "single": lambda data: predicted_by(data.single, fusion="concat", head="lda"),
    "mean": lambda data: predicted_by(data.depth, fusion="mean", head="lda"),
    "max": lambda data: predicted_by(data.depth, fusion="max", head="lda"),
    "concat": lambda data: predicted_by(data.depth, fusion="concat", head="lda"),
    "cooc": lambda data: predicted_by(data.depth, fusion="cooc"),
    "auto-4": lambda data: predicted_by(data.depth, fusion="auto"),
    "default": lambda data: predicted_by(data.rows),
    "auto": lambda data: predicted_by(data.rows, fusion="auto"),
    "encoder": lambda data: predicted_by(data.of_encoder, fusion="auto"),
    "LogisticRegressionCV": lambda data: logistic_cv(data.single),
    "TF-IDF": DataSet.tfidf,
}
OF_LAYERS = ("mean", "max", "concat", "cooc", "auto-4")


@harness.known_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Judge every method on every data set, and print the tables and the JSON line."""
    parser = harness.command_line(__doc__, output="studies/domains.json")
    add = parser.add_argument
    add("--caches", type=Path, required=True, help="folder that holds NAME.zarr of each data set")
    add("--data", help="data sets, separated by commas; without it, all of the folder")
    add("--source", default="smollm2-135m", help="source of the language model")
    add("--encoder", default="minilm", help="source of the sentence encoder")
    add("--layers", default="12,15,18,24", help="layers that the fusions of few layers take")
    add("--methods", default=",".join(METHODS))
    add("--quick", action="store_true", help=f"at most {QUICK_ROWS} rows of each split")
    options = parser.parse_args(arguments)
    found = sorted(path.stem for path in options.caches.glob("*.zarr"))
    names = options.data.split(",") if options.data else found
    document = harness.read(options.output) or {"data": {}, "transfer": {}}
    sets = [open_data_set(name, options) for name in names]
    for data in sets:
        for _ in study(data, options.methods.split(","), document["data"]):
            harness.write(document, options.output)
    languages = [one for one in sets if one.name.startswith(LANGUAGES)]
    for _ in transfer(languages, document["transfer"]):
        harness.write(document, options.output)
    print(table(document["data"], names))
    print(transfer_table(document["transfer"]))
    harness.finish(document, options.output)
    return 0


def open_data_set(name: str, options: Any) -> DataSet:
    """Open the cache of a data set; `--quick` takes some rows alone."""
    cache = open_cache(options.caches / f"{name}.zarr")
    most = QUICK_ROWS if options.quick else None
    return DataSet(
        name=name,
        cache=cache,
        train_rows=at_most(cache["train"].labels, most),
        judged=at_most(cache[eval_split_of(cache)].labels, most),
        source=options.source,
        encoder=options.encoder,
        layers=tuple(int(layer) for layer in options.layers.split(",")),
    )


def study(data: DataSet, methods: Sequence[str], known: dict[str, Any]) -> Iterator[None]:
    """Judge what the record does not have yet of a data set, a method at a time."""
    entry = known.setdefault(data.name, {})
    for method in (one for one in METHODS if one in methods):
        of = _of(data, data.encoder if method == "encoder" else data.source)
        of |= {"layers": list(data.layers)} if method in OF_LAYERS else {}
        if entry.get(method, {}).get("of") == of:
            continue
        with one_thread():
            seconds, predicted = harness.cpu_seconds(functools.partial(METHODS[method], data))
        entry[method] = {"of": of, **figures(predicted == data.rows.y_eval), "seconds": seconds}
        yield


def transfer(sets: Sequence[DataSet], known: dict[str, Any]) -> Iterator[None]:
    """Train on each language, and test on all, with either source."""
    for trained_on in sets:
        for tested_on in sets:
            for of_source in ("rows", "of_encoder"):
                own: Rows = getattr(trained_on, of_source)
                other: Rows = getattr(tested_on, of_source)
                source = own.features[0].source
                of = [_of(one, source) for one in (trained_on, tested_on)]
                label = f"{source}: {trained_on.name} -> {tested_on.name}"
                if known.get(label, {}).get("of") == of:
                    continue
                rows = dataclasses.replace(own, x_eval=other.x_eval, y_eval=other.y_eval)
                with one_thread():
                    right = predicted_by(rows, fusion="auto") == rows.y_eval
                known[label] = {"of": of, **figures(right)}
                yield


def figures(right: Any) -> dict[str, Any]:
    """Give the share of right answers and its 95 % interval.

    >>> figures(np.array([True, True, True, False]))["accuracy"]
    0.75
    """
    n_right, n = int(right.sum()), len(right)
    return {"n": n, "accuracy": n_right / n, "interval": wilson_interval(n_right, n)}


def table(data: Mapping[str, Any], names: Sequence[str]) -> str:
    """Lay accuracies in percent out, a data set a line; below them the means of all."""
    methods = [one for one in METHODS if any(one in data[name] for name in names)]
    lines = [
        harness.row("data", *methods, "half-width"),
        harness.row(*["---"] * (len(methods) + 2)),
    ]
    for name in names:
        low, high = next(iter(data[name].values()))["interval"]
        cells = [_percent([data[name][one]]) if one in data[name] else "" for one in methods]
        lines.append(harness.row(name, *cells, f"{50 * (high - low):.1f}"))
    complete = [one for one in methods if all(one in data[name] for name in names)]
    means = [_percent([data[k][one] for k in names]) if one in complete else "" for one in methods]
    seconds = [
        f"{sum(data[name][one]['seconds'] for name in names if one in data[name]):.0f}"
        for one in methods
    ]
    lines += [harness.row("mean", *means, ""), harness.row("CPU s", *seconds, "")]
    return "\n".join(lines)


def transfer_table(found: Mapping[str, Any]) -> str:
    """Lay the transfers out, trained on a line, tested on in columns."""
    pairs = {label: label.rpartition(": ")[2].split(" -> ") for label in found}
    tested = list(dict.fromkeys(pair[1] for pair in pairs.values()))
    trained = dict.fromkeys(label.rpartition(" -> ")[0] for label in found)
    lines = [harness.row("trained on", *tested), harness.row(*["---"] * (1 + len(tested)))]
    for line in trained:
        cells = (found.get(f"{line} -> {name}") for name in tested)
        lines.append(harness.row(line, *(_percent([one]) if one else "" for one in cells)))
    return "\n".join(lines) if found else ""


def _percent(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{100 * statistics.mean(row['accuracy'] for row in rows):.1f}"


def _of(data: DataSet, source: str) -> dict[str, Any]:
    return identity(data.cache, source) | {"rows": [len(data.train_rows), len(data.judged)]}
