"""Extraction with LLaMA2-7B on one GPU, against the card's matrix products and the other ways.

    python benchmarks gpu                        # at most nine minutes on an H100
    python benchmarks gpu --parts nf4,models     # some parts; the others' figures stay

Weights are random and texts made up (`made_up.py` says how long they are), the tokenizer is
SmolLM2's, so nothing is downloaded; 13 GB of weights are written once to `--scratch`, which should
be a local disk. What is not installed (bitsandbytes, sentence-transformers, vLLM) is left out.

The ceiling is the time of the model's linear layers alone, all blocks, at the token budget of the
run. Every ratio is the median over rounds in which both sides took their turn. Speeds are real
tokens a second. Ours is an extraction as users have it, with loading and compiling left out: from a
file of texts to committed blocks of a cache, with compiled blocks; against ways that take token ids
it is of ids, and against those that take texts of texts, to features on the host. The official way
and the batch sizes that are tried run on fewer texts of the same lengths. The GPU is busy while a
kernel or copy runs, by torch.profiler. Host memory is what `process.py` says. Answers are compared
after the timing.

Parts run in the order of their worth, each for no longer than its share of `--minutes`. The file is
written after every part, and a part that fails or is late leaves its error there beside what it had
found, and lets the others run; then the exit code is 1. A bar that is not met is printed as such.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import json
import platform
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import numpy.typing as npt
import torch
import transformers
from harness import least, most
from made_up import (
    DATA_SETS,
    SIZES,
    find_tokenizer,
    make_up_model,
    make_up_texts,
    model_config,
    words_of,
)
from speed import fit, process
from speed.extract import Ids, gemm_ceiling, load_sentence_transformer, pad, relative_error

from llmembed.common.errors import ConfigError
from llmembed.extract import ExtractConfig, Extractor
from llmembed.extract.engines.blocks import extract_blocks
from llmembed.extract.engines.task import Task
from llmembed.extract.pipeline import prepare

BARS = {
    **{f"{name}, share of the GEMM ceiling": least(0.85) for name in DATA_SETS},
    "half the layers, times all": least(1.9),
    "times the official way, sst2": least(10),
    **{f"times a sorted Hugging Face loop, {name}": least(1.3) for name in DATA_SETS},
    **{f"times sentence-transformers, {name}": least(1.25) for name in DATA_SETS},
    "GPU busy": least(0.95),
    "NF4, times bfloat16": least(0.9),
    "peak host memory over the weights kept": most(1.2),
    # What extraction itself allows its first batch in bfloat16.
    "largest relative error, one text at a time": most(5e-2),
    **{name: bar for name, bar in fit.BARS.items() if name.startswith("67,349 rows")},
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
MAX_LENGTH = max(one.official_width for one in DATA_SETS.values())
MORE = 10  # times the tokens for models that are as many times faster
LONG_RUN = 10**9  # texts for which blocks are compiled whatever the model
WAYS: dict[str, dict[str, Any]] = {}
"""How passes were run, by model, quantisation and last layer."""
PACKAGES = ("torch", "transformers", "bitsandbytes", "sentence-transformers", "vllm")
Vectors = npt.NDArray[np.float32]
Ways = dict[str, Callable[[], Any]]
Found = dict[str, Any]


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
    n_channels: int | None
    """Of a head of a toy; None is the real size."""

    @property
    def n_layers(self) -> int:
        """Blocks of the whole model."""
        return int(self.config.num_hidden_layers)

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of ours and of the others: bfloat16, on a CPU float32."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return transformers.AutoTokenizer.from_pretrained(self.folder)

    @functools.cached_property
    def texts(self) -> Mapping[str, list[str]]:
        """The texts of each data set."""
        words = words_of(self.tokenizer)
        return {name: make_up_texts(one, self.n_tokens, words) for name, one in DATA_SETS.items()}

    @functools.cached_property
    def ids(self) -> Mapping[str, Ids]:
        """Their token ids."""
        return {name: self.ours.tokenize(texts).ids for name, texts in self.texts.items()}

    @functools.cached_property
    def ours(self) -> Extractor:
        """Our way on four layers, the last among them, warm on every data set."""
        return self.extractor(self.n_layers)

    def task(self, name: str, last: int, quantize: str | None = None) -> Task:
        """Ask for quarters of the layers up to `last`, of a data set in a file."""
        file = self.scratch / f"{self.folder.name}-{name}.jsonl"
        rows = ({"text": text, "label": "ab"[i % 2]} for i, text in enumerate(self.texts[name]))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        quarter = max(1, self.n_layers // 4)
        layers = sorted({*range(quarter, last, quarter), last})
        config = ExtractConfig(
            model=str(self.folder),
            layers=",".join(map(str, layers)),
            pooling=("mean",),
            dataset=str(file),
            max_length=min(MAX_LENGTH, self.config.max_position_embeddings),
            compute_dtype=str(self.dtype).removeprefix("torch."),
            dtype="float32" if self.device.type == "cpu" else "float16",
            quantize=quantize,
            device=str(self.device),
        )
        return prepare(config)

    def extractor(
        self, last: int, quantize: str | None = None, names: Sequence[str] = tuple(DATA_SETS)
    ) -> Extractor:
        """Load our way on quarters of the layers up to `last`, and run data sets once."""
        task = self.task("sst2", last, quantize)
        made = task.load_extractor(task.layers, n_rows=LONG_RUN)
        for name in names:
            made.features(self.texts[name])
        WAYS[f"{self.folder.name}, {quantize}, layer {last}"] = dataclasses.asdict(made.way)
        return made

    def into_cache(self, name: str, extractor: Extractor) -> float:
        """Extract a data set into a cache, from its file; real tokens a second."""
        task = self.task(name, max(extractor.layers), extractor.recipe.quantize)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            task = dataclasses.replace(task, cache=f"{folder}/made-up.zarr")

            def extract() -> int:
                with task.open_writer() as writer:
                    (plan,) = task.make_plans(writer)
                    return extract_blocks(task, writer, plan, extractor).n_tokens

            seconds, n_tokens = harness.timed(extract)
        return n_tokens / seconds

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
    add("--n-layers", type=int, help="of toys")
    add("--n-channels", type=int, help="a head, of toys")
    add("--n-tokens", type=int, default=120_000, help="of a data set a round")
    add("--rounds", type=int, default=3)
    add("--minutes", type=float, default=9)
    add("--tokenizer", default="smollm2-135m", help="alias of the model that has it")
    add("--scratch", type=Path, help="where weights are kept; else they go again")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = torch.device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = f"gpu_{re.sub(r'[^0-9A-Za-z]+', '-', card)}.json"
    output = options.output or harness.RESULTS / "speed" / name
    result = harness.read(output) or {"parts": {}}
    result |= {"benchmark": "gpu", "card": card, "versions": versions()}
    result |= {"asked": {name: dataclasses.asdict(bar) for name, bar in BARS.items()}}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        started = time.perf_counter()
        scratch = options.scratch or Path(folder)
        size = options.n_layers, options.n_channels
        bench = made_up("llama2-7b", size, options, device, scratch)
        result |= {"n_layers": bench.n_layers, "n_tokens": bench.n_tokens}
        result |= {"hidden_size": bench.config.hidden_size}
        result |= {"making_weights_s": time.perf_counter() - started}
        for name in options.parts:
            left = 60 * options.minutes - (time.perf_counter() - started)
            limit = min(left, PARTS[name][1] * options.minutes * 60)
            late = {"skipped": "out of time"}
            result["parts"][name] = run(name, bench, limit) if left > 0 else late
            print(f"{name}: {json.dumps(result['parts'][name])}", flush=True)
            harness.write(result | {"ways": WAYS}, output)
    result |= {"ways": WAYS}
    print(table(result))
    harness.finish(result, output)
    return int(any("error" in result["parts"][name] for name in options.parts))


def made_up(
    name: str,
    size: tuple[int | None, int | None],
    options: argparse.Namespace,
    device: torch.device,
    scratch: Path,
) -> Bench:
    """Make a model up, unless it is there."""
    config = model_config(name, *size)
    folder = scratch / f"{name}-{config.num_hidden_layers}x{config.hidden_size}"
    return Bench(
        folder=make_up_model(folder, config, find_tokenizer(options.tokenizer, scratch), device),
        config=config,
        device=device,
        scratch=scratch,
        n_tokens=options.n_tokens,
        rounds=options.rounds,
        n_channels=size[1],
    )


def versions() -> dict[str, str | None]:
    """Tell what ran."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def run(name: str, bench: Bench, limit_s: float) -> Found:
    """Run a part; give what it found, and the reason where that is not all."""
    start, found = time.perf_counter(), Found(figures={})
    try:
        with no_longer_than(limit_s):
            PARTS[name][0](bench, found)
    except Skipped as reason:
        found["skipped"] = str(reason)
    except Exception as error:  # noqa: BLE001 - the other parts are worth having
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where no GPU is in use
    return found | {"wall_s": time.perf_counter() - start}


