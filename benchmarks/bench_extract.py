"""Extraction against plain Hugging Face, and against the matrix products it cannot do without.

What limits extraction is matrix multiplication: everything else (attention, norms, pooling, Python)
is overhead. So the ceiling printed here is the time that the model's own linear layers take alone,
at the batch size of the run, and every speed is given as a share of it. The baseline is what one
writes first: fp32, whole texts in batches of 32 in data-set order, padded to the longest, all
hidden states kept, the mean over real tokens taken afterwards.

    python benchmarks/bench_extract.py [--model smollm2-135m] [--layer 24] [--max-length 2048]

The answers of both ways are compared after timing. The last line is JSON, and is also written to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from llmembed.extract import Extractor, Recipe
from llmembed.extract.backbone import resolve_compute_dtype
from llmembed.extract.batching import padding_share
from llmembed.extract.corpora import load_corpus

BASELINE_BATCH = 32
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
    parser.add_argument("--n-baseline", type=int, default=2 * BASELINE_BATCH)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_extract.json")
    arguments = parser.parse_args()
    result = measure(
        arguments.model,
        arguments.layer,
        load_corpus(arguments.dataset).splits["train"].batch(slice(arguments.n_texts)),
        compute_dtype=arguments.compute_dtype,
        max_length=arguments.max_length,
        n_baseline=arguments.n_baseline,
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
    n_baseline: int,
    rounds: int,
    compute_dtype: str = "auto",
    max_length: int = 2048,
) -> dict[str, Any]:
    """Time both ways and the ceiling on the same texts, interleaved, and compare the features."""
    device = torch.device("cpu")
    fast = str(resolve_compute_dtype(compute_dtype, device)).removeprefix("torch.")
    ours = extractor(model, layer, fast, max_length)
    exact = extractor(model, layer, "float32", max_length)
    ids = ours.tokenize(texts).ids
    few = ids[:n_baseline]
    lengths = [len(row) for row in ids]
    ours.compute(ids[:8])  # warm up: the kernels are chosen at first use
    speeds, features, expected = race(ours, ids, load_whole(ours), few, layer, rounds)
    feature = features["mean", layer].astype(np.float64)[: len(few)]
    float32 = exact.compute(few)["mean", layer].astype(np.float64)
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "benchmark": "extract",
        "model": model,
        "layer": layer,
        "compute_dtype": fast,
        "products": str(ours.backbone.compute_dtype).removeprefix("torch."),
        "max_length": ours.recipe.max_length,
        "machine": machine(),
        "n_texts": len(texts),
        "n_tokens": sum(lengths),
        "token_budget": ours.token_budget,
        "padding_share": padding_share(lengths, ours.plan(lengths)),
        "tokens_per_s": middle,
        "speedup_over_plain": middle["ours"] / middle["plain_hugging_face"],
        "share_of_ceiling": statistics.median(
            mine / limit for mine, limit in zip(speeds["ours"], speeds["gemm_ceiling"], strict=True)
        ),
        "relative_error": {
            fast: relative_error(feature, expected),
            "float32": relative_error(float32, expected),
        },
    }


def race(
    ours: Extractor,
    ids: list[list[int]],
    whole: Any,
    few: list[list[int]],
    layer: int,
    rounds: int,
) -> tuple[dict[str, list[float]], Any, np.ndarray]:
    """Run the ceiling, ours and the plain way in turn: tokens/s of each, and both answers."""
    speeds: dict[str, list[float]] = {"ours": [], "plain_hugging_face": [], "gemm_ceiling": []}
    for _ in range(rounds):
        speeds["gemm_ceiling"].append(gemm_ceiling(ours, rows=ours.token_budget))
        seconds, features = timed(lambda: ours.compute(ids))
        speeds["ours"].append(sum(map(len, ids)) / seconds)
        if len(speeds["plain_hugging_face"]) < max(1, rounds // 2):  # it is slow
            seconds, expected = timed(lambda: plain_hugging_face(whole, few, layer))
            speeds["plain_hugging_face"].append(sum(map(len, few)) / seconds)
    return speeds, features, expected


def extractor(model: str, layer: int, compute_dtype: str, max_length: int) -> Extractor:
    """Load our way, storing float32 so that rounding does not hide differences."""
    recipe = Recipe(
        model=model, max_length=max_length, compute_dtype=compute_dtype, dtype="float32"
    )
    return Extractor(recipe.within_positions(), layers=[layer], poolings=["mean"], device="cpu")


def load_whole(ours: Extractor) -> Any:
    """Load the whole model in fp32, as `AutoModel.from_pretrained` does by itself."""
    folder = ours.recipe.files.folder
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


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


def gemm_ceiling(ours: Extractor, rows: int, repeats: int = 5) -> float:
    """Time the linear layers of the cut model alone, each on `rows` tokens, in tokens a second."""
    backbone = ours.backbone
    layers = [m for m in backbone.blocks.modules() if isinstance(m, torch.nn.Linear)]
    shapes: dict[tuple[int, int], tuple[int, torch.nn.Linear]] = {}
    for linear in layers:
        key = (linear.in_features, linear.out_features)
        shapes[key] = (shapes.get(key, (0, linear))[0] + 1, linear)
    total = 0.0
    with torch.inference_mode():
        for (width, _), (count, linear) in shapes.items():
            inputs = torch.randn(rows, width, dtype=backbone.compute_dtype)
            weight = linear.weight.to(backbone.compute_dtype)
            multiply = partial(torch.nn.functional.linear, inputs, weight)
            multiply()
            seconds = [timed(multiply)[0] for _ in range(repeats)]
            total += count * statistics.median(seconds)
    return rows / total


def timed(work: Any) -> tuple[float, Any]:
    """Run once; wall seconds and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def relative_error(features: np.ndarray, expected: np.ndarray) -> float:
    """Largest over the texts of ||f - e|| / ||e||."""
    distance = np.linalg.norm(features - expected, axis=1)
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
        print(f"  {name:20s} {speed:10,.0f} tokens/s  {share:6.1%} of the GEMM ceiling")
    print(f"  speed-up over plain Hugging Face: {result['speedup_over_plain']:.1f}x")
    print(f"  padding: {result['padding_share']:.1%}")
    for name, error in result["relative_error"].items():
        print(f"  largest relative error against plain fp32, {name}: {error:.2e}")


if __name__ == "__main__":
    main()
