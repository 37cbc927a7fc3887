"""Who sends a pickle in place of any file runs nothing."""

from __future__ import annotations

import ast
import gzip
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from product_files import PRODUCT, ROOT
from toy_commands import EXTRACTED, refused, run

from llmembed.cache_format.cli import main as cache_main
from llmembed.extract.cli import main as extract_main
from llmembed.train.cli.fit import fit_main
from llmembed.train.cli.predict import predict_main
from llmembed.train.cli.report import report_main

Tries = Callable[[int], None]


@pytest.mark.fault("S1")
def test_no_module_can_read_a_pickle(tries: Tries) -> None:
    """Nothing is imported that unpickles, torch.load reads weights only, numpy no objects."""
    found = [
        f"{path.relative_to(ROOT)}: {reason}"
        for path in PRODUCT
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for reason in runs_pickles(node)
    ]
    assert found == ["train/gradient/workspace.py: line 19: import pickle"]  # to name its error
    tries(len(PRODUCT))


def runs_pickles(node: ast.AST) -> Iterator[str]:
    """Say what of a node could load a pickle, or run what is data."""
    is_bad = False
    if isinstance(node, ast.Import):
        is_bad = bool({alias.name.partition(".")[0] for alias in node.names} & UNPICKLES)
    elif isinstance(node, ast.ImportFrom):
        is_bad = (node.module or "").partition(".")[0] in UNPICKLES
    elif isinstance(node, ast.Attribute):
        is_pickle = isinstance(node.value, ast.Name) and node.value.id == "pickle"
        is_bad = is_pickle and node.attr != "UnpicklingError"
    elif isinstance(node, ast.Call):
        given = {key.arg: ast.unparse(key.value) for key in node.keywords}
        called = ast.unparse(node.func)
        is_bad = called in RUNS_CODE or given.get("allow_pickle", "False") != "False"
        is_bad |= called.endswith("torch.load") and given.get("weights_only") != "True"
    if is_bad:
        yield f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)}"


UNPICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLES |= {"yaml", "zipfile", "tarfile"}
RUNS_CODE = {"eval", "exec", "compile", "os.system", "os.popen", "pd.read_pickle"}
RUNS_CODE |= {"shutil.unpack_archive", "torch.jit.load", "torch.package.PackageImporter"}


class Evil:
    """An object whose pickle makes a file where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self._marker,))


def pickles(marker: Path) -> dict[str, bytes]:
    """The same trap as each library writes it."""
    evil = Evil(marker)
    zipped, array, rows = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"weight": evil}, zipped)
    np.save(array, np.array([evil], dtype=object), allow_pickle=True)
    np.savez(rows, allow_pickle=True, rows=np.array([evil], dtype=object))
    plain = pickle.dumps(evil)
    return {
        "pickle": plain,
        "protocol 0": pickle.dumps(evil, protocol=0),
        "torch": zipped.getvalue(),
        "npy": array.getvalue(),
        "npz": rows.getvalue(),
        "gzip": gzip.compress(plain),
    }


@pytest.mark.fault("S1")
def test_a_pickle_in_place_of_any_file_of_a_run_runs_nothing(
    made: Path, tmp_path: Path, tries: Tries
) -> None:
    """Each file of a run is replaced by a pickle of each kind: refused or not read, never run."""
    marker, number = tmp_path / "evil", 0
    spoiled, kept = tmp_path / "run", {f.name: f for f in (made / "run").iterdir()}
    shutil.copytree(made / "run", spoiled)
    for name, whole in kept.items():
        for bytes_ in pickles(marker).values():
            (spoiled / name).write_bytes(bytes_)
            result = run(predict_main, "--run", str(spoiled), "--text", "w1", "--ood")
            assert result.exit_code == 0 or isinstance(result.exception, SystemExit), result
            assert not marker.exists()
            number += 1
        page = ("--output", str(tmp_path / "page.html"))
        reported = run(report_main, str(spoiled), *page)
        assert reported.exit_code == 0 or isinstance(reported.exception, SystemExit), reported
        assert not marker.exists()
        shutil.copy(whole, spoiled / name)
    assert number > 6 * 6
    tries(number)


@pytest.mark.fault("S1")
def test_a_pickle_in_place_of_any_file_of_a_cache_runs_nothing(
    made: Path, tmp_path: Path, tries: Tries
) -> None:
    """Each document and each chunk of a cache is replaced: `verify` refuses, a fit does not run."""
    marker, number, cache = tmp_path / "evil", 0, tmp_path / "c.zarr"
    shutil.copytree(made / "topics.zarr", cache)
    fitted = ["--cache", str(cache), "--output", str(tmp_path / "r"), "--baseline", "none"]
    files = [file for file in sorted(cache.rglob("*")) if file.is_file()]
    of_each_kind = {re.sub(r"\d+", "", file.name): file for file in files}.values()
    for file in of_each_kind:
        whole = file.read_bytes()
        for bytes_ in pickles(marker).values():
            file.write_bytes(bytes_)
            result = run(cache_main, "verify", str(cache))
            # An index and a document above the arrays are rebuilt or not needed.
            assert result.exit_code in {0, 1}, result.output
            assert result.exit_code == 0 or isinstance(result.exception, SystemExit)
            assert not marker.exists()
            number += 1
        refused_or_done = run(fit_main, *fitted, "--fusion", "concat", "--head", "ridge")
        assert refused_or_done.exit_code in {0, 1}
        assert not marker.exists()
        file.write_bytes(whole)
    tries(number)


@pytest.mark.fault("S1")
def test_a_pickle_in_place_of_any_file_of_a_model_runs_nothing(
    made: Path, tmp_path: Path, tries: Tries
) -> None:
    """Weights, tokenizer or config that is a pickle, under its own or a pickle's name: refused."""
    marker, number = tmp_path / "evil", 0
    data, cache = tmp_path / "d.csv", tmp_path / "c.zarr"
    data.write_text("text,label\nw1,a\nw2,b\n", encoding="utf-8")
    arguments = ["--dataset", str(data), "--cache", str(cache), *EXTRACTED, "--overwrite"]
    for renamed in (None, "pytorch_model.bin", "model.pt"):
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            model = tmp_path / f"{renamed}-{name}"
            shutil.copytree(made / "toy", model)
            (model / name).unlink()
            for bytes_ in pickles(marker).values():
                (model / (renamed or name)).write_bytes(bytes_)
                refused(extract_main, "--model", str(model), *arguments)
                assert not marker.exists()
                number += 1
    tries(number)


@pytest.mark.fault("S1")
def test_a_pickle_as_texts_runs_nothing(world: Path, tmp_path: Path, tries: Tries) -> None:
    """Under the suffix of each kind of data file, its own too, it is refused."""
    marker, number = tmp_path / "evil", 0
    text = ("csv", "tsv", "json", "jsonl", "ndjson", "txt", "csv.gz")
    suffixes = (*text, "parquet", "arrow", "feather", "pkl", "npy", "npz", "pt")
    for suffix in suffixes:
        for bytes_ in pickles(marker).values():
            data = tmp_path / f"d.{suffix}"
            data.write_bytes(bytes_)
            given = ["--model", "toy", "--dataset", str(data), "--cache", "d.zarr", *EXTRACTED]
            refused(extract_main, *given)
            answered = run(predict_main, "--run", "run", "--input", str(data))  # some are text
            assert answered.exit_code == 0 or isinstance(answered.exception, SystemExit)
            assert not marker.exists()
            number += 1
    tries(number)
