"""The parts of `bench_gpu.py`, one function each: what was measured, and figures with bars."""

from __future__ import annotations

import functools
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_process
import gpu_ways as ways
import numpy as np
import torch
from bench_extract import gemm_ceiling, load_sentence_transformer, relative_error, timed
from gpu_bench import Bench, Skipped, ratio
from made_up import DATA_SETS, make_up_texts, n_words

from llmembed.extract import ExtractConfig, extract

BATCH_SIZES = {
    "sst2": (128, 256, 512, 1024),
    "r8": (16, 32, 64, 128),
    "agnews": (32, 64, 128, 256),
}
OFFICIAL_BATCH_SIZES = (8, 32, 128)
FEW = 0.2
"""Share of the texts on which batch sizes are tried."""
N_OFFICIAL = {"sst2": 256, "r8": 32, "agnews": 128}
N_ALONE = 32

Ways = dict[str, Callable[[], Any]]


def speed(bench: Bench) -> dict[str, Any]:
    """Time ours, all layers, against the linear layers alone at the same tokens a batch."""
    ours, ids = bench.ours, bench.ids
    ceilings: list[float] = []
    speeds: dict[str, list[float]] = {name: [] for name in ids}
    for _ in range(bench.rounds):
        ceilings.append(gemm_ceiling(ours, rows=ours.token_budget))
        for name, rows in ids.items():
            seconds, _ = timed(functools.partial(ours.compute, rows))
            speeds[name].append(sum(map(len, rows)) / seconds)
    shares = {
        f"{name}, share of the GEMM ceiling": statistics.median(
            one / ceiling for one, ceiling in zip(values, ceilings, strict=True)
        )
        for name, values in speeds.items()
    }
    return {
        "tokens_per_s": speeds,
        "ceiling_tokens_per_s": ceilings,
        "token_budget": ours.token_budget,
        "n_texts": {name: len(rows) for name, rows in ids.items()},
        "figures": shares,
    }


def answers(bench: Bench) -> dict[str, Any]:
    """Compare ours, batched, with transformers one text at a time, there and in float32."""
    some = {name: ids[:N_ALONE] for name, ids in bench.ids.items()}
    ours = {
        name: bench.ours.compute(ids)["mean", bench.n_layers][:N_ALONE]
        for name, ids in bench.ids.items()
    }
    theirs, exact = _alone(bench, some, bench.dtype), _alone(bench, some, torch.float32)
    errors = {
        "ours against theirs": _largest(ours, theirs),
        "ours against float32": _largest(ours, exact),
        "theirs against float32": _largest(theirs, exact),
    }
    figures = {"largest relative error, one text at a time": errors["ours against theirs"]}
    return {"errors": errors, "dtype": str(bench.dtype), "figures": figures}


def _alone(bench: Bench, ids: Mapping[str, ways.Ids], dtype: torch.dtype) -> dict[str, Any]:
    model = ways.load_transformers(str(bench.folder), dtype, bench.device)
    return {name: ways.alone(model, rows) for name, rows in ids.items()}


