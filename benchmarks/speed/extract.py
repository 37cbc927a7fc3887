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

    python benchmarks extract [--model smollm2-135m] [--layer 24] [--max-length 2048]

All answers are compared after timing.
"""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import harness
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
Ids = Sequence[Sequence[int]]
PLANNED_TEXTS = 2000
"""Texts whose padding is counted, batched as extraction does, without computing them."""
TARGETS = {
    "ours / gemm_ceiling": 0.70,
    "ours / plain_hugging_face": 25,
    "ours / sentence_transformers": 15,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, compare the answers, print a table and one JSON line."""
    parser = harness.command_line(__doc__, "speed/extract.json")
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--layer", type=int, default=24)
    add("--dataset", default="r8")
    add("--compute-dtype", default="auto")
    add("--max-length", type=int, default=2048, help="2048 cuts no text of R8")
    add("--n-texts", type=int, default=256)
    add("--n-baseline", type=int, help="texts for the baselines; all by itself")
    add("--rounds", type=int, default=5)
    options = vars(parser.parse_args(arguments))
    output, dataset = options.pop("output"), options.pop("dataset")
    corpus = load_corpus(DatasetOptions(dataset))
    texts = corpus.splits["train"].batch(slice(PLANNED_TEXTS))
    options["n_baseline"] = options["n_baseline"] or options["n_texts"]
    result = measure(options.pop("model"), options.pop("layer"), texts, **options)
    print_table(result)
    harness.finish(result, output)


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
    fast = str(resolve_compute_dtype(compute_dtype, torch.device("cpu"))).removeprefix("torch.")
    ours = extractor(model, [layer], fast, max_length)
    planned = ours.tokenize(texts).ids
    ids, few = planned[:n_texts], planned[:n_baseline]
    ours.compute(ids[:8])  # warm up: the kernels are chosen at first use
    whole, shelf = load_whole(ours), load_sentence_transformer(ours)
    ways: dict[str, tuple[Ids, Callable[[], Any]]] = {
        "ours": (ids, lambda: ours.compute(ids)),
        "plain_hugging_face": (few, lambda: plain_hugging_face(whole, few, layer)),
        "sentence_transformers": (few, lambda: shelf.encode(texts[:n_baseline])),
    }
    speeds: dict[str, list[float]] = {name: [] for name in (*ways, "gemm_ceiling")}
    features: dict[str, Any] = {}
    for turn in range(rounds):
        speeds["gemm_ceiling"].append(best_gemm_ceiling(ours))
        for name, (rows, way) in ways.items():
            if name == "ours" or turn < max(1, rounds // 2):  # the others are slow
                seconds, features[name] = harness.timed(way)
                speeds[name].append(sum(map(len, rows)) / seconds)
    last = ours.backbone.n_layers
    exact = extractor(model, [layer, last], "float32", max_length).compute(few)
    expected, encoded = features["plain_hugging_face"], features["sentence_transformers"]
    lengths = [len(row) for row in planned]
    return {
        "benchmark": "extract",
        "model": model,
        "layer": layer,
        "compute_dtype": fast,
        "products": str(ours.backbone.compute_dtype).removeprefix("torch."),
        "max_length": ours.recipe.max_length,
        "machine": machine(),
        "n_texts": len(ids),
        "n_tokens": sum(lengths[:n_texts]),
        "token_budget": ours.token_budget,
        "padding_share": padding_of_blocks(ours, lengths),
        "tokens_per_s": {name: statistics.median(values) for name, values in speeds.items()},
        "ratios": {
            pair: harness.ratio(*(speeds[name] for name in pair.split(" / "))) for pair in TARGETS
        },
        "targets": TARGETS,
        "relative_error": {
            fast: relative_error(features["ours"]["mean", layer][: len(few)], expected),
            "float32": relative_error(exact["mean", layer], expected),
            "float32, sentence-transformers' layer": relative_error(exact["mean", last], encoded),
        },
    }


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


def plain_hugging_face(model: Any, ids: Ids, layer: int) -> np.ndarray:
    """Pool all hidden states of padded batches in data-set order."""
    features = []
    for start in range(0, len(ids), BASELINE_BATCH):
        rows = ids[start : start + BASELINE_BATCH]
        padded, mask = pad(rows, max(map(len, rows)))
        with torch.no_grad():
            output = model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        hidden = output.hidden_states[layer] * mask[..., None]
        features.append(hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True))
    return torch.cat(features).double().numpy()


def pad(
    rows: Ids, width: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids on the right; ids and mask, int64 `[B, T]` both."""
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = (torch.arange(width, device=device) < lengths[:, None]).long()
    return torch.from_numpy(padded).to(mask.device), mask


def best_gemm_ceiling(ours: Extractor) -> float:
    """Time the products on all cores together and side by side as batches run; the faster way."""
    rows, n_lanes = ours.token_budget, ours.n_lanes
    together = gemm_ceiling(ours, rows)
    alone = in_lanes(lambda _: gemm_ceiling(ours, rows), range(n_lanes), n_lanes, first_alone=False)
    return max(together, sum(alone))


def gemm_ceiling(ours: Extractor, rows: int, repeats: int = 5) -> float:
    """Time the linear layers of the cut model alone, each on `rows` tokens, in tokens a second."""
    backbone = ours.backbone
    layers = [m for m in backbone.blocks.modules() if isinstance(m, torch.nn.Linear)]
    shapes = Counter((linear.out_features, linear.in_features) for linear in layers)
    # A GPU gets several at once: waiting for each would count against the ceiling.
    n_at_once = 1 if backbone.device.type == "cpu" else 16
    kind: Any = {"dtype": backbone.compute_dtype, "device": backbone.device}
    total = 0.0
    with torch.inference_mode():
        for shape, count in shapes.items():
            inputs, weight = torch.randn(rows, shape[1], **kind), torch.randn(shape, **kind)

            def multiply(
                n: int = 1, inputs: torch.Tensor = inputs, weight: torch.Tensor = weight
            ) -> None:
                for _ in range(n):
                    torch.nn.functional.linear(inputs, weight)

            multiply()
            work = functools.partial(multiply, n_at_once)
            total += count * harness.median_s(work, repeats)[0] / n_at_once
    return rows / total


def relative_error(features: np.ndarray, expected: np.ndarray) -> float:
    """Largest over the texts of ||f - e|| / ||e||."""
    distance = np.linalg.norm(features.astype(np.float64) - expected, axis=1)
    return float((distance / np.linalg.norm(expected, axis=1)).max())


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name"),
        "threads": torch.get_num_threads(),
        **harness.load(),
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
