"""Extraction with LLaMA2-7B on one GPU, against the card's matrix products and the other ways.

    python benchmarks gpu                        # at most nine minutes on an H100
    python benchmarks gpu --parts speed,depth    # some parts; the others' figures stay
    python benchmarks fit --part large --device cuda    # the trainer's figures on a GPU

Weights are random and texts made up (`made_up.py` says how long they are), so nothing is
downloaded; 13 GB of weights are written once to `--scratch`, which should be a local disk. Beside
what extraction needs this takes sentence-transformers and bitsandbytes where they are installed.

The ceiling is the time of the model's linear layers alone, all blocks, at the token budget of the
run. Every ratio is the median over rounds in which both sides took their turn. Speeds are real
tokens a second of token ids to features on the host; against sentence-transformers, which
tokenises, of texts to features. The official way and the batch sizes that are tried run on fewer
texts of the same lengths. The GPU is busy while a kernel or copy runs, by torch.profiler over a
whole extraction into a cache, the first fifth of the work left out. Host memory is what
`process.py` says. Answers are compared after the timing.

The file is written after every part, and a part that fails leaves its error there and lets the
others run; then the exit code is 1. A bar that is not met is printed as such.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import json
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import numpy.typing as npt
import torch
import transformers
from harness import least, most
from speed import process
from speed.extract import Ids, gemm_ceiling, load_sentence_transformer, pad, relative_error
from speed.made_up import DATA_SETS, llama_config, make_up_llama, make_up_texts, n_words

from llmembed.extract import ExtractConfig, Extractor, Recipe, extract

BARS = {
    "sst2, share of the GEMM ceiling": least(0.85),
    "r8, share of the GEMM ceiling": least(0.85),
    "agnews, share of the GEMM ceiling": least(0.85),
    "half the layers, times all": least(1.9),
    "times the official way, sst2": least(10),
    "times a sorted Hugging Face loop, sst2": least(1.3),
    "times a sorted Hugging Face loop, r8": least(1.3),
    "times a sorted Hugging Face loop, agnews": least(1.3),
    "times sentence-transformers, sst2": least(1.25),
    "times sentence-transformers, r8": least(1.25),
    "times sentence-transformers, agnews": least(1.25),
    "GPU busy after warm-up": least(0.95),
    "NF4, times bfloat16": least(0.9),
    "peak host memory over the weights kept": most(1.2),
    # What extraction itself allows its first batch in bfloat16.
    "largest relative error, one text at a time": most(5e-2),
}
BATCH_SIZES = {
    "sst2": (128, 256, 512, 1024),
    "r8": (16, 32, 64, 128),
    "agnews": (32, 64, 128, 256),
}
OFFICIAL_BATCH_SIZES = (8, 32, 128)
N_OFFICIAL = {"sst2": 256, "r8": 32, "agnews": 128}
N_OFFICIAL_LAYERS = 5  # the paper takes the last five
FEW = 0.2  # share of the texts on which batch sizes are tried
N_ALONE = 32
Vectors = npt.NDArray[np.float32]
Ways = dict[str, Callable[[], Any]]


class Skipped(Exception):  # noqa: N818 - no error
    """A part cannot be measured here; says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """One model on one device."""

    folder: Path
    """The model's."""
    config: Any
    """The model's."""
    device: torch.device
    scratch: Path
    """A folder for what is written."""
    n_tokens: int
    """Tokens of the texts of each data set."""
    rounds: int
    """Times that all ways take their turn."""

    @property
    def n_layers(self) -> int:
        """Blocks of the whole model."""
        return int(self.config.num_hidden_layers)

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of ours and of the others: bfloat16, on a CPU float32."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @functools.cached_property
    def texts(self) -> Mapping[str, list[str]]:
        """The texts of each data set."""
        words = n_words(self.config)
        return {name: make_up_texts(one, self.n_tokens, words) for name, one in DATA_SETS.items()}

    @functools.cached_property
    def ids(self) -> Mapping[str, Ids]:
        """Their token ids."""
        return {name: self.ours.tokenize(texts).ids for name, texts in self.texts.items()}

    @functools.cached_property
    def ours(self) -> Extractor:
        """Our way on four layers, the last among them, warm on every data set."""
        return self.extractor(self.n_layers)

    def extractor(self, last: int, quantize: str | None = None) -> Extractor:
        """Load our way on quarters of the layers up to `last`, and run every data set once."""
        recipe = Recipe(
            model=str(self.folder),
            max_length=max(one.official_width for one in DATA_SETS.values()),
            compute_dtype=str(self.dtype).removeprefix("torch."),
            dtype="float32",
            quantize=quantize,
        )
        quarter = max(1, self.n_layers // 4)
        layers = sorted({*range(quarter, last, quarter), last})
        made = Extractor(recipe, layers=layers, poolings=["mean"], device=str(self.device))
        for texts in self.texts.values():
            made.features(texts)
        return made

    def theirs(self, dtype: torch.dtype) -> Any:
        """Load the whole model as `AutoModel` does, straight to the device."""
        auto: Any = transformers.AutoModel
        place = {"": self.device}
        return auto.from_pretrained(str(self.folder), dtype=dtype, device_map=place).eval()

    def n_few(self, name: str) -> int:
        """Count the texts that batch sizes are tried on; they are in random order."""
        return max(4, int(FEW * len(self.texts[name])))

    def last(self, features: Any) -> Any:
        """Pick the last layer."""
        return features["mean", self.n_layers]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; 1 if one of them failed."""
    parser = harness.command_line(__doc__)
    add = parser.add_argument
    add("--parts", type=_parts, default=list(PARTS), help=",".join(PARTS))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--n-layers", type=int, default=32)
    add("--hidden-size", type=int, default=4096, help="another is a toy's")
    add("--n-tokens", type=int, default=120_000, help="of a data set a round")
    add("--rounds", type=int, default=3)
    add("--minutes", type=float, default=8, help="no part begins after these")
    add("--scratch", type=Path, help="where weights are kept; else they go again")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = torch.device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = f"gpu_{re.sub(r'[^0-9A-Za-z]+', '-', card)}.json"
    output = options.output or harness.RESULTS / "speed" / name
    result = harness.read(output) or {"parts": {}}
    result |= {"benchmark": "gpu", "card": card, "torch": torch.__version__}
    result["transformers"] = transformers.__version__
    size = options.n_layers, options.hidden_size
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        started, config = time.perf_counter(), llama_config(*size)
        scratch = options.scratch or Path(folder)
        bench = Bench(
            folder=make_up_llama(scratch / "llama-{}x{}".format(*size), config, device),
            config=config,
            device=device,
            scratch=scratch,
            n_tokens=options.n_tokens,
            rounds=options.rounds,
        )
        result |= {"n_layers": options.n_layers, "hidden_size": options.hidden_size}
        result |= {"n_tokens": options.n_tokens, "making_weights_s": time.perf_counter() - started}
        for name in options.parts:
            late = time.perf_counter() - started > 60 * options.minutes
            result["parts"][name] = {"skipped": "out of time"} if late else run(name, bench)
            print(f"{name}: {json.dumps(result['parts'][name])}", flush=True)
            harness.write(result, output)
    print(table(result))
    harness.finish(result, output)
    return int(any("error" in result["parts"][name] for name in options.parts))


def run(name: str, bench: Bench) -> dict[str, Any]:
    """Run a part; give what it found, or the reason that there is nothing."""
    start = time.perf_counter()
    try:
        found = PARTS[name](bench)
    except Skipped as reason:
        found = {"skipped": str(reason)}
    except Exception as error:  # noqa: BLE001 - the other parts are worth having
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where no GPU is in use
    return found | {"wall_s": time.perf_counter() - start}


def table(result: Mapping[str, Any]) -> str:
    """Lay out every figure beside its bar, and what is missing."""
    lines = [f"{result['card']}, {result['n_layers']} layers of {result['hidden_size']}"]
    for name, part in result["parts"].items():
        lines += [f"{name}: {kind}: {part[kind]}" for kind in ("skipped", "error") if kind in part]
        figures = part.get("figures", {}).items()
        lines += [BARS[figure].line(figure, value) for figure, value in figures]
    return "\n".join(lines)


def speed(bench: Bench) -> dict[str, Any]:
    """Time ours, all layers, against the linear layers alone at the same tokens a batch."""
    ours, ids = bench.ours, bench.ids
    speeds: dict[str, list[float]] = {name: [] for name in ("ceiling", *ids)}
    for _ in range(bench.rounds):
        speeds["ceiling"].append(gemm_ceiling(ours, rows=ours.token_budget))
        for name, rows in ids.items():
            seconds, _ = harness.timed(functools.partial(ours.compute, rows))
            speeds[name].append(sum(map(len, rows)) / seconds)
    return {
        "tokens_per_s": speeds,
        "token_budget": ours.token_budget,
        "n_texts": {name: len(rows) for name, rows in ids.items()},
        "figures": {
            f"{name}, share of the GEMM ceiling": harness.ratio(speeds[name], speeds["ceiling"])
            for name in ids
        },
    }


def answers(bench: Bench) -> dict[str, Any]:
    """Compare ours, batched, with transformers one text at a time, there and in float32."""
    found = {"ours": {name: bench.last(bench.ours.compute(ids)) for name, ids in bench.ids.items()}}
    for kind, dtype in (("theirs", bench.dtype), ("float32", torch.float32)):
        model = bench.theirs(dtype)
        found[kind] = {
            name: sorted_loop(model, ids[:N_ALONE], 1) for name, ids in bench.ids.items()
        }

    def largest(kind: str, other: str) -> float:
        pairs = ((found[kind][name][:N_ALONE], found[other][name]) for name in bench.ids)
        return max(relative_error(one, expected.astype("f8")) for one, expected in pairs)

    pairs = (("ours", "theirs"), ("ours", "float32"), ("theirs", "float32"))
    errors = {f"{kind} against {other}": largest(kind, other) for kind, other in pairs}
    figures = {"largest relative error, one text at a time": errors["ours against theirs"]}
    return {"errors": errors, "dtype": str(bench.dtype), "figures": figures}


def official(bench: Bench) -> dict[str, Any]:
    """Time the official way, a text, at its best of some batch sizes; float16 on a GPU."""
    model = bench.theirs(torch.float32 if bench.device.type == "cpu" else torch.float16)
    times, tried = {}, {}
    for name, data_set in DATA_SETS.items():
        ids = bench.ids[name][: N_OFFICIAL[name]]
        pool = functools.partial(official_way, model, ids, data_set.official_width)
        size, tried[name] = best_size(pool, OFFICIAL_BATCH_SIZES)
        both: Ways = {
            "ours": functools.partial(bench.ours.compute, bench.ids[name]),
            "official": functools.partial(pool, size),
        }
        seconds = harness.by_turns(both, bench.rounds)
        texts = len(bench.ids[name]) / len(ids)  # ours gets more, so its batches are whole
        times[name] = texts * harness.ratio(seconds["official"], seconds["ours"])
    return {
        "times_by_text": times,
        "seconds_by_batch_size": tried,
        "n_texts": N_OFFICIAL,
        "figures": {"times the official way, sst2": times["sst2"]},
    }


def hugging_face(bench: Bench) -> dict[str, Any]:
    """Time a loop over texts sorted by length at its best batch size, on all data sets."""
    loop = functools.partial(sorted_loop, bench.theirs(bench.dtype))
    return _against(bench, "a sorted Hugging Face loop", bench.ids, bench.ours.compute, loop)


def sentence_transformers(bench: Bench) -> dict[str, Any]:
    """Time `encode` at its best batch size, from texts, on all data sets."""
    _require("sentence_transformers", "sentence-transformers")
    shelf = load_sentence_transformer(bench.ours, dtype=bench.dtype)

    def encode(texts: Any, batch_size: int) -> Any:
        return shelf.encode(texts, batch_size=batch_size, show_progress_bar=False)

    features = bench.ours.features
    return _against(bench, "sentence-transformers", bench.texts, features, encode)


def _against(
    bench: Bench,
    label: str,
    rows: Mapping[str, Any],
    ours: Callable[[Any], Any],
    other: Callable[[Any, int], Any],
) -> dict[str, Any]:
    """Time another way, at its best batch size, by turns with ours on the rows of all data sets."""
    figures, tried, errors = {}, {}, {}
    for name, whole in rows.items():
        few = functools.partial(other, whole[: bench.n_few(name)])
        size, tried[name] = best_size(few, BATCH_SIZES[name])
        both: Ways = {
            "ours": functools.partial(ours, whole),
            "theirs": functools.partial(other, whole, size),
        }
        seconds = harness.by_turns(both, bench.rounds)
        figures[f"times {label}, {name}"] = harness.ratio(seconds["theirs"], seconds["ours"])
        found, expected = bench.last(both["ours"]()), both["theirs"]().astype("f8")
        errors[name] = relative_error(found, expected)
    return {"seconds_by_batch_size": tried, "errors": errors, "figures": figures}


def depth(bench: Bench) -> dict[str, Any]:
    """Time layers up to half of the model against all, on texts of SST-2's lengths."""
    half, ids = bench.extractor(bench.n_layers // 2), bench.ids["sst2"]
    seconds = harness.by_turns(
        {"half": lambda: half.compute(ids), "all": lambda: bench.ours.compute(ids)}, bench.rounds
    )
    figures = {"half the layers, times all": harness.ratio(seconds["all"], seconds["half"])}
    return {"seconds": seconds, "figures": figures}


def nf4(bench: Bench) -> dict[str, Any]:
    """Time weights of four bits against bfloat16, on texts of SST-2's lengths."""
    _require("bitsandbytes", "bitsandbytes")
    small, ids = bench.extractor(bench.n_layers, quantize="nf4"), bench.ids["sst2"]
    both: Ways = {"nf4": lambda: small.compute(ids), "plain": lambda: bench.ours.compute(ids)}
    seconds = harness.by_turns(both, bench.rounds)
    found, expected = (bench.last(way()) for way in both.values())
    figures = {"NF4, times bfloat16": harness.ratio(seconds["plain"], seconds["nf4"])}
    drift = relative_error(found, expected.astype("f8"))
    return {"seconds": seconds, "largest_drift": drift, "figures": figures}


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        message = f"{package} is not installed"
        raise Skipped(message)


def busy(bench: Bench) -> dict[str, Any]:
    """Extract a file into a cache as users do, and count when the GPU had work."""
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        texts = make_up_texts(DATA_SETS["r8"], 2 * bench.n_tokens, n_words(bench.config), seed=1)
        rows = ({"text": text, "label": "ab"[row % 2]} for row, text in enumerate(texts))
        data_set = Path(folder) / "made-up.jsonl"
        data_set.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = ExtractConfig(
            model=str(bench.folder),
            layers=",".join(map(str, bench.ours.layers)),
            dataset=str(data_set),
            cache=f"{folder}/made-up.zarr",
            max_length=DATA_SETS["r8"].official_width,
            device=str(bench.device),
        )
        if bench.device.type != "cuda":
            done = extract(config)
            reason = f"no CUDA device (the extraction itself ran: {done.n_tokens} tokens)"
            raise Skipped(reason)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            done = extract(config)
    ranges = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if str(event.device_type).endswith("CUDA") and not event.is_user_annotation
    ]
    return {
        "tokens_per_s": done.n_tokens / done.seconds,
        "n_kernels_and_copies": len(ranges),
        "figures": {"GPU busy after warm-up": busy_share(np.array(ranges, dtype=np.float64))},
    }


def memory(bench: Bench) -> dict[str, Any]:
    """Load in a process of its own, and take its peak of memory."""
    dtype = str(bench.dtype).removeprefix("torch.")
    found = process.loading(str(bench.folder), bench.n_layers, dtype, str(bench.device))
    figures = {"peak host memory over the weights kept": found["needed_over_weights"]}
    return {**found, "figures": figures}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "speed": speed,
    "answers": answers,
    "official": official,
    "hugging_face": hugging_face,
    "depth": depth,
    "busy": busy,
    "memory": memory,
    "sentence_transformers": sentence_transformers,
    "nf4": nf4,
}


