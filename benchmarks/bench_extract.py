"""Extraction against plain Hugging Face, and against the matrix products it cannot do without.

What limits extraction is matrix multiplication: everything else (attention, norms, pooling, Python)
is overhead. So the ceiling printed here is the time that the model's own linear layers take alone,
at the batch size of the run (on all cores together or side by side, whichever is faster), and every
speed is given as a share of it. The baseline is what one
writes first: fp32, whole texts in batches of 32 in data-set order, padded to the longest, all
hidden states kept, the mean over real tokens taken afterwards. The other is what people take from
a shelf: sentence-transformers' `encode` with its own defaults, all layers of the model. It sorts
its texts by length, so the more it is given, the less it pads: of the first 64 texts of R8 31 % of
its positions are real tokens, of 256 67 %, of 2,000 94 %. So all are given the same texts.

    python benchmarks/bench_extract.py [--model smollm2-135m] [--layer 24] [--max-length 2048]

All answers are compared after timing. The last line is JSON, and is also written to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from llmembed.cache_format.layout.schema import MAX_BLOCK_ROWS
from llmembed.extract import Extractor, Recipe
from llmembed.extract.backbones.load import resolve_compute_dtype
from llmembed.extract.fast.cpu import in_lanes
from llmembed.extract.features.batching import padding_share
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus

BASELINE_BATCH = 32
PLANNED_TEXTS = 2000
"""Texts whose padding is counted, batched as extraction does, without computing them."""
TARGETS = {
    "ours / gemm_ceiling": 0.70,
    "ours / plain_hugging_face": 25,
    "ours / sentence_transformers": 15,
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, compare the answers, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--dataset", default="r8")
    parser.add_argument("--compute-dtype", default="auto")
    parser.add_argument("--max-length", type=int, default=2048, help="2048 cuts no text of R8")
    parser.add_argument("--n-texts", type=int, default=256)
    parser.add_argument("--n-baseline", type=int, help="texts for the baselines; all by itself")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_extract.json")
    arguments = parser.parse_args()
    texts = (
        load_corpus(DatasetOptions(arguments.dataset)).splits["train"].batch(slice(PLANNED_TEXTS))
    )
    result = measure(
        arguments.model,
        arguments.layer,
        texts,
        n_texts=arguments.n_texts,
        compute_dtype=arguments.compute_dtype,
        max_length=arguments.max_length,
        n_baseline=arguments.n_baseline or arguments.n_texts,
        rounds=arguments.rounds,
    )
    print_table(result)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def measure(
    model: str,
    layer: int,
    texts: list[str],
    *,
    n_texts: int,
    n_baseline: int,
    rounds: int,
    compute_dtype: str = "auto",
    max_length: int = 2048,
) -> dict[str, Any]:
    """Time all ways and the ceiling on the same texts, interleaved, and compare the features.

    Args:
        model: alias or folder.
        layer: the layer whose mean is taken.
        texts: those whose padding is counted.
        n_texts: the first so many are extracted.
        n_baseline: the first so many are given to the baselines, which are slow.
        rounds: times that all take their turn.
        compute_dtype: of our way.
        max_length: tokens a text.
    """
    device = torch.device("cpu")
    fast = str(resolve_compute_dtype(compute_dtype, device)).removeprefix("torch.")
    ours = extractor(model, [layer], fast, max_length)
    planned = ours.tokenize(texts).ids
    ids = planned[:n_texts]
    ours.compute(ids[:8])  # warm up: the kernels are chosen at first use
    whole, shelf = load_whole(ours), load_sentence_transformer(ours)
    hugging_face = functools.partial(plain_hugging_face, whole, ids[:n_baseline], layer)
    encode = functools.partial(shelf.encode, texts[:n_baseline])
    baselines = {"plain_hugging_face": hugging_face, "sentence_transformers": encode}
    speeds, features = race(ours, ids, baselines, n_baseline, rounds)
    last = ours.backbone.n_layers
    exact = extractor(model, [layer, last], "float32", max_length).compute(ids[:n_baseline])
    errors = relative_errors(features, exact, fast, layer, last)
    return {
        "benchmark": "extract",
        "model": model,
        "layer": layer,
        "compute_dtype": fast,
        **facts(ours, planned, n_texts),
        "tokens_per_s": {name: statistics.median(values) for name, values in speeds.items()},
        "ratios": {pair: ratio(speeds, *pair.split(" / ")) for pair in TARGETS},
        "targets": TARGETS,
        "relative_error": errors,
    }


def facts(ours: Extractor, planned: list[Any], n_texts: int) -> dict[str, Any]:
    """Say what was run, on what, where: tokens of the first texts, padding of all of them."""
    lengths = [len(row) for row in planned]
    return {
        "products": str(ours.backbone.compute_dtype).removeprefix("torch."),
        "max_length": ours.recipe.max_length,
        "machine": machine(),
        "n_texts": min(n_texts, len(planned)),
        "n_tokens": sum(lengths[:n_texts]),
        "token_budget": ours.token_budget,
        "padding_share": padding_of_blocks(ours, lengths),
    }


def relative_errors(
    features: dict[str, Any], exact: dict[Any, Any], fast: str, layer: int, last: int
) -> dict[str, float]:
    """Compare our features of a dtype, and those in float32, with the baselines'."""
    expected, shelf = features["plain_hugging_face"], features["sentence_transformers"]
    return {
        fast: relative_error(features["ours"]["mean", layer][: len(expected)], expected),
        "float32": relative_error(exact["mean", layer], expected),
        "float32, sentence-transformers' layer": relative_error(exact["mean", last], shelf),
    }