@contextlib.contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Raise TimeoutError once that time has passed."""

    def late(*_: object) -> None:
        message = f"over its {seconds:.0f} s"
        raise TimeoutError(message)

    handler = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def table(result: Mapping[str, Any]) -> str:
    """Lay out every figure beside its bar, and what is missing."""
    lines = [f"{result['card']}, {result['n_layers']} layers of {result['hidden_size']}"]
    for name, part in result["parts"].items():
        lines += [f"{name}: {kind}: {part[kind]}" for kind in ("skipped", "error") if kind in part]
        for figure, value in part.get("figures", {}).items():
            bar = BARS.get(figure)
            lines.append(bar.line(figure, value) if bar else f"{figure:<48} {value:10.4g}")
    return "\n".join(lines)


def speed(bench: Bench, found: Found) -> None:
    """Time ours, all layers, into a cache, against its linear layers alone."""
    ours = bench.ours
    found |= {"token_budget": ours.token_budget, "n_texts": {}, "tokens_per_s": {}}
    for name, rows in bench.ids.items():
        speeds: dict[str, list[float]] = {"ceiling": [], "computing": [], "extracting": []}
        for _ in range(bench.rounds):
            speeds["ceiling"].append(gemm_ceiling(ours, rows=ours.token_budget))
            seconds, _ = harness.timed(functools.partial(ours.compute, rows))
            speeds["computing"].append(sum(map(len, rows)) / seconds)
            speeds["extracting"].append(bench.into_cache(name, ours))
        found["n_texts"][name], found["tokens_per_s"][name] = len(rows), speeds
        share = harness.ratio(speeds["extracting"], speeds["ceiling"])
        found["figures"][f"{name}, share of the GEMM ceiling"] = share


def answers(bench: Bench, found: Found) -> None:
    """Compare ours, batched, with transformers one text at a time, there and in float32."""
    ids, some = bench.ids, Found()
    some["ours"] = {name: bench.last(bench.ours.compute(rows)) for name, rows in ids.items()}
    for kind, dtype in (("theirs", bench.dtype), ("float32", torch.float32)):
        model = bench.theirs(dtype)
        some[kind] = {name: sorted_loop(model, rows[:N_ALONE], 1) for name, rows in ids.items()}

    def largest(kind: str, other: str) -> float:
        pairs = ((some[kind][name][:N_ALONE], some[other][name]) for name in ids)
        return max(relative_error(one, expected.astype("f8")) for one, expected in pairs)

    pairs = (("ours", "theirs"), ("ours", "float32"), ("theirs", "float32"))
    errors = {f"{kind} against {other}": largest(kind, other) for kind, other in pairs}
    found |= {"errors": errors, "dtype": str(bench.dtype)}
    found["figures"]["largest relative error, one text at a time"] = errors["ours against theirs"]


def official(bench: Bench, found: Found) -> None:
    """Time the official way, a text, at its best of some batch sizes; float16 on a GPU."""
    model = bench.theirs(torch.float32 if bench.device.type == "cpu" else torch.float16)
    found |= {"n_texts": N_OFFICIAL, "times_by_text": {}, "seconds_by_batch_size": {}}
    for name, data_set in DATA_SETS.items():
        ids = bench.ids[name][: N_OFFICIAL[name]]
        pool = functools.partial(official_way, model, ids, data_set.official_width)
        size, found["seconds_by_batch_size"][name] = best_size(pool, OFFICIAL_BATCH_SIZES)
        both: Ways = {
            "ours": functools.partial(bench.ours.compute, bench.ids[name]),
            "official": functools.partial(pool, size),
        }
        seconds = harness.by_turns(both, bench.rounds)
        texts = len(bench.ids[name]) / len(ids)  # ours gets more, so its batches are whole
        times = texts * harness.ratio(seconds["official"], seconds["ours"])
        found["times_by_text"][name] = times
        if f"times the official way, {name}" in BARS:
            found["figures"][f"times the official way, {name}"] = times


def hugging_face(bench: Bench, found: Found) -> None:
    """Time a loop over texts sorted by length at its best batch size, on all data sets."""
    loop = functools.partial(sorted_loop, bench.theirs(bench.dtype))
    _against(bench, found, "a sorted Hugging Face loop", bench.ids, bench.ours.compute, loop)


def sentence_transformers(bench: Bench, found: Found) -> None:
    """Time `encode` at its best batch size, from texts, on all data sets."""
    _require("sentence_transformers", "sentence-transformers")
    shelf = load_sentence_transformer(bench.ours, dtype=bench.dtype)

    def encode(texts: Any, batch_size: int) -> Any:
        return shelf.encode(texts, batch_size=batch_size, show_progress_bar=False)

    _against(bench, found, "sentence-transformers", bench.texts, bench.ours.features, encode)


def vllm(bench: Bench, found: Found) -> None:
    """Time vLLM's `embed`, which chooses its batches itself, from texts."""
    _require("vllm", "vllm")
    shelf = importlib.import_module("vllm").LLM(
        model=str(bench.folder), runner="pooling", gpu_memory_utilization=0.5
    )

    def embed(texts: Any, _: int) -> Any:
        return np.array([one.outputs.embedding for one in shelf.embed(texts)])

    _against(bench, found, "vLLM", bench.texts, bench.ours.features, embed)