def _parts(value: str) -> list[str]:
    names = value.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        message = f"no part {unknown[0]!r}; there are {', '.join(PARTS)}"
        raise argparse.ArgumentTypeError(message)
    return names


def official_way(model: Any, ids: Ids, width: int, batch_size: int) -> Vectors:
    """Pool as the paper's code does: all padded to one width, all hidden states, pads in the mean.

    Args:
        model: a whole transformers model, in float16 on a GPU.
        ids: token ids of N texts.
        width: tokens to which each is padded.
        batch_size: texts a batch.

    Returns:
        float32 `[N, 5, H]`: the last five hidden states, mean over the width.
    """
    pooled = []
    for start in range(0, len(ids), batch_size):
        padded, mask = pad(ids[start : start + batch_size], width, model.device)
        with torch.inference_mode():
            output = model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        means = [hidden.mean(dim=1) for hidden in output.hidden_states[-N_OFFICIAL_LAYERS:]]
        pooled.append(torch.stack(means, dim=1).float().cpu())
    return torch.cat(pooled).numpy()


def sorted_loop(model: Any, ids: Ids, batch_size: int) -> Vectors:
    """Pool the last hidden state in batches of texts sorted by length, padded to their longest.

    Results stay on the device until the end, and no key or value is stored: the best of what one
    writes with `AutoModel` alone.

    Args:
        model: a whole transformers model.
        ids: token ids of N texts.
        batch_size: texts a batch.

    Returns:
        float32 `[N, H]`, mean over the real tokens.
    """
    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    pooled = []
    for start in range(0, len(order), batch_size):
        rows = [ids[row] for row in order[start : start + batch_size]]
        padded, mask = pad(rows, len(rows[0]), model.device)
        with torch.inference_mode():
            output = model(input_ids=padded, attention_mask=mask, use_cache=False)
            hidden = output.last_hidden_state.float() * mask[..., None]
            pooled.append(hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True))
    features = torch.empty_like(torch.cat(pooled))
    features[torch.tensor(order, device=features.device)] = torch.cat(pooled)
    found: Vectors = features.cpu().numpy()
    return found