def race(
    ours: Extractor,
    ids: list[list[int]],
    baselines: Mapping[str, Callable[[], Any]],
    n_baseline: int,
    rounds: int,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Run the ceiling, ours and the baselines in turn: tokens/s of each, and the answers."""
    n_few = sum(map(len, ids[:n_baseline]))
    speeds: dict[str, list[float]] = {name: [] for name in ("ours", *baselines, "gemm_ceiling")}
    answers = {}
    for turn in range(rounds):
        speeds["gemm_ceiling"].append(best_gemm_ceiling(ours))
        seconds, answers["ours"] = timed(lambda: ours.compute(ids))
        speeds["ours"].append(sum(map(len, ids)) / seconds)
        if turn < max(1, rounds // 2):  # they are slow
            for name, baseline in baselines.items():
                seconds, answers[name] = timed(baseline)
                speeds[name].append(n_few / seconds)
    return speeds, answers


def ratio(speeds: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median over the rounds of how many times faster one way was than another."""
    pairs = zip(speeds[one], speeds[other], strict=False)
    return statistics.median(a / b for a, b in pairs)


def padding_of_blocks(ours: Extractor, lengths: list[int]) -> float:
    """Pads among the tokens of all batches, planned block by block as extraction does."""
    n_padded = 0.0
    for start in range(0, len(lengths), MAX_BLOCK_ROWS):
        block = lengths[start : start + MAX_BLOCK_ROWS]
        n_padded += sum(block) / (1 - padding_share(block, ours.plan(block)))
    return 1 - sum(lengths) / n_padded


def extractor(model: str, layers: list[int], compute_dtype: str, max_length: int) -> Extractor:
    """Load our way, storing float32 so that rounding does not hide differences."""
    recipe = Recipe(
        model=model, max_length=max_length, compute_dtype=compute_dtype, dtype="float32"
    )
    return Extractor(recipe.within_positions(), layers=layers, poolings=["mean"], device="cpu")


def load_whole(ours: Extractor) -> Any:
    """Load the whole model in fp32, as `AutoModel.from_pretrained` does by itself."""
    folder = ours.recipe.files.folder
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def load_sentence_transformer(ours: Extractor, **model_kwargs: Any) -> Any:
    """Load the whole model as sentence-transformers would, the mean over real tokens on top.

    Args:
        ours: gives model, device and the length of texts.
        model_kwargs: what is passed to transformers, such as `dtype`.

    Only its chat template is left out: with it every text would become a message after a system
    prompt, other texts than ours.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(
        str(ours.recipe.files.folder),
        model_kwargs=model_kwargs,
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    mean = Pooling(transformer.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[transformer, mean], device=str(ours.backbone.device))
    model.max_seq_length = ours.recipe.max_length  # the same texts for all
    return model


def plain_hugging_face(model: Any, ids: list[list[int]], layer: int) -> np.ndarray:
    """Pool all hidden states of padded batches in data-set order."""
    features = []
    for start in range(0, len(ids), BASELINE_BATCH):
        rows = ids[start : start + BASELINE_BATCH]
        width = max(map(len, rows))
        padded = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        with torch.no_grad():
            output = model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        hidden = output.hidden_states[layer] * mask[..., None]
        features.append(hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True))
    return torch.cat(features).double().numpy()


def best_gemm_ceiling(ours: Extractor) -> float:
    """Time the products on all cores together and side by side as batches run; the faster way."""
    together = gemm_ceiling(ours, rows=ours.token_budget)
    alone = in_lanes(
        lambda _: gemm_ceiling(ours, rows=ours.token_budget),
        range(ours.n_lanes),
        ours.n_lanes,
        first_alone=False,
    )
    return max(together, sum(alone))


def gemm_ceiling(ours: Extractor, rows: int, repeats: int = 5) -> float:
    """Time the linear layers of the cut model alone, each on `rows` tokens, in tokens a second."""
    backbone = ours.backbone
    layers = [m for m in backbone.blocks.modules() if isinstance(m, torch.nn.Linear)]
    shapes: dict[tuple[int, int], tuple[int, torch.nn.Linear]] = {}
    for linear in layers:
        key = (linear.in_features, linear.out_features)
        shapes[key] = (shapes.get(key, (0, linear))[0] + 1, linear)
    total = 0.0
    # A GPU gets several at once: waiting for each would count against the ceiling.
    n_at_once = 1 if backbone.device.type == "cpu" else 16
    with torch.inference_mode():
        for (width, _), (count, linear) in shapes.items():
            kind: Any = {"dtype": backbone.compute_dtype, "device": backbone.device}
            inputs = torch.randn(rows, width, **kind)
            weight = torch.randn(linear.out_features, linear.in_features, **kind)
            multiply = partial(torch.nn.functional.linear, inputs, weight)
            multiply()
            several = partial(_repeat, multiply, n_at_once)
            seconds = [timed(several)[0] for _ in range(repeats)]
            total += count * statistics.median(seconds) / n_at_once
    return rows / total


def _repeat(work: Callable[[], Any], n: int) -> None:
    for _ in range(n):
        work()


def timed(work: Any) -> tuple[float, Any]:
    """Run once; wall seconds and the result, after a GPU in use has done all that it was given."""
    wait_for_gpu()
    start = time.perf_counter()
    result = work()
    wait_for_gpu()
    return time.perf_counter() - start, result


def wait_for_gpu() -> None:
    """Return once a GPU, if one is in use, has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def relative_error(features: np.ndarray, expected: np.ndarray) -> float:
    """Largest over the texts of ||f - e|| / ||e||."""
    distance = np.linalg.norm(features.astype(np.float64) - expected, axis=1)
    return float((distance / np.linalg.norm(expected, axis=1)).max())


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import os

    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name"),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def print_table(result: dict[str, Any]) -> None:
    """Print speeds as shares of the ceiling, and the errors."""
    speeds = result["tokens_per_s"]
    print(f"{result['model']}, layer {result['layer']}, {result['n_tokens']:,} tokens")
    for name, speed in speeds.items():
        share = speed / speeds["gemm_ceiling"]
        print(f"  {name:22s} {speed:10,.0f} tokens/s  {share:6.1%} of the GEMM ceiling")
    for pair, value in result["ratios"].items():
        print(f"  {pair:32s} {value:6.2f}  target {result['targets'][pair]}")
    print(f"  padding: {result['padding_share']:.2%}  target below 2%")
    for name, error in result["relative_error"].items():
        print(f"  largest relative error, {name}: {error:.2e}")


if __name__ == "__main__":
    main()
