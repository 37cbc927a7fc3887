"""What prompts behind each text cost: four of them in one pass, against mean and last alone.

What limits it is the tokens: those of the prompts are computed for every text. So the ceiling
printed here is the share of tokens that they add, and the cost is given beside it, by the clock and
by what the CPU did, which other work on the machine disturbs less. Beside that stands the plain
way, in which each prompt is computed with its text before it.

    python benchmarks prompts [--model smollm2-135m] [--layers 8,16,24] [--prompts sentiment]

Texts are whole ones, drawn from R8's training texts and SST-2's validation sentences, each a folder
of parquet or csv files. All answers are compared after timing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
from speed.extract import machine, relative_error

from llmembed.extract import Extractor, Recipe
from llmembed.extract.features.branches import Branches
from llmembed.extract.features.extractor import Features
from llmembed.extract.features.forward import Tokenized
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus
from llmembed.extract.texts.prompts import resolve_prompts

BARS = {"r8": harness.most(1.15), "sst2": harness.most(1.6)}
"""Time with the prompts over time without."""
_SPLITS = {"r8": "train", "sst2": "validation"}
_PLAIN = ("mean", "last")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, compare the answers, print a table and one JSON line."""
    parser = harness.command_line(__doc__, "speed/prompts.json")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with r8 and sst2")
    add("--model", default="smollm2-135m")
    add("--layers", default="8,16,24")
    add("--prompts", default="sentiment")
    add("--compute-dtype", default="float32")
    add("--n-tokens", type=int, default=4096, help="of each data set, about")
    add("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    layers = [int(layer) for layer in options.layers.split(",")]
    what = (options.model, layers, resolve_prompts([options.prompts]), options.compute_dtype)
    ours, ways = make_ways(*what)
    how_long = (options.n_tokens, options.rounds)
    document = {
        "benchmark": "prompts",
        "model": options.model,
        "layers": layers,
        "prompts": list(what[2].values()),
        "compute_dtype": options.compute_dtype,
        "machine": machine(),
        "data": {
            name: measure(ours, ways, read(options.data / name, split), *how_long)
            for name, split in _SPLITS.items()
        },
    }
    print_table(document)
    harness.finish(document, options.output)


Way = Callable[[Tokenized], Features]


def make_ways(
    model: str, layers: Sequence[int], prompts: Mapping[str, str], compute_dtype: str
) -> tuple[Extractor, dict[str, Way]]:
    """Load two backbones: without prompts, with them in one pass, and with a pass for each.

    The extractor is the one that takes all prompts in one pass.
    """
    recipe = Recipe(model=model, max_length=2048, compute_dtype=compute_dtype, dtype="float32")
    recipe = recipe.within_positions()
    how: dict[str, Any] = {"layers": layers, "device": "cpu"}
    branches = Branches.of(recipe, prompts)
    plain = Extractor(recipe, poolings=_PLAIN, **how)
    ours = Extractor(recipe, poolings=[*_PLAIN, *branches.suffixes], prompts=prompts, **how)
    assert ours.way.prompts_share

    def a_pass_each(texts: Tokenized) -> Features:
        found = plain.compute(texts)
        for pooling in branches.suffixes:
            behind = plain.compute(branches.behind(texts, pooling))
            found |= {(pooling, layer): behind["last", layer] for layer in layers}
        return found

    return ours, {"plain": plain.compute, "one pass": ours.compute, "a pass each": a_pass_each}


def read(folder: Path, split: str) -> list[str]:
    """Read the texts of a split in an order that is drawn."""
    examples = load_corpus(DatasetOptions(str(folder), splits=(split,))).splits[split]
    texts = examples.batch(slice(None))
    return [texts[row] for row in np.random.default_rng(0).permutation(len(texts))]


def measure(
    ours: Extractor, ways: Mapping[str, Way], texts: Sequence[str], n_tokens: int, rounds: int
) -> dict[str, Any]:
    """Time all ways on the first texts that have so many tokens together, in turns."""
    tokenized = ours.tokenize(texts)
    n_texts = 1 + int(np.searchsorted(np.cumsum(tokenized.n_tokens), n_tokens))
    some = tokenized.take(np.arange(min(n_texts, len(texts))))
    few = some.take(np.arange(min(8, len(some.ids))))
    features = {name: way(few) for name, way in ways.items()}  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, way in ways.items():
            if turn and name == "a pass each":
                continue  # it is slow, and a comparison of answers
            spent, timed = harness.cpu_seconds(partial(harness.timed, partial(way, some)))
            taken, features[name] = timed
            seconds[name].append(taken)
            cpu[name].append(spent)
    found, expected = features["one pass"], features["a pass each"]
    return {
        "n_texts": len(some.ids),
        "n_tokens": int(some.n_tokens.sum()),
        "tokens": float(ours.n_computed(some.n_tokens).sum() / some.n_tokens.sum()),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "time": harness.ratio(seconds["one pass"], seconds["plain"]),
        "cpu_time": harness.ratio(cpu["one pass"], cpu["plain"]),
        "a_pass_each": harness.ratio(seconds["a pass each"], seconds["plain"]),
        "relative_error": max(relative_error(found[key], expected[key]) for key in expected),
    }


def print_table(document: Mapping[str, Any]) -> None:
    """Print the cost beside the tokens that it comes from."""
    print(f"{document['model']}, layers {document['layers']}, {document['prompts']}")
    for name, one in document["data"].items():
        print(f"{name}: {one['n_texts']:,} texts of {one['n_tokens']:,} tokens")
        print(f"  tokens with prompts, of those without          {one['tokens']:8.2f}")
        print(f"  time of a pass for each prompt                 {one['a_pass_each']:8.2f}")
        print(f"  largest relative error                         {one['relative_error']:8.1e}")
        for figure in ("time", "cpu_time"):
            print("  " + BARS[name].line(f"{figure.replace('_', ' ')} of one pass", one[figure]))
