"""Frozen features, fine-tuning or prompting: one backbone, the same texts, and what each costs.

The paper claims 4 % of the parameters, 1.8 % of the electricity and 1.5 % of the run time of its
counterparts, which ran elsewhere. Here every method gets the same stratified subset and starts from
the texts: extraction is part of the frozen method. Each runs in its own process on one thread.

    python benchmarks/questions.py --data mr=texts/mr --data r8=r8 [--train 400] [--test 200]
                                   [--methods frozen,lora,...] [--output FILE]

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from finetuning import fine_tune
from meter import measured
from prompting import NO_LABEL, prompt

from llmembed.cache_format.errors import ConfigError, LLMEmbedError
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.corpora import load_corpus
from llmembed.train import FitConfig, fit

METHODS = (
    "frozen",
    "lora",
    "full",
    "zero-shot free",
    "zero-shot constrained",
    "few-shot free",
    "few-shot constrained",
)
N_SHOTS = 4
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the methods on each data set, and print a table and the JSON line."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes that are measured
    rows = []
    print("| data | method | accuracy | no label | wall s | CPU s | peak MB | kJ | trained |")
    print("|---|---|---|---|---|---|---|---|---|")
    try:
        for pair in options.data:
            name, _, dataset = pair.partition("=")
            texts = subset(name, dataset or name, options.train, options.test)
            for method in options.methods.split(","):
                rows.append(run_method(texts, method, options))
                print(_row(rows[-1]), flush=True)
    except LLMEmbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    document = {"settings": vars(options), "rows": rows}
    if options.output:
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return 0


def subset(name: str, dataset: str, n_train: int, n_test: int) -> Texts:
    """Draw the training and evaluation texts, class shares kept."""
    splits: list[Split] = []
    for split, limit in (("train", n_train), ("test", n_test)):
        corpus = load_corpus(dataset, splits=[split], limit=limit)
        examples = corpus.splits[split]
        splits.append((examples.batch(slice(None)), examples.labels))
    return Texts(name=name, labels=corpus.labels, train=splits[0], test=splits[1])


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
    )
    (predicted, n_trained), cost = measured(call, options.watts_per_core)
    return {
        "data": texts.name,
        "method": method,
        "n_train": len(texts.train[0]),
        "n_test": len(texts.test[0]),
        "accuracy": float((predicted == texts.test[1]).mean()),
        "no_label": float((predicted == NO_LABEL).mean()),
        "n_trained": n_trained,
        **dataclasses.asdict(cost),
    }


def answer(
    texts: Texts, method: str, *, model: str, layers: str, epochs: int, max_length: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Label the evaluation texts by one method: int64 `[n]`, and the number of trained weights."""
    if method == "frozen":
        return _frozen(texts, model, layers, max_length)
    if method in {"lora", "full"}:
        n_classes = len(texts.labels)
        return fine_tune(
            model,
            method,
            texts.train,
            texts.test[0],
            n_classes,
            epochs=epochs,
            max_length=max_length,
        )
    shots, _, decoding = method.partition(" ")
    return prompt(
        model,
        texts.train,
        texts.test[0],
        texts.labels,
        n_shots=N_SHOTS if shots == "few-shot" else 0,
        constrained=decoding == "constrained",
        max_length=max_length,
    )


def _frozen(
    texts: Texts, model: str, layers: str, max_length: int
) -> tuple[npt.NDArray[np.int64], int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts"
        data.mkdir()
        (data / "labels.json").write_text(json.dumps(texts.labels), encoding="utf-8")
        for split, (lines, labels) in (("train", texts.train), ("test", texts.test)):
            pq.write_table(pa.table({"text": lines, "label": labels}), data / f"{split}.parquet")
        cache = f"{folder}/cache.zarr"
        extract(
            ExtractConfig(
                model=model, layers=layers, dataset=str(data), cache=cache, max_length=max_length
            )
        )
        run = fit(FitConfig(cache=cache, fusion="concat", head="lda", output=f"{folder}/run"))
        table = pq.read_table(run.path / "predictions.parquet", columns=["predicted"])
        indices = {name: index for index, name in enumerate(texts.labels)}
        predicted = [indices[name] for name in table["predicted"].to_pylist()]
        head = run.classifier.head
        return np.array(predicted), sum(weight.numel() for weight in head.parameters())


def _row(row: dict[str, Any]) -> str:
    cells = (
        row["data"],
        row["method"],
        f"{row['accuracy']:.3f}",
        f"{row['no_label']:.1%}",
        f"{row['wall_s']:.0f}",
        f"{row['cpu_s']:.0f}",
        f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        f"{row['joules'] / 1e3:.2f}",
        f"{row['n_trained']:,}",
    )
    return f"| {' | '.join(cells)} |"


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
    add("--epochs", type=int, default=3, help="of fine-tuning")
    add("--max-length", type=int, default=64, help="tokens kept of a text")
    add("--methods", default=",".join(METHODS))
    add("--watts-per-core", type=float, default=10.0, help="nominal, where RAPL cannot be read")
    add("--output", help="file for the JSON document")
    return parser


if __name__ == "__main__":
    sys.exit(main())
