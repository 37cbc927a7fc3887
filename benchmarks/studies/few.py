"""Few texts: our default, logistic regression and SetFit on the same 8, 16 or 64 rows a class.

Rows are drawn anew ten times, as many of each class (all of a class that has fewer), and every
method is judged by the same evaluation rows, at most 1,000, stratified. On the cached features of
each source stand

- `default` and `auto`: what `llmembed-fit` and `LLMEmbedClassifier` do, without and with
  `--fusion auto`, with all that the cache has of the source;
- `logistic`: scikit-learn's LogisticRegression on the same features, standardised;
- `logistic-last`: the same on the last layer alone, scaled to length 1, which is what a frozen
  sentence encoder with a regression on it does.

`setfit` starts from the texts with MiniLM as body, in an environment of its own, since it may want
other versions of what we use (`pip install setfit`, 1.2.0, ran with transformers 5.24).

The caches are those of `domains`, whose help has the commands that make them.

    python benchmarks few --caches PLACE --data mr,sst2 [--rows 8,16,64] [--draws 10]
                          [--setfit venv/bin/python] [--quick]

Every draw is kept in the file of `--output` as soon as it is made, so that the same line goes on
where it was stopped; figures of a cache whose features or texts are others by now are made again.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

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
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from llmembed.cache_format import Cache, open_cache
from llmembed.extract import Recipe
from llmembed.train.reports.texts import find_texts

BODY, MAX_LENGTH, MOST_STEPS = "minilm", 128, 1000
SETFIT = "setfit"
Cell: TypeAlias = dict[str, list[float]]


@harness.known_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Judge every method on every draw, and print a table and the JSON line."""
    parser = harness.command_line(__doc__, output="studies/few.json")
    add = parser.add_argument
    add("--caches", type=Path, required=True, help="folder that holds NAME.zarr of each data set")
    add("--data", required=True, help="data sets, separated by commas")
    add("--rows", default="8,16,64", help="training rows a class")
    add("--draws", type=int, default=10)
    add("--sources", default="", help="sources of the caches; without it, all")
    add("--methods", default=",".join([*METHODS, SETFIT]))
    add("--setfit", help="interpreter that has SetFit; without it, SetFit is left out")
    add("--test-rows", type=int, default=1000, help="most evaluation rows")
    add("--quick", action="store_true", help="two draws, 8 rows a class and 200 evaluation rows")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.draws, options.test_rows = "8", 2, 200
    document = harness.read(options.output) or {"data": {}}
    sizes = [int(n) for n in options.rows.split(",")]
    for name in options.data.split(","):
        for _ in study(name, options, sizes, document["data"]):
            harness.write(document, options.output)
    print(table(document["data"], sizes))
    harness.finish(document, options.output)
    return 0


def study(name: str, options: Any, sizes: Sequence[int], data: dict[str, Any]) -> Iterator[None]:
    """Judge what the record does not have yet of a data set, a draw at a time."""
    cache = open_cache(options.caches / f"{name}.zarr")
    split = cache[eval_split_of(cache)]
    judged = at_most(split.labels, options.test_rows)
    labels, y = split.labels[judged], np.asarray(cache["train"].labels, dtype=np.int64)
    methods = options.methods.split(",")

    def cells(method: str, source: str | None) -> Iterator[tuple[int, Cell, range]]:
        of = identity(cache, source) | {"test_rows": options.test_rows}
        known = data.setdefault(name, {})
        label = f"{source}: {method}" if source else method
        if known.get(label, {}).get("of") != of:
            known[label] = {"of": of, "sizes": {}}
        for n in sizes:
            cell = known[label]["sizes"].setdefault(str(n), {"accuracy": [], "seconds": []})
            yield n, cell, range(len(cell["accuracy"]), options.draws)

    for source in options.sources.split(",") if options.sources else cache.sources:
        rows = read_rows(cache, source, np.arange(len(y)), judged)
        for method in (one for one in METHODS if one in methods):
            for n, cell, seeds in cells(method, source):
                for seed in seeds:
                    predict = functools.partial(METHODS[method], rows.drawn(draw(y, n, seed)))
                    with one_thread():
                        seconds, predicted = harness.cpu_seconds(predict)
                    _keep(cell, predicted, labels, seconds)
                    yield
    for n, cell, seeds in cells(SETFIT, None) if options.setfit and SETFIT in methods else ():
        for found in setfit_answers(options.setfit, cache, judged, n, seeds):
            _keep(cell, np.array(found["predicted"]), labels, found["seconds"])
            yield


