"""Frozen features, fine-tuning or prompting: one backbone, the same texts, and what each costs.

The paper claims 4 % of the parameters, 1.8 % of the electricity and 1.5 % of the run time of its
counterparts, which ran elsewhere. Here every method gets the same stratified subset and starts from
the texts: extraction is part of the frozen methods. Each runs in its own process on one thread, and
is tested by row against the first (exact McNemar test).

    python benchmarks/questions.py --data mr=texts/mr --data r8=r8 [--train 400] [--test 200]
                                   [--methods frozen,lora,...] [--output FILE]

FILE is written after each method, and keeps the rows of earlier calls with the same settings, which
are not run again. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from baselines import pack, processor, unpack
from compare import Ints, sign_flip_p
from finetuning import fine_tune
from meter import measured
from prompting import NO_LABEL, prompt

from llmembed.common.errors import ConfigError, LLMEmbedError
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus
from llmembed.train import FitConfig, fit
from llmembed.train.measures import wilson_interval

METHODS = (
    "frozen lda",
    "frozen cooc",
    "lora",
    "full",
    "zero-shot free",
    "zero-shot constrained",
    "few-shot free",
    "few-shot constrained",
)
FROZEN: dict[str, dict[str, Any]] = {
    "lda": {"fusion": "concat", "head": "lda"},
    "cooc": {"fusion": "cooc"},
}
Split = tuple[list[str], npt.NDArray[np.int32]]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A stratified subset of a data set."""

    name: str
    """Its name in the table."""
    labels: tuple[str, ...]
    """Names of the C classes."""
    train: Split
    """Texts, and int32 `[N]` classes."""
    test: Split
    """Texts, and int32 `[n]` classes."""

    @property
    def digest(self) -> str:
        """Say which texts and classes these are."""
        parts = [(texts, labels.tolist()) for texts, labels in (self.train, self.test)]
        return hashlib.sha256(json.dumps([self.labels, parts]).encode()).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the methods on each data set, and print a table and the JSON line."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes that are measured
    document: dict[str, Any] = {"machine": processor(), "settings": _settings(options)}
    rows = _earlier_rows(document, options.output)
    document["rows"] = rows
    print("| data | method | accuracy | p | no label | wall s | CPU s | peak MB | kJ | trained |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    try:
        for pair in options.data:
            name, _, dataset = pair.partition("=")
            draw = held_out if options.held_out else subset
            texts = draw(name, dataset or name, options.train, options.test)
            for method in options.methods.split(","):
                known = [one for one in rows if _key(one) == (texts.digest, method)]
                if not known:
                    rows.append(against_first(run_method(texts, method, options), rows))
                    _write(document, options.output)
                print(_row((known or rows)[-1]), flush=True)
    except LLMEmbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(document))
    return 0


