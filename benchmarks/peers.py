"""What others would do with the same rows: accuracy and CPU seconds, one thread, the same run.

On cached features: our `concat` with LDA and our default, `cooc`, beside LogisticRegressionCV of
scikit-learn. From the texts, which must be those of the cache, row by row: TF-IDF of words and
pairs of words, and MiniLM by sentence-transformers, both with logistic regression; and SetFit.
Differences are tested by row against the first (exact McNemar test).

    python benchmarks/peers.py ci --data mr=texts/mr --data r8=r8 [--setfit 200] [--output FILE]

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from compare import Ints, sign_flip_p
from encoders import encode_and_regress, tune_by_pairs
from measure import one_thread, run_case, warm_up
from places import Places, cached_texts, environment_places, require_cache
from rerun import COMMITTED, WORK
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from suites import CachePlan, FitPlan, load_suite
from threadpoolctl import threadpool_limits
from yardstick import cpu_seconds

from llmembed.cache_format import Split, open_cache
from llmembed.common.errors import LLMEmbedError

OURS = (
    FitPlan(name="concat + LDA", options={"fusion": "concat", "head": "lda"}),
    FitPlan(name="cooc", options={"fusion": "cooc"}),
)
STRENGTHS = 5  # values of C that LogisticRegressionCV tries in five folds; its default is ten


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ours and the peers on each data set, and print a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", default="ci")
    parser.add_argument("--data", action="append", default=[], help="NAME=PATH, or NAME=alias")
    parser.add_argument("--caches", action="append", default=[], help="folder or URL of caches")
    parser.add_argument(
        "--encoder", default="minilm", help="of the peers that encode by themselves"
    )
    parser.add_argument("--setfit", type=int, default=0, help="steps of SetFit; 0 leaves it out")
    parser.add_argument("--output", help="file for the JSON document")
    options = parser.parse_args(arguments)
    places = Places(work=WORK, others=(*environment_places(options.caches), str(COMMITTED)))
    rows = []
    print("| data | method | accuracy | p against ours | CPU s |\n|---|---|---|---|---|")
    try:
        for pair in options.data:
            name, _, dataset = pair.partition("=")
            plan = load_suite(options.suite).caches[name]
            path = require_cache(plan, places)
            for row in compare_peers(plan, path, dataset or name, options.encoder, options.setfit):
                rows.append(row)
                cells = f"{row['accuracy']:.4f} | {row['p']:.2g} | {row['cpu_s']:.1f}"
                print(f"| {name} | {row['method']} | {cells} |", flush=True)
    except LLMEmbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    document = {"suite": options.suite, "rows": rows}
    if options.output:
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return 0


def compare_peers(
    plan: CachePlan, path: str, dataset: str, encoder: str, setfit_steps: int = 0
) -> Iterator[dict[str, Any]]:
    """Run ours, then each peer, on one cache and its texts; the first is what others are tested on.

    Raises:
        CacheMismatchError: the texts are not those of the cache.
    """
    warm_up()
    labels = open_cache(path)[plan.eval_split].labels.astype(np.int64)
    peers = _peers(plan, path, dataset, encoder, setfit_steps)
    source = plan.sources[0].name
    ours = [run_case(path, plan, fit_plan, source=(source,)) for fit_plan in OURS]
    for fit_plan, outcome in zip(OURS, ours, strict=True):
        name = f"{fit_plan.name} on {source}"
        yield _row(plan, name, outcome.correct, ours[0].correct, outcome.seconds)
    for name, predict in peers.items():
        with threadpool_limits(1), one_thread():
            seconds, predicted = cpu_seconds(predict)
        right = (predicted == labels).astype(np.int64)
        yield _row(plan, name, right, ours[0].correct, seconds)


def _peers(
    plan: CachePlan, path: str, dataset: str, encoder: str, setfit_steps: int
) -> dict[str, Callable[[], Ints]]:
    cache, source = open_cache(path), plan.sources[0].name
    train, test = cache["train"], cache[plan.eval_split]
    texts, new = (cached_texts(plan, dataset, split) for split in (train, test))
    y = train.labels
    x, x_new = _features(train, source), _features(test, source)
    peers: dict[str, Callable[[], Ints]] = {
        f"LogisticRegressionCV on {source}": functools.partial(_regression, x, y, x_new),
        "TF-IDF + LogisticRegressionCV": functools.partial(_tfidf, texts, y, new),
        f"sentence-transformers {encoder} + LogisticRegressionCV": functools.partial(
            encode_and_regress, encoder, _logistic(), texts, y, new
        ),
    }
    if setfit_steps:
        peers[f"SetFit {encoder}, {setfit_steps} steps"] = functools.partial(
            tune_by_pairs, encoder, setfit_steps, texts, y, new
        )
    return peers


def _row(plan: CachePlan, method: str, right: Ints, ours: Ints, cpu_s: float) -> dict[str, Any]:
    accuracy, p = float(right.mean()), sign_flip_p(right - ours)
    return {"data": plan.name, "method": method, "accuracy": accuracy, "p": p, "cpu_s": cpu_s}


def _features(split: Split, source: str) -> npt.NDArray[np.float32]:
    """Put all layers of a source side by side, float32 `[N, F]`."""
    parts = [split.features(layer, source) for layer in split.layers(source)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _regression(
    x: npt.NDArray[np.float32], y: npt.NDArray[np.int32], x_test: npt.NDArray[np.float32]
) -> Ints:
    model = make_pipeline(StandardScaler(), _logistic())
    predicted: Ints = model.fit(x, y).predict(x_test)
    return predicted


def _tfidf(texts: list[str], y: npt.NDArray[np.int32], test_texts: list[str]) -> Ints:
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), _logistic())
    predicted: Ints = model.fit(texts, y).predict(test_texts)
    return predicted


def _logistic() -> Any:
    return LogisticRegressionCV(
        Cs=np.logspace(-4, 4, STRENGTHS),
        cv=5,
        max_iter=500,
        scoring="accuracy",
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )


if __name__ == "__main__":
    sys.exit(main())