def _against(
    bench: Bench,
    found: Found,
    label: str,
    rows: Mapping[str, Any],
    ours: Callable[[Any], Any],
    other: Callable[[Any, int], Any],
) -> None:
    """Time another way, at its best batch size, by turns with ours on the rows of data sets."""
    found |= {"seconds_by_batch_size": {}, "errors": {}}
    for name, whole in rows.items():
        few = functools.partial(other, whole[: bench.n_few(name)])
        size, found["seconds_by_batch_size"][name] = best_size(few, BATCH_SIZES[name])
        both: Ways = {
            "ours": functools.partial(ours, whole),
            "theirs": functools.partial(other, whole, size),
        }
        seconds = harness.by_turns(both, bench.rounds)
        found["figures"][f"times {label}, {name}"] = harness.ratio(
            seconds["theirs"], seconds["ours"]
        )
        ours_found, expected = bench.last(both["ours"]()), both["theirs"]().astype("f8")
        found["errors"][name] = relative_error(ours_found, expected)


def depth(bench: Bench, found: Found) -> None:
    """Time layers up to half of the model against all, on texts of SST-2's lengths."""
    half = bench.extractor(bench.n_layers // 2, names=["sst2"])
    _by_turns(bench, found, "half the layers, times all", half)


def nf4(bench: Bench, found: Found) -> None:
    """Time weights of four bits against bfloat16, on texts of SST-2's lengths."""
    _require("bitsandbytes", "bitsandbytes")
    _by_turns(bench, found, "NF4, times bfloat16", _quantized(bench, "nf4"))


def fp8(bench: Bench, found: Found) -> None:
    """Time products of eight bits against bfloat16, on texts of SST-2's lengths."""
    _by_turns(bench, found, "FP8, times bfloat16", _quantized(bench, "fp8"))


def _quantized(bench: Bench, quantize: str) -> Extractor:
    try:
        return bench.extractor(bench.n_layers, quantize, ["sst2"])
    except ConfigError as error:  # this version or device has none
        raise Skipped(str(error)) from error


def _by_turns(bench: Bench, found: Found, figure: str, other: Extractor) -> None:
    """Time another of ours against ours, and compare what both have last."""
    ids = bench.ids["sst2"]
    both: Ways = {"other": lambda: other.compute(ids), "ours": lambda: bench.ours.compute(ids)}
    found["seconds"] = harness.by_turns(both, bench.rounds)
    found["figures"][figure] = harness.ratio(found["seconds"]["ours"], found["seconds"]["other"])
    last = "mean", max(other.layers)
    one, expected = both["other"]()[last], both["ours"]()[last]
    found["largest_drift"] = relative_error(one, expected.astype("f8"))


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        message = f"{package} is not installed"
        raise Skipped(message)


def busy(bench: Bench, found: Found) -> None:
    """Extract texts of SST-2's lengths into a cache, and count when the GPU had work."""
    share = _busy(bench, bench.ours)
    if share is None:
        message = "no CUDA device (the extraction itself ran)"
        raise Skipped(message)
    found["figures"]["GPU busy"] = share


def _busy(bench: Bench, extractor: Extractor) -> float | None:
    if bench.device.type != "cuda":
        bench.into_cache("sst2", extractor)
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        bench.into_cache("sst2", extractor)
    ranges = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if str(event.device_type).endswith("CUDA") and not event.is_user_annotation
    ]
    return busy_share(np.array(ranges, dtype=np.float64))