def against_first(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add the p-value of the exact test against the first method on the same texts."""
    first = next((one for one in rows if one["texts"] == row["texts"]), row)
    right, other = (unpack(one["correct"], one["n_test"]) for one in (row, first))
    row["p"] = sign_flip_p(right - other)
    return row


def subset(name: str, dataset: str, n_train: int, n_test: int) -> Texts:
    """Draw the training and evaluation texts, class shares kept."""
    splits: list[Split] = []
    for split, limit in (("train", n_train), ("test", n_test)):
        corpus = load_corpus(DatasetOptions(dataset, splits=[split], limit=limit))
        examples = corpus.splits[split]
        splits.append((examples.batch(slice(None)), examples.labels))
    return Texts(name=name, labels=corpus.labels, train=splits[0], test=splits[1])


def held_out(name: str, dataset: str, n_train: int, n_test: int) -> Texts:
    """Draw texts to choose settings by: all of the training split, class shares kept."""
    drawn = subset(name, dataset, n_train + n_test, 1)
    lines, labels = drawn.train
    share = np.zeros(len(labels))
    for label in np.unique(labels):
        (rows,) = np.nonzero(labels == label)
        share[rows] = np.arange(len(rows)) / len(rows)
    is_out = share >= n_train / (n_train + n_test)
    train, test = (
        ([line for line, one in zip(lines, chosen, strict=True) if one], labels[chosen])
        for chosen in (~is_out, is_out)
    )
    return dataclasses.replace(drawn, train=train, test=test)


def run_method(texts: Texts, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one method in a process of its own, and gather its figures.

    Raises:
        ConfigError: there is no such method.
    """
    if method not in METHODS:
        raise ConfigError.unknown("method", method, METHODS, "Pass some of them to --methods.")
    call = functools.partial(
        answer,
        texts,
        method,
        model=options.model,
        layers=options.layers,
        epochs=options.epochs,
        max_length=options.max_length,
        lr=options.lr,
    )
    (predicted, n_trained, stages), cost = measured(call, options.watts_per_core)
    right: Ints = (predicted == texts.test[1]).astype(np.int64)
    return {
        "data": texts.name,
        "texts": texts.digest,
        "method": method,
        "n_train": len(texts.train[0]),
        "n_test": len(right),
        "accuracy": float(right.mean()),
        "interval": wilson_interval(int(right.sum()), len(right)),
        "correct": pack(right),
        "no_label": float((predicted == NO_LABEL).mean()),
        "n_trained": n_trained,
        "stages": stages,
        **dataclasses.asdict(cost),
    }


def answer(
    texts: Texts,
    method: str,
    *,
    model: str,
    layers: str,
    epochs: int,
    max_length: int,
    lr: float | None = None,
) -> tuple[npt.NDArray[np.int64], int, dict[str, float]]:
    """Label the evaluation texts by one method.

    Returns:
        int64 `[n]` of classes, the number of trained weights, and wall seconds of the stages where
        a method has any.
    """
    kind, _, variant = method.partition(" ")
    if kind == "frozen":
        return _frozen(texts, variant, model, layers, max_length)
    if kind in {"lora", "full"}:
        n_classes = len(texts.labels)
        predicted, n_trained = fine_tune(
            model,
            method,
            texts.train,
            texts.test[0],
            n_classes,
            epochs=epochs,
            max_length=max_length,
            lr=lr,
        )
        return predicted, n_trained, {}
    predicted, n_trained = prompt(
        model,
        texts.train,
        texts.test[0],
        texts.labels,
        few_shot=kind == "few-shot",
        constrained=variant == "constrained",
        max_length=max_length,
    )
    return predicted, n_trained, {}


def _frozen(
    texts: Texts, head: str, model: str, layers: str, max_length: int
) -> tuple[npt.NDArray[np.int64], int, dict[str, float]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts"
        data.mkdir()
        (data / "labels.json").write_text(json.dumps(texts.labels), encoding="utf-8")
        for split, (lines, labels) in (("train", texts.train), ("test", texts.test)):
            pq.write_table(pa.table({"text": lines, "label": labels}), data / f"{split}.parquet")
        cache = f"{folder}/cache.zarr"
        started = time.perf_counter()
        extract(
            ExtractConfig(
                model=model, layers=layers, dataset=str(data), cache=cache, max_length=max_length
            )
        )
        stages = {"extract": time.perf_counter() - started}
        run = fit(FitConfig(cache=cache, output=f"{folder}/run", **FROZEN[head]))
        stages |= run.metrics["seconds"]
        table = pq.read_table(run.path / "predictions.parquet", columns=["predicted"])
        indices = {name: index for index, name in enumerate(texts.labels)}
        predicted = [indices[name] for name in table["predicted"].to_pylist()]
        return np.array(predicted), run.metrics["n_parameters"], stages


def _row(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    cells = (
        row["data"],
        row["method"],
        f"{row['accuracy']:.3f} ({low:.3f}-{high:.3f})",
        f"{row['p']:.2g}",
        f"{row['no_label']:.1%}",
        f"{row['wall_s']:.0f}",
        f"{row['cpu_s']:.0f}",
        f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        f"{row['joules'] / 1e3:.2f}",
        f"{row['n_trained']:,}",
    )
    return f"| {' | '.join(cells)} |"


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Give what figures depend on: not where the texts lie, nor which of the methods are run."""
    names = (
        "model",
        "layers",
        "train",
        "test",
        "epochs",
        "lr",
        "held_out",
        "max_length",
        "watts_per_core",
    )
    return {name: getattr(options, name) for name in names}


def _earlier_rows(document: dict[str, Any], output: str | None) -> list[dict[str, Any]]:
    """Read the rows of earlier calls with the same settings on the same machine."""
    if output is None or not Path(output).is_file():
        return []
    earlier = json.loads(Path(output).read_text(encoding="utf-8"))
    is_same = all(earlier[key] == value for key, value in document.items())
    return list(earlier["rows"]) if is_same else []


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["texts"], row["method"]


def _write(document: dict[str, Any], output: str | None) -> None:
    if output is not None:
        Path(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", action="append", required=True, help="NAME=PATH, or an alias; repeatable")
    add("--model", default="smollm2-135m")
    add("--layers", default="8,16,24", help="layers of the frozen method")
    add("--train", type=int, default=400, help="training texts, stratified")
    add("--test", type=int, default=200, help="evaluation texts, stratified")
    add("--epochs", type=int, default=4, help="of fine-tuning")
    add("--lr", type=float, help="highest learning rate of fine-tuning, in place of the chosen one")
    add("--held-out", action="store_true", help="evaluate on other training texts instead")
    add("--max-length", type=int, default=64, help="tokens kept of a text")
    add("--methods", default=",".join(METHODS))
    add("--watts-per-core", type=float, default=10.0, help="nominal, where RAPL cannot be read")
    add("--output", help="file for the JSON document")
    return parser


if __name__ == "__main__":
    sys.exit(main())
