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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
from speed.extract import machine, relative_error

from llmembed.extract import Extractor, Recipe
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus
from llmembed.extract.texts.prompts import pooling_of, resolve_prompts

BARS = {"r8": harness.most(1.15), "sst2": harness.most(1.6)}
"""Time with the prompts over time without."""
_SPLITS = {"r8": "train", "sst2": "validation"}
_PLAIN = ("mean", "last")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, compare the answers, print a table and one JSON line."""
    parser = harness.command_line(__doc__, "studies/prompts.json")
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
    ways = extractors(*what)
    document = {
        "benchmark": "prompts",
        "model": options.model,
        "layers": layers,
        "prompts": list(what[2].values()),
        "compute_dtype": options.compute_dtype,
        "machine": machine(),
        "data": {
            name: measure(ways, read(options.data / name, split), options.n_tokens, options.rounds)
            for name, split in _SPLITS.items()
        },
    }
    print_table(document)
    harness.finish(document, options.output)


def extractors(
    model: str, layers: Sequence[int], prompts: Mapping[str, str], compute_dtype: str
) -> dict[str, Extractor]:
    """Load three ways: without prompts, with them in one pass, and with a pass for each."""
    recipe = Recipe(model=model, max_length=2048, compute_dtype=compute_dtype, dtype="float32")
    recipe = recipe.within_positions()
    named = [*_PLAIN, *map(pooling_of, prompts)]
    how: dict[str, Any] = {"layers": layers, "device": "cpu"}
    made = {
        "plain": Extractor(recipe, poolings=_PLAIN, **how),
        "one pass": Extractor(recipe, poolings=named, prompts=prompts, **how),
        "a pass each": Extractor(recipe, poolings=named, prompts=prompts, share=False, **how),
    }
    assert made["one pass"].way.prompts_share
    return made


def read(folder: Path, split: str) -> list[str]:
    """Read the texts of a split in an order that is drawn."""
    examples = load_corpus(DatasetOptions(str(folder), splits=(split,))).splits[split]
    texts = examples.batch(slice(None))
    return [texts[row] for row in np.random.default_rng(0).permutation(len(texts))]


def measure(
    ways: Mapping[str, Extractor], texts: Sequence[str], n_tokens: int, rounds: int
) -> dict[str, Any]:
    """Time all ways on the first texts that have so many tokens together, in turns."""
    ours = ways["one pass"]
    tokenized = ours.tokenize(texts)
    n_texts = 1 + int(np.searchsorted(np.cumsum(tokenized.n_tokens), n_tokens))
    some = tokenized.take(np.arange(min(n_texts, len(texts))))
    features = {name: way.compute(some) for name, way in ways.items()}  # warms up, too
    seconds = harness.by_turns(
        {name: lambda way=way: way.compute(some) for name, way in ways.items()}, rounds
    )
    cpu = harness.by_turns(
        {
            name: lambda way=way: harness.cpu_seconds(lambda: way.compute(some))[0]
            for name, way in ways.items()
        },
        rounds,
    )
    pairs = [(features["one pass"][key], expected) for key, expected in features["plain"].items()]
    pairs += [(features["one pass"][key], it) for key, it in features["a pass each"].items()]
    return {
        "n_texts": len(some.ids),
        "n_tokens": int(some.n_tokens.sum()),
        "tokens": float(ours.n_computed(some.n_tokens).sum() / some.n_tokens.sum()),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "time": harness.ratio(seconds["one pass"], seconds["plain"]),
        "cpu_time": harness.ratio(cpu["one pass"], cpu["plain"]),
        "a_pass_each": harness.ratio(seconds["a pass each"], seconds["plain"]),
        "relative_error": max(relative_error(found, expected) for found, expected in pairs),
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