def _largest(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    return max(relative_error(found[name], expected[name].astype(np.float64)) for name in found)


def official(bench: Bench) -> dict[str, Any]:
    """Time the official way, a text, at its best of some batch sizes; float16 on a GPU."""
    dtype = torch.float32 if bench.device.type == "cpu" else torch.float16
    model = ways.load_transformers(str(bench.folder), dtype, bench.device)
    times, tried = {}, {}
    for name, data_set in DATA_SETS.items():
        ids = bench.ids[name][: N_OFFICIAL[name]]
        pool = functools.partial(ways.official, model, ids, data_set.official_width)
        size, tried[name] = ways.best_size(pool, OFFICIAL_BATCH_SIZES)
        both: Ways = {
            "ours": functools.partial(bench.ours.compute, bench.ids[name]),
            "official": functools.partial(pool, size),
        }
        seconds = bench.by_turns(both)
        texts = len(bench.ids[name]) / len(ids)  # ours gets more, so its batches are whole
        times[name] = texts * ratio(seconds["official"], seconds["ours"])
    return {
        "times_by_text": times,
        "seconds_by_batch_size": tried,
        "n_texts": N_OFFICIAL,
        "figures": {"times the official way, sst2": times["sst2"]},
    }


def hugging_face(bench: Bench) -> dict[str, Any]:
    """Time a loop over texts sorted by length at its best batch size, on all data sets."""
    model = ways.load_transformers(str(bench.folder), bench.dtype, bench.device)
    figures, tried, errors = {}, {}, {}
    for name, ids in bench.ids.items():
        few = functools.partial(ways.sorted_loop, model, bench.few(name, FEW))
        size, tried[name] = ways.best_size(few, BATCH_SIZES[name])
        both: Ways = {
            "ours": functools.partial(bench.ours.compute, ids),
            "theirs": functools.partial(ways.sorted_loop, model, ids, size),
        }
        seconds = bench.by_turns(both)
        times = ratio(seconds["theirs"], seconds["ours"])
        figures[f"times a sorted Hugging Face loop, {name}"] = times
        errors[name] = relative_error(
            both["ours"]()["mean", bench.n_layers], both["theirs"]().astype(np.float64)
        )
    return {"seconds_by_batch_size": tried, "errors": errors, "figures": figures}


def sentence_transformers(bench: Bench) -> dict[str, Any]:
    """Time `encode` at its best batch size, from texts, on all data sets."""
    if importlib.util.find_spec("sentence_transformers") is None:
        reason = "sentence-transformers is not installed"
        raise Skipped(reason)
    shelf = load_sentence_transformer(bench.ours, dtype=bench.dtype)
    figures, tried, errors = {}, {}, {}
    encode = functools.partial(shelf.encode, show_progress_bar=False)
    for name, texts in bench.texts.items():
        few = texts[: len(bench.few(name, FEW))]
        size, tried[name] = ways.best_size(
            lambda size: encode(few, batch_size=size),  # noqa: B023 - runs at once
            BATCH_SIZES[name],
        )
        both: Ways = {
            "ours": functools.partial(bench.ours.features, texts),
            "theirs": functools.partial(encode, texts, batch_size=size),
        }
        seconds = bench.by_turns(both)
        times = ratio(seconds["theirs"], seconds["ours"])
        figures[f"times sentence-transformers, {name}"] = times
        errors[name] = relative_error(both["ours"]()["mean", bench.n_layers], both["theirs"]())
    return {"seconds_by_batch_size": tried, "errors": errors, "figures": figures}


def depth(bench: Bench) -> dict[str, Any]:
    """Time layers up to half of the model against all, on texts of SST-2's lengths."""
    ids = bench.ids["sst2"]
    half = bench.extractor(bench.n_layers // 2)
    both: Ways = {
        "half": functools.partial(half.compute, ids),
        "all": functools.partial(bench.ours.compute, ids),
    }
    seconds = bench.by_turns(both)
    figures = {"half the layers, times all": ratio(seconds["all"], seconds["half"])}
    return {"seconds": seconds, "figures": figures}


def nf4(bench: Bench) -> dict[str, Any]:
    """Time weights of four bits against bfloat16, on texts of SST-2's lengths."""
    if importlib.util.find_spec("bitsandbytes") is None:
        reason = "bitsandbytes is not installed"
        raise Skipped(reason)
    ids = bench.ids["sst2"]
    small = bench.extractor(bench.n_layers, quantize="nf4")
    both: Ways = {
        "nf4": functools.partial(small.compute, ids),
        "plain": functools.partial(bench.ours.compute, ids),
    }
    seconds = bench.by_turns(both)
    last = "mean", bench.n_layers
    drift = relative_error(both["nf4"]()[last], both["plain"]()[last].astype(np.float64))
    figures = {"NF4, times bfloat16": ratio(seconds["plain"], seconds["nf4"])}
    return {"seconds": seconds, "largest_drift": drift, "figures": figures}


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
            cache=str(Path(folder) / "made-up.zarr"),
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
    intervals = np.array(
        [
            (event.time_range.start, event.time_range.end)
            for event in profile.events()
            if str(event.device_type).endswith("CUDA") and not event.is_user_annotation
        ],
        dtype=np.float64,
    )
    return {
        "tokens_per_s": done.n_tokens / done.seconds,
        "n_kernels_and_copies": len(intervals),
        "figures": {"GPU busy after warm-up": ways.busy_share(intervals)},
    }


def memory(bench: Bench) -> dict[str, Any]:
    """Load in a process of its own, and take its peak of memory."""
    dtype = str(bench.dtype).removeprefix("torch.")
    found = bench_process.loading(str(bench.folder), bench.n_layers, dtype, str(bench.device))
    figures = {"peak host memory over the weights kept": found["needed_over_weights"]}
    return {**found, "figures": figures}