def draw(y: Ints, n: int, seed: int) -> Ints:
    """Draw n rows of each class, or all that it has.

    >>> draw(np.array([0, 0, 0, 1]), 2, seed=0).tolist()
    [0, 2, 3]
    """
    generator = np.random.default_rng(seed)
    classes = [np.flatnonzero(y == label) for label in np.unique(y[y >= 0])]
    return np.sort(np.concatenate([generator.permutation(rows)[:n] for rows in classes]))


def _last(rows: Rows) -> Rows:
    """Keep the last layer."""
    return rows.at([max(range(len(rows.features)), key=lambda k: rows.features[k].layer)])


def logistic(rows: Rows, *, scaler: Callable[[], Any]) -> Ints:
    """Fit scikit-learn's LogisticRegression with its own strength."""
    model = make_pipeline(scaler(), LogisticRegression(max_iter=MOST_STEPS))
    predicted: Ints = model.fit(rows.x, rows.y).predict(rows.x_eval)
    return predicted


METHODS: dict[str, Callable[[Rows], Ints]] = {
    "default": predicted_by,
    "auto": functools.partial(predicted_by, fusion="auto"),
    "logistic": functools.partial(logistic, scaler=StandardScaler),
    "logistic-last": lambda rows: logistic(_last(rows), scaler=Normalizer),
}


def setfit_answers(
    interpreter: str, cache: Cache, judged: Ints, n: int, seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Let SetFit label the evaluation rows from each draw: classes predicted, and seconds."""
    if not seeds:
        return
    eval_split = eval_split_of(cache)
    texts = find_texts(cache, ["train", eval_split])
    y = np.asarray(cache["train"].labels, dtype=np.int64)
    draws = []
    for seed in seeds:
        rows = draw(y, n, seed)
        own = [texts["train"][row] for row in rows]
        draws.append({"texts": own, "y": y[rows].tolist(), "seed": seed})
    recipe = Recipe(model=BODY, max_length=MAX_LENGTH, compute_dtype="float32", dtype="float16")
    asked = {"model": str(recipe.files.folder), "max_length": MAX_LENGTH, "draws": draws}
    asked["new"] = [texts[eval_split][row] for row in judged]
    command = [interpreter, str(harness.HERE / "setfit_draws.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def table(data: Mapping[str, Any], sizes: Sequence[int]) -> str:
    """Lay out means over the draws and their standard errors, a line a method."""
    columns = [
        (name, str(n))
        for name, methods in data.items()
        for n in sizes
        if any(str(n) in one["sizes"] for one in methods.values())
    ]
    lines = [
        harness.row("method", *map(", ".join, columns)),
        harness.row(*["---"] * (1 + len(columns))),
    ]
    for method in dict.fromkeys(method for methods in data.values() for method in methods):
        cells = (data[name].get(method, {"sizes": {}})["sizes"].get(n) for name, n in columns)
        lines.append(harness.row(method, *map(_figure, cells)))
    return "\n".join(lines)


def _figure(cell: Cell | None) -> str:
    found = [100 * accuracy for accuracy in cell["accuracy"]] if cell else []
    if len(found) < 2:
        return ""
    error = statistics.stdev(found) / len(found) ** 0.5
    return f"{statistics.mean(found):.1f} ± {error:.1f}"


def _keep(cell: Cell, predicted: Ints, y: Any, seconds: float) -> None:
    cell["accuracy"].append(round(float((predicted == y).mean()), 6))
    cell["seconds"].append(round(seconds, 3))
