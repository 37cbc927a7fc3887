"""What an extraction costs as a process: its start, the memory of loading and of many texts.

    python benchmarks/bench_process.py                          # all, a few minutes
    python benchmarks/bench_process.py loading MODEL LAYER DTYPE DEVICE      # in this process
    python benchmarks/bench_process.py extracting MODEL LAYERS N_TEXTS       # in this process

*Help* is `llmembed-extract --help`, whole.

*Start-up* is from the start of the process to the end of its first batch, which includes the check
of that batch; a GGUF model was converted before. Its floor is what `import torch, transformers`
takes alone.

*Memory of loading* is what the process needs above what it had once it could load: libraries
imported, a toy of the same architecture made, the tokenizer read. It counts the peak of what no
file backs (`RssAnon` and `RssShmem` of /proc/self/status, read every two milliseconds), and the
pages of mapped files (`RssFile`) that are still there after a text was computed: weights that rest
in the file's own dtype are such pages. Those that are mapped only while they are converted count as
resident too, but the kernel drops them at no cost when memory is short; the peak with them is told
beside it. What is kept is the parameters of the cut model in the dtype that was asked for. bfloat16
is measured again as on a CPU without products in it (`ONEDNN_MAX_CPU_ISA=AVX2`), which widens.

*Memory over many texts* is the peak of all that is resident (`VmHWM`), the usual one, since mapped
pages must not grow with the texts either.

The last line of stdout is JSON, and is also written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bars import Bar

RESULTS = Path(__file__).parent / "results"
MODEL, LAYER, SMALL_MODEL, SMALL_LAYERS = "smollm2-135m", 8, "minilm", "6"
FEW_TEXTS, MANY_TEXTS = 10_000, 100_000
WORDS = ("oil", "bank", "gold", "rate", "share", "price", "dollar", "year", "trade", "profit")
WORDS_A_TEXT = 6
WIDENED = "bfloat16, widened"
SMALL_CPU = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
BARS = {
    "help, s": Bar(limit=0.5),
    "start-up, s": Bar(limit=6),
    "peak of loading over the weights kept, float32": Bar(limit=1.2),
    "peak of loading over the weights kept, bfloat16": Bar(limit=1.2),
    f"peak of loading over the weights kept, {WIDENED}": Bar(limit=1.2),
    "peak of many texts over that of few": Bar(limit=1.1),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything in processes of their own, or one thing in this one."""
    options = _parser().parse_args(arguments)
    if options.verb:
        print(json.dumps(CHILDREN[options.verb](*options.values)))
        return
    result: dict[str, Any] = {"load_average": os.getloadavg()[0], "n_cpus": os.cpu_count()}
    result["help_s"] = _median_seconds(
        "from llmembed.extract.cli import main; main(['--help'])", options.rounds
    )
    result["start_s"] = starts(options.model, options.layers, options.rounds)
    result["import_s"] = _median_seconds(
        "import torch, transformers; transformers.AutoModel", options.rounds
    )
    result["loading"] = {
        dtype: loading(options.model, LAYER, dtype) for dtype in ("float32", "bfloat16", WIDENED)
    }
    counts = (options.few, options.many)
    result["extracting"] = [extracting(SMALL_MODEL, SMALL_LAYERS, count) for count in counts]
    result["figures"] = figures(result)
    for name, figure in result["figures"].items():
        print(BARS[name].line(name, figure))
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Give what the bars are about."""
    peaks = {
        f"peak of loading over the weights kept, {dtype}": one["needed_over_weights"]
        for dtype, one in result["loading"].items()
    }
    few, many = (one["peak_bytes"] for one in result["extracting"])
    return {
        "help, s": result["help_s"],
        "start-up, s": statistics.median(result["start_s"]),
        **peaks,
        "peak of many texts over that of few": many / few,
    }


def starts(model: str, layers: str, rounds: int) -> list[float]:
    """Seconds from the start of a process to the end of its first batch, some times."""
    found = []
    for _ in range(rounds + 1):
        begin = time.time()
        found.append(_run("starting", model, layers)["first_batch_at"] - begin)
    return found[1:]  # the first may convert the model


def loading(model: str, layer: int, dtype: str, device: str = "cpu") -> dict[str, float]:
    """Bytes at the peak of loading a model cut at a layer, in a process of its own."""
    small = SMALL_CPU if dtype == WIDENED else {}
    return _run("loading", model, str(layer), dtype.partition(",")[0], device, **small)


def extracting(model: str, layers: str, n_texts: int) -> dict[str, float]:
    """Bytes at the peak of extracting so many short texts, in a process of its own."""
    return _run("extracting", model, layers, str(n_texts))


def _run(*arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _median_seconds(code: str, rounds: int) -> float:
    """Seconds of a Python process that runs some code."""
    seconds = []
    for _ in range(rounds):
        begin = time.time()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.time() - begin)
    return statistics.median(seconds)


def _load_here(model: str, layer: str, dtype: str, device: str) -> dict[str, float]:
    import torch
    import transformers

    from llmembed.extract import Extractor, Recipe

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    recipe = Recipe(model=model, max_length=64, compute_dtype=dtype, dtype="float32")
    ids = recipe.tokenizer("", add_special_tokens=True)["input_ids"] or [0]
    _make_toy(transformers, recipe.shape.config)
    if device != "cpu":
        torch.zeros(1, device=device)
    before = _memory()["RssFile"]
    with Peak() as peak:
        ours = Extractor(recipe, layers=[int(layer)], poolings=["mean"], device=device)
    ours.compute([ids])
    needed = peak.anonymous + max(0, _memory()["RssFile"] - before)
    with torch.device("meta"):
        config = copy.deepcopy(recipe.shape.config)
        config.num_hidden_layers = int(layer)
        auto: Any = transformers.AutoModel
        kept = auto.from_config(config).parameters()
    weights = sum(one.numel() for one in kept) * getattr(torch, dtype).itemsize
    return {
        "weights_bytes": weights,
        "anonymous_bytes": peak.anonymous,
        "needed_bytes": needed,
        "with_all_mapped_pages_bytes": peak.whole,
        "needed_over_weights": needed / weights,
    }


def _make_toy(transformers: Any, config: Any) -> None:
    """Import all that a model of this architecture needs."""
    small = type(config)(
        num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModel.from_config(small).save_pretrained(folder)
        transformers.AutoModel.from_pretrained(folder)


def _extract_here(model: str, layers: str, n_texts: str) -> dict[str, float]:
    from llmembed.extract import ExtractConfig, extract

    with tempfile.TemporaryDirectory() as folder:
        data_set = Path(folder) / "short.csv"
        with data_set.open("w") as file:
            file.write("text,label\n")
            file.writelines(f"{_text(row)},{'ab'[row % 2]}\n" for row in range(int(n_texts)))
        cache = str(Path(folder) / "short.zarr")
        config = ExtractConfig(
            model=model, layers=layers, dataset=str(data_set), cache=cache, max_length=32
        )
        done = extract(config)
    return {
        "n_texts": int(n_texts),
        "n_tokens": done.n_tokens,
        "seconds": done.seconds,
        "peak_bytes": _memory()["VmHWM"],
        "anonymous_bytes_at_the_end": _memory()["RssAnon"],
    }


def _text(row: int) -> str:
    """Write a number with words for digits, so that no two texts are the same, of 6 to 9 words."""
    digits = []
    for _ in range(WORDS_A_TEXT):
        row, digit = divmod(row, len(WORDS))
        digits.append(WORDS[digit])
    return " ".join((*digits, *WORDS[: len(digits[0]) % 4]))


def _start_here(model: str, layers: str) -> dict[str, float]:
    from llmembed.extract import ExtractConfig, extract, pipeline

    found: list[float] = []

    class Noting(pipeline.Progress):
        def advance(self, n_rows: int, n_tokens: int) -> None:
            found.append(time.time())
            super().advance(n_rows, n_tokens)

    with tempfile.TemporaryDirectory() as folder, patch.object(pipeline, "Progress", Noting):
        data_set = Path(folder) / "short.csv"
        rows = [f"{_text(row)},{'ab'[row % 2]}\n" for row in range(64)]
        data_set.write_text("text,label\n" + "".join(rows))
        cache = str(Path(folder) / "short.zarr")
        config = ExtractConfig(
            model=model, layers=layers, dataset=str(data_set), cache=cache, max_length=32
        )
        extract(config)
    return {"first_batch_at": found[0]}


class Peak:
    """Most memory of this process above what it had at the beginning, by reading it often."""

    def __enter__(self) -> Peak:
        """Begin."""
        before = _memory()
        self._before = _anonymous(before), before["VmRSS"]
        self.anonymous = self.whole = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        done = False
        while not done:
            done = self._stop.wait(0.002)
            now = _memory()
            self.anonymous = max(self.anonymous, _anonymous(now) - self._before[0])
            self.whole = max(self.whole, now["VmRSS"] - self._before[1])


def _anonymous(memory: dict[str, int]) -> int:
    return memory["RssAnon"] + memory["RssShmem"]


def _memory() -> dict[str, int]:
    """Read bytes of this process from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    "starting": _start_here,
    "loading": _load_here,
    "extracting": _extract_here,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", nargs="?", choices=tuple(CHILDREN), help="in this process")
    parser.add_argument("values", nargs="*", help="of the verb")
    parser.add_argument("--model", default=MODEL, help="of start-up and loading")
    parser.add_argument("--layers", default="24", help="of start-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--few", type=int, default=FEW_TEXTS)
    parser.add_argument("--many", type=int, default=MANY_TEXTS)
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_process.json")
    return parser


if __name__ == "__main__":
    main()
