"""Targets: files that a command is handed: HDF5, runs, and texts in every format."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
from clustered import write_cache
from fuzzing import Targets, Try, as_bytes, mutated, mutated_json
from toy_cache import write_toy

from llmembed.cache_format import open_cache
from llmembed.cache_format.tools import convert

CORPUS = Path(__file__).parent.parent / "faults/corpus"
RUNS = Path(__file__).parent.parent / "golden/run_format_1"


def hdf5(stack: ExitStack) -> Try:
    """An HDF5 file with damaged bytes, or with other documents or arrays in a sound file."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    write_toy(folder / "toy.zarr", 70, layers=[8], poolings=["mean"])
    convert(folder / "toy.zarr", folder / "toy.h5")
    sound = (folder / "toy.h5").read_bytes()
    with h5py.File(folder / "toy.h5") as file:
        documents = json.loads(file["llmembed_documents"][:].tobytes())
    place, target = folder / "one.h5", folder / "one.zarr"

    def one(rng: random.Random) -> bool:
        place.write_bytes(mutated(rng, sound) if rng.random() < 0.6 else sound)
        if place.read_bytes() == sound:
            with h5py.File(place, "r+") as file:
                changed = mutated_json(rng, documents)
                if rng.random() < 0.5:
                    key = rng.choice(list(documents))
                    inner = mutated_json(rng, json.loads(documents[key]))
                    changed = {**documents, key: json.dumps(inner)}
                del file["llmembed_documents"]
                file["llmembed_documents"] = np.frombuffer(as_bytes(changed), np.uint8)
        try:
            convert(place, target)
            cache = open_cache(target)
            return bool(cache.splits)
        finally:
            shutil.rmtree(target, ignore_errors=True)

    return one


def run(name: str, stack: ExitStack) -> Try:
    """One file of a run is damaged; what loads still says something of a feature."""
    import torch

    from llmembed.train import load_run

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    place = shutil.copytree(RUNS / name, folder / "run") if name != "fresh" else _fitted(folder)
    sound = {path.name: path.read_bytes() for path in sorted(place.iterdir())}
    for file in ("predictions.parquet", "report.html"):
        sound.pop(file, None)

    def one(rng: random.Random) -> bool:
        file = rng.choice(list(sound))
        data = sound[file]
        if file.endswith(".json") and rng.random() < 0.8:
            changed = as_bytes(mutated_json(rng, json.loads(data)))
        elif file.endswith(".safetensors") and rng.random() < 0.6:
            changed = _other_header(rng, data)
        else:
            changed = mutated(rng, data)
        (place / file).write_bytes(changed)
        try:
            found = load_run(place)
            with torch.inference_mode():
                rows = torch.zeros(2, sum(found.classifier.architecture.widths))
                assert found.classifier(rows).shape == (2, len(found.labels))
        finally:
            (place / file).write_bytes(data)
        return True

    return one


def _fitted(folder: Path) -> Path:
    """Fit a run, which has all files that this version writes."""
    from llmembed.train import FitConfig, fit

    cache = write_cache(folder / "tiny.zarr")
    return fit(FitConfig(cache=str(cache), fusion="concat", output=str(folder / "run"))).path


def _other_header(rng: random.Random, data: bytes) -> bytes:
    """Change the JSON at the head of a safetensors file, its length being right or not."""
    n = int.from_bytes(data[:8], "little")
    header = as_bytes(mutated_json(rng, json.loads(data[8 : 8 + n])))
    length = len(header) if rng.random() < 0.8 else rng.choice((0, 1, 2**40, 2**63))
    return length.to_bytes(8, "little") + header + data[8 + n :]


def table(suffix: str, stack: ExitStack) -> Try:
    """A file of texts with damaged bytes: rows of texts and labels come out, or a sentence."""
    from llmembed.extract.texts import DatasetOptions
    from llmembed.extract.texts.corpora import load_corpus
    from llmembed.extract.texts.files import read_table

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    seeds = [path.read_bytes() for path in sorted(CORPUS.glob(f"*{suffix}"))]
    place = folder / f"one{suffix}"

    def one(rng: random.Random) -> bool:
        data = rng.choice(seeds)
        if suffix == ".jsonl" and rng.random() < 0.5:
            lines = [json.loads(line) for line in data.splitlines()]
            data = b"\n".join(map(as_bytes, map(functools.partial(mutated_json, rng), lines)))
        else:
            data = mutated(rng, data, seeds)
        place.write_bytes(data)
        if rng.random() < 0.5:
            return read_table(place).num_rows > 0
        corpus = load_corpus(DatasetOptions(str(place)))
        return all(corpus.splits.values())

    return one


TARGETS: Targets = {
    "hdf5": hdf5,
    "cooc": functools.partial(run, "cooc"),
    "auto": functools.partial(run, "auto"),
    "fresh": functools.partial(run, "fresh"),
    **{
        suffix: functools.partial(table, suffix)
        for suffix in (".csv", ".tab", ".jsonl", ".json", ".parquet", ".arrow")
    },
}
