"""What an extraction costs as a process: its start, the memory of loading and of many texts.

    python benchmarks process                          # all, a few minutes
    python benchmarks process loading MODEL LAYER DTYPE DEVICE      # in this process
    python benchmarks process extracting MODEL LAYERS N_TEXTS       # in this process

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
"""

from __future__ import annotations

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

import harness
from harness import most

MODEL, LAYER, SMALL_MODEL, SMALL_LAYERS = "smollm2-135m", 8, "minilm", "6"
FEW_TEXTS, MANY_TEXTS = 10_000, 100_000
WORDS = ("oil", "bank", "gold", "rate", "share", "price", "dollar", "year", "trade", "profit")
WORDS_A_TEXT = 6
WIDENED = "bfloat16, widened"
BARS = {
    "help, s": most(0.5),
    "start-up, s": most(6),
    "peak of loading over the weights kept, float32": most(1.2),
    "peak of loading over the weights kept, bfloat16": most(1.2),
    f"peak of loading over the weights kept, {WIDENED}": most(1.2),
    "peak of many texts over that of few": most(1.1),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything in processes of their own, or one thing in this one."""
    parser = harness.command_line(__doc__, "speed/process.json")
    add = parser.add_argument
    add("verb", nargs="?", choices=tuple(CHILDREN), help="in this process")
    add("values", nargs="*", help="of the verb")
    add("--model", default=MODEL, help="of start-up and loading")
    add("--layers", default="24", help="of start-up")
    add("--rounds", type=int, default=3)
    add("--few", type=int, default=FEW_TEXTS)
    add("--many", type=int, default=MANY_TEXTS)
    options = parser.parse_args(arguments)
    if options.verb:
        print(json.dumps(CHILDREN[options.verb](*options.values)))
        return
    counts, dtypes = (options.few, options.many), ("float32", "bfloat16", WIDENED)
    result: dict[str, Any] = harness.load() | {
        "help_s": _median_s("from llmembed.extract.cli import main; main(['--help'])", options),
        "start_s": starts(options.model, options.layers, options.rounds),
        "import_s": _median_s("import torch, transformers; transformers.AutoModel", options),
        "loading": {dtype: loading(options.model, LAYER, dtype) for dtype in dtypes},
        "extracting": [
            _run("extracting", SMALL_MODEL, SMALL_LAYERS, str(count)) for count in counts
        ],
    }
    few, many = (one["peak_bytes"] for one in result["extracting"])
    result["figures"] = {
        "help, s": result["help_s"],
        "start-up, s": statistics.median(result["start_s"]),
        **{
            f"peak of loading over the weights kept, {dtype}": one["needed_over_weights"]
            for dtype, one in result["loading"].items()
        },
        "peak of many texts over that of few": many / few,
    }
    for name, figure in result["figures"].items():
        print(BARS[name].line(name, figure))
    harness.finish(result, options.output)


def starts(model: str, layers: str, rounds: int) -> list[float]:
    """Seconds from the start of a process to the end of its first batch, some times."""
    found = []
    for _ in range(rounds + 1):
        begin = time.time()
        found.append(_run("starting", model, layers)["first_batch_at"] - begin)
    return found[1:]  # the first may convert the model


def loading(model: str, layer: int, dtype: str, device: str = "cpu") -> dict[str, float]:
    """Bytes at the peak of loading a model cut at a layer, in a process of its own."""
    small = {"ONEDNN_MAX_CPU_ISA": "AVX2"} if dtype == WIDENED else {}
    return _run("loading", model, str(layer), dtype.partition(",")[0], device, **small)


def _run(*arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", harness.HERE, "process", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _median_s(code: str, options: Any) -> float:
    """Seconds of a Python process that runs some code."""
    command = [sys.executable, "-c", code]
    run = subprocess.run
    return harness.median_s(
        lambda: run(command, check=True, stdout=subprocess.DEVNULL), options.rounds
    )[0]


def _load_here(model: str, layer: str, dtype: str, device: str) -> dict[str, float]:
    import torch
    import transformers

    from llmembed.extract import Extractor, Recipe

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto: Any = transformers.AutoModel
    recipe = Recipe(model=model, max_length=64, compute_dtype=dtype, dtype="float32")
    ids = recipe.tokenizer("", add_special_tokens=True)["input_ids"] or [0]
    small = type(recipe.shape.config)(
        num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # import all that this architecture needs
        auto.from_config(small).save_pretrained(folder)
        auto.from_pretrained(folder)
    if device != "cpu":
        torch.zeros(1, device=device)
    before = harness.memory()["RssFile"]
    with Peak() as peak:
        ours = Extractor(recipe, layers=[int(layer)], poolings=["mean"], device=device)
    ours.compute([ids])
    needed = peak.anonymous + max(0, harness.memory()["RssFile"] - before)
    with torch.device("meta"):
        config = copy.deepcopy(recipe.shape.config)
        config.num_hidden_layers = int(layer)
        kept = auto.from_config(config).parameters()
    weights = sum(one.numel() for one in kept) * getattr(torch, dtype).itemsize
    return {
        "weights_bytes": weights,
        "anonymous_bytes": peak.anonymous,
        "needed_bytes": needed,
        "with_all_mapped_pages_bytes": peak.whole,
        "needed_over_weights": needed / weights,
    }


def _extract_here(model: str, layers: str, n_texts: str) -> dict[str, float]:
    from llmembed.extract import ExtractConfig, extract

    with tempfile.TemporaryDirectory() as folder:
        data_set = Path(folder) / "short.csv"
        with data_set.open("w", encoding="utf-8") as file:
            file.write("text,label\n")
            file.writelines(f"{_text(row)},{'ab'[row % 2]}\n" for row in range(int(n_texts)))
        cache = f"{folder}/short.zarr"
        short: dict[str, Any] = {
            "dataset": str(data_set),
            "cache": cache,
            "max_length": 32,
            "pooling": ("mean",),
        }
        done = extract(ExtractConfig(model=model, layers=layers, **short))
    return {
        "n_texts": int(n_texts),
        "n_tokens": done.n_tokens,
        "seconds": done.seconds,
        "peak_bytes": harness.memory()["VmHWM"],
        "anonymous_bytes_at_the_end": harness.memory()["RssAnon"],
    }


def _text(row: int) -> str:
    """Write a number with words for digits, so that no two texts are the same, of 6 to 9 words."""
    digits = []
    for _ in range(WORDS_A_TEXT):
        row, digit = divmod(row, len(WORDS))
        digits.append(WORDS[digit])
    return " ".join((*digits, *WORDS[: len(digits[0]) % 4]))


def _start_here(model: str, layers: str) -> dict[str, float]:
    """Extract 64 texts, and note when the first batch was done."""
    from llmembed.extract import pipeline

    found: list[float] = []

    class Noting(pipeline.Progress):
        def advance(self, n_rows: int, n_tokens: int) -> None:
            found.append(time.time())
            super().advance(n_rows, n_tokens)

    with patch.object(pipeline, "Progress", Noting):
        _extract_here(model, layers, "64")
    return {"first_batch_at": found[0]}


class Peak:
    """Most memory of this process above what it had at the beginning, by reading it often."""

    def __enter__(self) -> Peak:
        """Begin."""
        before = harness.memory()
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
            now = harness.memory()
            self.anonymous = max(self.anonymous, _anonymous(now) - self._before[0])
            self.whole = max(self.whole, now["VmRSS"] - self._before[1])


def _anonymous(memory: dict[str, int]) -> int:
    return memory["RssAnon"] + memory["RssShmem"]


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    "starting": _start_here,
    "loading": _load_here,
    "extracting": _extract_here,
}