def models(bench: Bench, found: Found) -> None:
    """Do the same with the shapes of smaller models, all layers, on SST-2's lengths."""
    toy = bench.n_channels is not None
    for name in list(SIZES)[1:]:
        config = model_config(name, bench.n_layers if toy else None, bench.n_channels)
        small = dataclasses.replace(
            bench,
            folder=make_up_model(bench.scratch / name, config, bench.tokenizer, bench.device),
            config=config,
            n_tokens=bench.n_tokens if toy else MORE * bench.n_tokens,
        )
        ours = small.extractor(small.n_layers, names=["sst2"])
        speeds = [small.into_cache("sst2", ours) for _ in range(bench.rounds)]
        ceiling = [gemm_ceiling(ours, rows=ours.token_budget) for _ in range(bench.rounds)]
        figures = {"tokens/s": np.median(speeds), "busy": _busy(small, ours)}
        figures["share of the GEMM ceiling"] = harness.ratio(speeds, ceiling)
        for what, value in figures.items():
            if value is not None:
                found["figures"][f"{name}, {what}"] = float(value)


def memory(bench: Bench, found: Found) -> None:
    """Load in a process of its own, and take its peak of memory."""
    dtype = str(bench.dtype).removeprefix("torch.")
    found |= process.loading(str(bench.folder), bench.n_layers, dtype, str(bench.device))
    found["figures"]["peak host memory over the weights kept"] = found["needed_over_weights"]


