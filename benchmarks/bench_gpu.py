"""Extraction with LLaMA2-7B on one GPU, against the card's matrix products and the other ways.

    python benchmarks/bench_gpu.py                        # at most nine minutes on an H100
    python benchmarks/bench_gpu.py --parts speed,depth    # some parts; the others' figures stay
    python benchmarks/bench_fit.py --part large --device cuda    # the trainer's figures on a GPU

Weights are random and texts made up (`made_up.py` says how long they are), so nothing is
downloaded; 13 GB of weights are written once to `--scratch`, which should be a local disk. Beside
what extraction needs this takes sentence-transformers and bitsandbytes where they are installed.

The ceiling is the time of the model's linear layers alone, all blocks, at the token budget of the
run. Every ratio is the median over rounds in which both sides took their turn. Speeds are real
tokens a second of token ids to features on the host; against sentence-transformers, which
tokenises, of texts to features. The official way and the batch sizes that are tried run on fewer
texts of the same lengths. The GPU is busy while a kernel or copy runs, by torch.profiler over a
whole extraction into a cache, the first fifth of the work left out. Host memory is what
`bench_process.py` says. Answers are compared after the timing.

The file is written after every part, and a part that fails leaves its error there and lets the
others run; then the exit code is 1. A bar that is not met is printed as such. The last line of
stdout is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_parts as parts
import torch
import transformers
from bars import Bar, least
from gpu_bench import Bench, Skipped
from made_up import llama_config, make_up_llama

from llmembed.extract.backbones.load import resolve_device

RESULTS = Path(__file__).parent / "results"
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
    "peak host memory over the weights kept": Bar(limit=1.2),
    "largest relative error, one text at a time": Bar(limit=5e-2),
}
"""The last is what extraction itself allows its first batch in bfloat16."""
PARTS: Mapping[str, Callable[[Bench], dict[str, Any]]] = {
    "speed": parts.speed,
    "answers": parts.answers,
    "official": parts.official,
    "hugging_face": parts.hugging_face,
    "depth": parts.depth,
    "busy": parts.busy,
    "memory": parts.memory,
    "sentence_transformers": parts.sentence_transformers,
    "nf4": parts.nf4,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; 1 if one of them failed."""
    options = _parser().parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = resolve_device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    output = options.output or RESULTS / f"bench_gpu_{re.sub(r'[^0-9A-Za-z]+', '-', card)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(output.read_text()) if output.exists() else {"parts": {}}
    result |= {"benchmark": "gpu", "card": card, "torch": torch.__version__}
    result["transformers"] = transformers.__version__
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        started = time.perf_counter()
        bench = _bench(options, device, options.scratch or Path(folder))
        result |= {"n_layers": options.n_layers, "hidden_size": options.hidden_size}
        result |= {"n_tokens": options.n_tokens, "making_weights_s": time.perf_counter() - started}
        for name in options.parts:
            late = time.perf_counter() - started > 60 * options.minutes
            result["parts"][name] = {"skipped": "out of time"} if late else run(name, bench)
            print(f"{name}: {json.dumps(result['parts'][name])}", flush=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(json.dumps(result))
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


def _bench(options: argparse.Namespace, device: torch.device, scratch: Path) -> Bench:
    size = options.n_layers, options.hidden_size
    config = llama_config(*size)
    folder = scratch / "llama-{}x{}".format(*size)
    return Bench(
        folder=make_up_llama(folder, config, device),
        config=config,
        device=device,
        scratch=scratch,
        n_tokens=options.n_tokens,
        rounds=options.rounds,
    )


def _parts(value: str) -> list[str]:
    names = value.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        message = f"no part {unknown[0]!r}; there are {', '.join(PARTS)}"
        raise argparse.ArgumentTypeError(message)
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--n-layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096, help="another is a toy's")
    parser.add_argument("--n-tokens", type=int, default=120_000, help="of a data set a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after these")
    parser.add_argument("--scratch", type=Path, help="where weights are kept; else they go again")
    parser.add_argument("--output", type=Path, help="results/bench_gpu_<card>.json")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
