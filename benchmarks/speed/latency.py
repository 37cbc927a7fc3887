"""What one text costs: from a run that is loaded, and as a command from its start.

    python benchmarks latency [--model minilm] [--layers 2,4,6]

*One text* goes through `Run.predict_proba`, in turn with the floor: plain transformers, the model
cut alike, in the same arithmetic, given the same tokens, and the mean of the same layers. The floor
has no tokenizer, no classifier and no check.

*The command* is `llmembed-predict --text`, in turn with a process that imports torch and
transformers, loads the same tokenizer and model, and runs them. *Imports of our own* are the
modules that only the command imports, by `python -X importtime`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
import transformers
from harness import most

from llmembed.extract import ExtractConfig, Extractor, Recipe, extract
from llmembed.train import FitConfig, Run, fit, load_run

TEXT = "the company said its quarterly net profit rose to 12 mln dlrs"
BARS = {
    "one text over the bare forward": most(1.5),
    "four sentences over the bare forward": most(1.5),
    "llmembed-predict, s": most(3.5),
    "imports of our own, s": most(0.4),
}
_COMMAND = (
    "import sys; from llmembed.train.cli.predict import predict_main as main;"
    "main(['--run', sys.argv[1], '--text', sys.argv[2]])"
)
_FLOOR = """
import sys, torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModel.from_pretrained(sys.argv[1])
with torch.inference_mode():
    model(**tokenizer([sys.argv[2]], return_tensors="pt"))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.command_line(__doc__, "speed/latency.json")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--layers", default="2,4,6")
    parser.add_argument("--dataset", default="r8")
    parser.add_argument("--rounds", type=int, default=50, help="of one text")
    parser.add_argument("--starts", type=int, default=5, help="of each process; 0 leaves them out")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        run = _run(options, Path(scratch))
        document = {**harness.load(), **measure(run, options.rounds, options.starts)}
    for name in filter(document.__contains__, BARS):
        print(BARS[name].line(name, document[name]))
    harness.finish(document, options.output)


def _run(options: Any, scratch: Path) -> Run:
    where: dict[str, Any] = {"dataset": options.dataset, "cache": str(scratch / "a.zarr")}
    what: dict[str, Any] = {"layers": options.layers, "pooling": ("mean",), "max_length": 64}
    extract(
        ExtractConfig(model=options.model, limit=64, **what, **where),
        show_progress=False,
    )
    fitted = fit(FitConfig(cache=where["cache"], output=str(scratch / "run")), show_progress=False)
    return load_run(fitted.path)


def measure(run: Run, rounds: int, starts: int) -> dict[str, float]:
    """Measure both, with medians in seconds beside the ratios."""
    (source,) = run.config["sources"].values()
    recipe = Recipe.from_record(source["recipe"])
    layers = sorted({feature.layer for feature in run.features})
    ours = Extractor(recipe, layers=layers, poolings=["mean"])
    model: Any = transformers.AutoModel.from_pretrained(
        recipe.files.folder,
        config=ours.backbone.model.config,
        dtype=ours.backbone.compute_dtype,
        attn_implementation="sdpa",
    ).eval()
    document: dict[str, float] = {}
    for name, text in (("one text", TEXT), ("four sentences", " ".join([TEXT] * 4))):
        tokens = torch.tensor(ours.tokenize([text]).ids)
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

        def bare(given: dict[str, torch.Tensor] = given) -> None:
            with torch.inference_mode():
                states = model(**given, output_hidden_states=True).hidden_states
                _ = [states[layer].float().mean(dim=1) for layer in layers]

        def whole(text: str = text) -> None:
            run.predict_proba([text])

        taken = harness.by_turns({"whole": whole, "bare": bare}, rounds, warm_up=True)
        document |= {f"{name}, {way}, s": statistics.median(s) for way, s in taken.items()}
        document[f"{name} over the bare forward"] = harness.ratio(taken["whole"], taken["bare"])
    if not starts:
        return document
    commands = {"llmembed-predict": (_COMMAND, run.path), "floor": (_FLOOR, recipe.files.folder)}
    started = harness.by_turns(
        {name: _starter(code, place) for name, (code, place) in commands.items()}, starts
    )
    document |= {f"{name}, s": statistics.median(seconds) for name, seconds in started.items()}
    floor = {module for module, _ in _imports(*commands["floor"])}
    own = (s for module, s in _imports(*commands["llmembed-predict"]) if module not in floor)
    return document | {"imports of our own, s": sum(own)}


def _starter(code: str, place: Path, *flags: str) -> Any:
    command = [sys.executable, *flags, "-Pc", code, str(place), TEXT]
    return lambda: subprocess.run(command, check=True, capture_output=True, text=True)


def _imports(code: str, place: Path) -> list[tuple[str, float]]:
    """List what a process imports, with the seconds that each module took by itself."""
    told = _starter(code, place, "-X", "importtime")().stderr.splitlines()
    lines = [line.removeprefix("import time:").split("|") for line in told if "|" in line]
    return [(name.strip(), int(own) / 1e6) for own, _, name in lines if own.strip().isdecimal()]