def fit_large(bench: Bench, found: Found) -> None:
    """Take the trainer's figures on this device."""
    toy = ["--rows", "64", "--hidden-size", "8"] if bench.n_channels is not None else []
    output = bench.scratch / "fit.json"
    options = ["--part", "large", "--device", bench.device.type, "--output", str(output)]
    fit.main([*options, *toy])
    found |= harness.read(output)["large"]


PARTS: dict[str, tuple[Callable[[Bench, Found], None], float]] = {
    "speed": (speed, 0.35),
    "busy": (busy, 0.1),
    "depth": (depth, 0.15),
    "official": (official, 0.15),
    "hugging_face": (hugging_face, 0.15),
    "sentence_transformers": (sentence_transformers, 0.15),
    "nf4": (nf4, 0.15),
    "answers": (answers, 0.1),
    "models": (models, 0.2),
    "fp8": (fp8, 0.15),
    "fit": (fit_large, 0.2),
    "memory": (memory, 0.1),
    "vllm": (vllm, 0.2),
}
"""What is measured, and the share of the time that it may take at most."""


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


def busy_share(intervals: npt.NDArray[np.float64]) -> float:
    """Share of the time from first to last in which a kernel or copy ran.

    Args:
        intervals: begin and end of each, float64 `[N, 2]`.

    >>> busy_share(np.array([[0.0, 2.0], [4.0, 8.0], [5.0, 6.0], [10.0, 12.0]]))
    0.6666666666666667
    """
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reached = np.maximum.accumulate(ordered[:, 1])
    idle = np.maximum(0, ordered[1:, 0] - reached[:-1]).sum()
    return float(1 - idle / (reached[-1] - ordered[0, 0]))