def best_size(run: Callable[[int], Any], sizes: Sequence[int]) -> tuple[int, dict[int, float]]:
    """Find the batch size that is fastest, each run once after a warm-up.

    Args:
        run: does the work at a batch size.
        sizes: to try, ascending; those from the first on that does not fit are left out.

    Returns:
        The best one, and the seconds of all that fit.
    """
    run(sizes[0])
    seconds: dict[int, float] = {}
    for size in sizes:
        try:
            seconds[size] = harness.timed(functools.partial(run, size))[0]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    return min(seconds, key=seconds.__getitem__), seconds


def busy_share(intervals: npt.NDArray[np.float64], skip: float = 0.2) -> float:
    """Share of the time in which a kernel or copy ran, after a first share of that work.

    Args:
        intervals: begin and end of each, float64 `[N, 2]`.
        skip: share of the summed time that counts as warm-up.

    >>> busy_share(np.array([[0.0, 2.0], [4.0, 8.0], [5.0, 6.0], [10.0, 12.0]]), skip=0.25)
    0.75
    """
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    summed = np.cumsum(ordered[:, 1] - ordered[:, 0])
    ordered = ordered[np.searchsorted(summed, skip * summed[-1], side="right") :]
    reached = np.maximum.accumulate(ordered[:, 1])
    before = np.concatenate([ordered[:1, 0], reached[:-1]])
    idle = np.maximum(0, ordered[:, 0] - before).sum()
    return float(1 - idle / (reached[-1] - ordered[0, 0]))
