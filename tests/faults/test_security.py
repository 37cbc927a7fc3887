"""Who sends a cache, a model, a data file, a run, or a request gets no more than they should."""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import os
import pickle
import re
import runpy
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import h5py
import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from packaging.requirements import Requirement
from packaging.version import Version
from safetensors import safe_open
from toy_model import save_toy_model, toy_texts, write_two_topics
from watching import family, listening, told, watched

from llmembed.cache_format.cli import main as cache_main
from llmembed.extract.cli import main as extract_main
from llmembed.train.cli.audit import audit_main
from llmembed.train.cli.fit import fit_main
from llmembed.train.cli.predict import predict_main
from llmembed.train.cli.report import report_main
from llmembed.train.cli.sweep import sweep_main

ROOT = Path(__file__).parents[2]
PRODUCT = [
    path
    for folder in ("cache_format", "extract", "train")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
Tries = Callable[[int], None]


@pytest.fixture(scope="module", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes and converted models stay out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMEMBED_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `toy`, texts `topics`, a cache `topics.zarr` of them and its `run`."""
    folder = tmp_path_factory.mktemp("made")
    save_toy_model(folder / "toy")
    write_two_topics(folder)
    extracted(folder / "toy", folder / "topics", folder / "topics.zarr")
    fitted = ["--cache", str(folder / "topics.zarr"), "--output", str(folder / "run")]
    done(fit_main, *fitted, "--fusion", "concat", "--head", "ridge", "--baseline", "none")
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil, which is the working folder."""
    shutil.copytree(made, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def run(command: click.Command, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def done(command: click.Command, *arguments: str) -> Result:
    result = run(command, *arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(command: click.Command, *arguments: str) -> str:
    """Run it; it must end in one known error, and not by a traceback."""
    result = run(command, *arguments)
    assert isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code in {1, 2}, (arguments, result.output)
    assert "Traceback" not in result.output
    return result.stderr


def extracted(model: Path | str, dataset: Path | str, cache: Path | str, *more: str) -> Result:
    given = ["--model", str(model), "--dataset", str(dataset), "--cache", str(cache)]
    return done(extract_main, *given, *EXTRACTED, *more)


EXTRACTED = ("--layers", "1,2", "--pooling", "mean", "--max-length", "64", "--quiet")


# --- pickles


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


# --- what names and texts may do

HOSTILE = (
    "\x1b[2J\x1b[31mred\x07",
    "\x9b2J\u202eback",
    "two\nlines\r\nand a \x00",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "=cmd|' /C calc'!A0",
    "{{ 7*7 }}{% raw %}",
    "${HOME}$(id)`id`%s%n",
    "../../../etc/passwd",
    "a" * 3000,
)
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.fault("S2")
def test_names_and_texts_command_nothing(
    world: Path, tries: Tries, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ten hostile labels, texts and names through every command: escaped, and never markup."""
    rows = [
        {"text": f"{HOSTILE[k]} w{k} {text}", "label": HOSTILE[k], "=id": HOSTILE[-k]}
        for n, text in enumerate(toy_texts(120, longest=4))
        for k in [n % len(HOSTILE)]
    ]
    data = world / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outputs = [
        extracted("toy", data, "d.zarr", "--debug").output,
        done(extract_main, "--model", "toy", "--dataset", str(data), *EXTRACTED[:-1]).output,
        done(
            fit_main,
            *("--cache", "d.zarr", "--output", "named", "--store-texts"),
            *("--fusion", "concat", "--head", "ridge"),
        ).output,
        done(predict_main, "--run", "named", "--input", str(data), "--proba").output,
        done(predict_main, "--run", "named", "--input", str(data), "--json").output,
        done(predict_main, "--run", "named", "--text", HOSTILE[0], "--top-k", "10").output,
        done(report_main, "named", "--output", "page.html").output,
        done(report_main, "--cache", "d.zarr", "--output", "cache.html").output,
        done(audit_main, "--cache", "d.zarr", "--output", "audit", "--defuse-formulas").output,
        done(sweep_main, "--cache", "d.zarr", "--output", "sweep", "--layers", "1").output,
        done(cache_main, "info", "d.zarr").output,
        done(cache_main, "verify", "d.zarr").output,
        refused(extract_main, "--model", HOSTILE[0], "--dataset", str(data), "--layers", "1"),
        refused(extract_main, "--model", "toy", "--dataset", HOSTILE[0], "--layers", "1"),
        refused(fit_main, "--cache", HOSTILE[0]),
        refused(fit_main, "--cache", "d.zarr", "--fusion", HOSTILE[0]),
        refused(predict_main, "--run", HOSTILE[0], "--text", "w1"),
        refused(cache_main, "info", HOSTILE[0]),
        *capfd.readouterr(),
    ]
    for output in outputs:
        assert not OBEYED.findall(output.replace("\r\n", "\n")), output
    pages = [*world.rglob("*.html"), *world.rglob("*.svg")]
    assert len(pages) >= 4
    for page in pages:
        content = page.read_text(encoding="utf-8")
        assert not OBEYED.findall(content), page
        for markup in ("<script>alert", "<img src=x", "49{"):
            assert markup not in content, (page, markup)
    tries(len(outputs) + len(pages))


@pytest.mark.fault("S2")
def test_a_csv_to_open_in_a_spreadsheet_holds_no_formula(world: Path, tries: Tries) -> None:
    """With --defuse-formulas no cell, name of a column or label begins one."""
    begins = [f"{mark}cmd|' /C calc'!A0" for mark in ("=", "+", "-", "@", "'=", "a\t=")]
    with (world / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", *begins], *([one, *begins] for one in begins)])
    given = ["--run", "run", "--input", "in.csv", "--text-column", "text", "--output", "out.csv"]
    done(predict_main, *given, "--defuse-formulas")
    with (world / "out.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert len(cells) > len(begins) ** 2
    assert not [one for one in cells if one.startswith(("=", "+", "-", "@", "\t", "\r"))]
    tries(len(cells))


# --- names and links that lead elsewhere

OUTSIDE = ("..", "../x", "../../x", "/etc/x", "a/../../x", ".", "a/b", "x\0", "~root", "C:\\x", "")


@pytest.mark.fault("S3")
def test_names_lead_nowhere_else(world: Path, tries: Tries) -> None:
    """Names of sources and splits that are paths are refused, and nothing is written outside."""
    before = {str(path) for path in world.parent.rglob("*")}
    number = 0
    for name in OUTSIDE:
        given = ["--model", "toy", "--dataset", "topics", "--cache", "x.zarr", *EXTRACTED]
        if name:
            refused(extract_main, *given, "--source", name)
            refused(extract_main, *given, "--split", name)
            refused(fit_main, "--cache", "topics.zarr", "--source", name, "--output", "r")
            refused(fit_main, "--cache", "topics.zarr", "--eval-split", name, "--output", "r")
            number += 4
    left = {str(path) for path in world.parent.rglob("*")} - before
    assert not [path for path in left if not path.startswith(str(world / "x.zarr"))]
    tries(number)


@pytest.mark.fault("S3")
@pytest.mark.parametrize("name", [one for one in OUTSIDE if one != "a/b"])
def test_a_foreign_cache_names_no_place_outside(world: Path, name: str) -> None:
    """A split or a source of the header that is a path is refused before anything is opened."""
    header = world / "topics.zarr" / "zarr.json"
    text = header.read_text(encoding="utf-8")
    for key in ("train", "toy"):
        changed = text.replace(f'"{key}":', f"{json.dumps(name)}:")
        changed = changed.replace(f'"name": "{key}"', f'"name": {json.dumps(name)}')
        changed = changed.replace(f'"name":"{key}"', f'"name":{json.dumps(name)}')
        assert changed != text
        header.write_text(changed, encoding="utf-8")
        refused(cache_main, "verify", "topics.zarr")
        refused(fit_main, "--cache", "topics.zarr", "--output", "r")
        refused(cache_main, "copy", "topics.zarr", "copied.zarr")


@pytest.mark.fault("S3")
def test_shards_of_a_model_lie_in_its_folder(world: Path, tries: Tries) -> None:
    """An index of weights that names a file outside the folder is refused."""
    (world / "toy" / "model.safetensors").rename(world / "outside.safetensors")
    given = ["--model", "toy", "--dataset", "topics", "--cache", "x.zarr", *EXTRACTED]
    index = world / "toy" / "model.safetensors.index.json"
    places = [
        "../outside.safetensors",
        str(world / "outside.safetensors"),
        "./../outside.safetensors",
    ]
    for place in places:
        with safe_open(world / "outside.safetensors", "pt") as file:
            weights = dict.fromkeys(file.keys(), place)
        index.write_text(json.dumps({"metadata": {}, "weight_map": weights}), encoding="utf-8")
        message = refused(extract_main, *given)
        assert "safetensors" in message
    tries(len(places))


# --- HDF5


def _external(file: h5py.File, key: str) -> None:
    file[key] = h5py.ExternalLink("other.h5", "/secret")


def _soft(file: h5py.File, key: str) -> None:
    file[key] = h5py.SoftLink("/elsewhere")


def _virtual(file: h5py.File, key: str) -> None:
    layout = h5py.VirtualLayout((160,), "<i4")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (160,))
    file.create_virtual_dataset(key, layout)


def _stored_elsewhere(file: h5py.File, key: str) -> None:
    file.create_dataset(key, (160,), "<i4", external=[("secret.bin", 0, 640)])


def _reference(file: h5py.File, key: str) -> None:
    file.create_dataset(key, (160,), h5py.ref_dtype)


def _named_type(file: h5py.File, key: str) -> None:
    file[key] = np.dtype("<i4")


@pytest.mark.fault("S4")
@pytest.mark.parametrize(
    "link", [_external, _soft, _virtual, _stored_elsewhere, _reference, _named_type]
)
def test_links_of_hdf5_are_refused(world: Path, link: Callable[..., None], tries: Tries) -> None:
    """In place of any data set or group: refused before it is read, and no cache is made."""
    done(cache_main, "convert", "topics.zarr", "c.h5")
    secret = np.full(160, 7_777_777, "<i4")
    secret.tofile(world / "secret.bin")
    with h5py.File("other.h5", "w") as file:
        file["secret"] = secret
    keys: list[str] = []
    with h5py.File("c.h5") as file:
        file.visit(keys.append)
    for number, key in enumerate(keys):
        shutil.copy("c.h5", "spoiled.h5")
        with h5py.File("spoiled.h5", "a") as file:
            file["elsewhere"] = file[key]
            del file[key]
            link(file, key)
        message = refused(cache_main, "convert", "spoiled.h5", f"{number}.zarr")
        assert "spoiled.h5" in message
        assert not Path(f"{number}.zarr").exists()
    assert len(keys) > 8
    tries(len(keys))


# --- tokens

CANARY = "canary-5f3a9c"
SECRETS = {
    **{
        name: f"{CANARY}-{name.lower()}"
        for name in (
            *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
            *("WANDB_API_KEY", "GITHUB_TOKEN", "RAY_AUTH_TOKEN", "OPENAI_API_KEY"),
        )
    },
    "https_proxy": f"http://user:{CANARY}-proxy@127.0.0.1:9",
    "FSSPEC_S3_SECRET": f"{CANARY}-fsspec",
}


def files_with(folder: Path, secret: str) -> list[Path]:
    """Find the files below a folder whose bytes or names hold a text."""
    return [
        path
        for path in folder.rglob("*")
        if secret in path.name or (path.is_file() and secret.encode() in path.read_bytes())
    ]


def environment_of(folder: Path) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    return watched(folder, {**plain, **SECRETS, "HF_HUB_OFFLINE": "0"})


def start(command: str, *arguments: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    line = [sys.executable, "-Pm", "llmembed", command, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.fault("S5")
def test_tokens_are_told_to_nobody(world: Path, tmp_path: Path, tries: Tries) -> None:
    """From extraction to an answered request, with --debug: in no output, file or command line."""
    environment = environment_of(tmp_path / "watch")
    given = ["--model", "toy", "--dataset", "topics", "--debug", *EXTRACTED[:-1]]
    lines = [
        ["extract", *given, "--cache", "two.zarr", "--devices", "2", "--device", "cpu"],
        ["extract", *given, "--cache", "rank.zarr", "--rank", "0", "--world", "2"],
        ["extract", *given, "--cache", "rank.zarr", "--rank", "1", "--world", "2"],
        ["cache", "finalize", "rank.zarr", "--debug"],
        ["fit", "--cache", "two.zarr", "--output", "r", "--store-texts", "--debug"],
        ["predict", "--run", "r", "--text", "w1 w2", "--debug"],
        ["extract", "--model", "no/such-model", *given[2:], "--cache", "x.zarr"],
    ]
    for line in lines:
        process = start(*line, environment=environment)
        for output in process.communicate():
            assert CANARY not in output, line
        assert process.returncode == (1 if "no/such" in str(line) else 0), line
    server = start("serve", "r", "--port", "0", "--json", "--debug", environment=environment)
    assert server.stdout is not None
    url = json.loads(server.stdout.readline())["url"]
    for path in ("predict", "metrics", "docs", "openapi.json", ""):
        body = json.dumps({"texts": ["w1"]}) if path == "predict" else None
        verb, kind = ("POST" if body else "GET"), {"Content-Type": "application/json"}
        answer = httpx.request(verb, url + path, content=body, headers=kind, trust_env=False)
        assert (answer.status_code, CANARY in answer.text) == (200, False)
    server.terminate()
    for output in server.communicate():
        assert CANARY not in output
    events = told(tmp_path / "watch")
    started = [line for event, line in events if event == "subprocess.Popen"]
    assert len(started) >= 2  # the processes of --devices
    assert not [line for line in started if CANARY in " ".join(line)]
    assert files_with(world, CANARY) == []
    assert files_with(Path(os.environ["LLMEMBED_HOME"]), CANARY) == []
    tries(len(SECRETS) * (len(lines) + 6))


PLACES = (
    "https://user:{}@127.0.0.1:9/cache.zarr",
    "http://{}@127.0.0.1:9/cache.zarr",
    "ftp://user:{}@127.0.0.1:9/cache.zarr",
    "s3://user:{}@bucket/cache.zarr",
    "nothing://user:{}@host/cache.zarr",
    "https://127.0.0.1:9/cache.zarr?X-Amz-Signature={}",
    "hf://user:{}@datasets/a/b",
)


@pytest.mark.fault("S5")
def test_passwords_in_urls_are_not_repeated(world: Path, tries: Tries) -> None:
    """A place with a password or a signature is refused without them, with --debug too."""
    number = 0
    for place in (one.format(CANARY) for one in PLACES):
        for command, *arguments in (
            (extract_main, "--model", "toy", "--dataset", "topics", "--cache", place, *EXTRACTED),
            (fit_main, "--cache", place),
            (cache_main, "info", place),
            (cache_main, "copy", "topics.zarr", place),
            (report_main, "--cache", place),
            (extract_main, "--model", place, "--dataset", "topics", *EXTRACTED),
            (extract_main, "--model", "toy", "--dataset", place, *EXTRACTED),
            (predict_main, "--run", place, "--text", "w1"),
        ):
            assert isinstance(command, click.Command)
            result = run(command, *map(str, arguments))
            assert result.exit_code in {1, 2}, (arguments, result.output)
            assert CANARY not in result.output, result.output
            assert isinstance(result.exception, SystemExit), result.exception
            number += 1
    assert files_with(world, CANARY) == []
    tries(number)


# --- what listens

LOOPBACK = {"127.0.0.1", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.mark.slow
@pytest.mark.fault("S6")
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_a_server_listens_on_loopback(world: Path, tmp_path: Path) -> None:
    """Of all processes of a server, nothing listens elsewhere; 0.0.0.0 only where it is told."""
    for told_host, expected in ((), {"127.0.0.1"}), (("--host", "0.0.0.0"), {"0.0.0.0"}):  # noqa: S104
        environment = watched(tmp_path / f"watch{len(told_host)}")
        server = start("serve", "run", "--port", "0", "--json", *told_host, environment=environment)
        assert server.stdout is not None
        json.loads(server.stdout.readline())
        assert listening(family(server.pid)) == expected
        server.terminate()
        server.communicate()


@pytest.mark.slow
@pytest.mark.fault("S6")
def test_an_extraction_listens_nowhere(world: Path, tmp_path: Path) -> None:
    """Nor does a fit, and neither connects to anything: two processes talk by pipes."""
    environment = watched(tmp_path / "watch")
    given = ["--model", "toy", "--dataset", "topics", "--cache", "n.zarr", *EXTRACTED]
    for line in (
        ["extract", *given, "--devices", "2", "--device", "cpu"],
        ["fit", "--cache", "n.zarr", "--output", "n"],
        ["predict", "--run", "n", "--text", "w1"],
    ):
        process = start(*line, environment=environment)
        _, said = process.communicate()
        assert process.returncode == 0, said
    events = told(tmp_path / "watch")
    of_sockets = {(event, *what) for event, what in events if event.startswith("socket.")}
    assert of_sockets <= {("socket.bind", "::1", "0")}  # urllib3 asks whether there is IPv6


# --- Ray

RAY = """
import json, os, sys
sys.path.insert(0, {support!r})
from watching import family, listening
from llmembed.common.cluster import joined
with joined(None, 1):
    import ray
    from ray._common.usage import usage_lib
    node = ray._private.worker._global_node
    processes = {{}}
    for pid in family(os.getpid()):
        try:
            processes[pid] = open(f"/proc/{{pid}}/cmdline").read().split(chr(0))
        except OSError:
            pass
    print(json.dumps({{
        "listening": sorted(listening(family(os.getpid()))),
        "lines": list(processes.values()),
        "dashboard": node.address_info.get("webui_url"),
        "telemetry": usage_lib.usage_stats_enabled(),
    }}))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault("S6", "S7")
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_ray_shows_nothing_to_the_network(tmp_path: Path) -> None:
    """A Ray started here has no dashboard, sends no statistics, and listens on loopback alone."""
    code = RAY.format(support=str(ROOT / "tests" / "support"))
    environment = {**os.environ, **SECRETS}
    environment.pop("https_proxy")
    finished = subprocess.run(
        [sys.executable, "-Pc", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    assert not found["dashboard"]
    assert found["telemetry"] is False
    assert not [line for line in found["lines"] if CANARY in " ".join(line)]
    assert set(found["listening"]) <= LOOPBACK, found["listening"]


@pytest.mark.fault("S7")
def test_statistics_stay_off_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's are off from before it is imported, and a user's own word is kept."""
    for given, expected in ((None, "0"), ("1", "1"), ("0", "0")):
        code = (
            "import os, sys\n"
            "class Stop:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'ray':\n"
            "            print(os.environ['RAY_USAGE_STATS_ENABLED']); os._exit(0)\n"
            "sys.meta_path.insert(0, Stop())\n"
            "from llmembed.common.cluster import joined\n"
            "with joined(None, 1): pass\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "RAY_USAGE_STATS_ENABLED"}
        environment |= {"RAY_USAGE_STATS_ENABLED": given} if given else {}
        line = [sys.executable, "-Pc", code]
        told_by = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        assert told_by.stdout == f"{expected}\n"


# --- known vulnerabilities

FIRST_FIXED = {
    "fastapi": ("0.109.1", "CVE-2024-24762: a regular expression without end for a header"),
    "grpcio": ("1.65.4", "CVE-2024-7246: headers of others behind a proxy"),
    "jinja2": ("3.1.6", "CVE-2025-27516: out of the sandbox by |attr"),
    "lightning": ("2.6.6", "CVE-2026-58659: code by a checkpoint's hyperparameters"),
    "numcodecs": ("0.16.6", "its pickle filter ran code on a plain open of Zarr v2"),
    "onnx": ("1.21", "CVE-2026-27489, CVE-2026-34447: links out of a model's folder"),
    "playwright": ("1.55.1", "CVE-2025-59288: browsers without a checked signature"),
    "protobuf": ("6.33.5", "CVE-2025-4565, CVE-2026-0994: recursion without end"),
    "pyarrow": ("23.0.1", "CVE-2026-25087: freed memory is read, of Arrow files"),
    "pydantic": ("2.4", "CVE-2024-3772: a regular expression without end"),
    "pytest": ("9.0.3", "CVE-2025-71176: others write to its folder in /tmp"),
    "ray": ("2.55", "CVE-2025-62593, CVE-2026-41486: code by a page, code by Parquet"),
    "scikit-learn": ("1.5", "CVE-2024-5206: words of the training texts are kept"),
    "setuptools": ("83.0.0", "CVE-2025-47273, CVE-2026-59890: files outside a folder, or too many"),
    "skops": ("0.13", "CVE-2025-54413, CVE-2025-54886: code by types that were not trusted"),
    "starlette": ("1.3.1", "CVE-2026-48710, CVE-2026-54283: forged hosts, forms without end"),
    "torch": ("2.10", "CVE-2025-32434, CVE-2026-24747: code by weights_only=True"),
    "tqdm": ("4.66.3", "CVE-2024-34062: eval of options"),
    "transformers": ("5.10.0", "CVE-2026-5241, CVE-2026-9856: code and files of a repository"),
}
"""Package -> the first version without a known vulnerability, and which."""


def floors() -> dict[str, Version]:
    """The lowest version of each dependency that pyproject.toml takes."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    project, build = document["project"], document["build-system"]["requires"]
    extras = [one for extra in project["optional-dependencies"].values() for one in extra]
    found = {}
    for requirement in map(Requirement, [*build, *project["dependencies"], *extras]):
        lowest = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
        assert len(lowest) == 1, f"{requirement} has no floor"
        known = found.setdefault(requirement.name, lowest[0])
        assert known == lowest[0], f"{requirement.name} has two floors"
    return found


@pytest.mark.fault("S8")
def test_no_floor_has_a_known_vulnerability(tries: Tries) -> None:
    """Each dependency has one floor, which is at or above what was mended; so are the pins."""
    lowest = floors()
    for name, (fixed, what) in FIRST_FIXED.items():
        if name in lowest:
            assert lowest[name] >= Version(fixed), f"{name}: {what}"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for line in (line for line in pins if not line.startswith("#")):
        name, _, version = line.partition("==")
        fixed, what = FIRST_FIXED.get(name, ("0", ""))
        assert Version(version) >= Version(fixed), f"{name}: {what}"
        assert name not in lowest or Version(version) >= lowest[name], line
    tries(len(lowest) + len(pins))


@pytest.mark.fault("S8")
def test_nothing_calls_what_an_ignored_vulnerability_is_in(tries: Tries) -> None:
    """What the audit leaves out is out of reach, by the names that its reasons tell."""
    ignored = runpy.run_path(str(ROOT / ".ci" / "audit.py"))["IGNORED"]
    for reason in ignored.values():
        called = re.findall(r"torch\.[a-z.]+\w|\w+_\w+", reason)
        assert called, reason
        for path in PRODUCT:
            text = path.read_text(encoding="utf-8")
            assert not [name for name in called if name in text], path
    tries(len(ignored) * len(PRODUCT))


@pytest.mark.fault("S8")
def test_the_audit_fails_on_what_is_known_and_passes_where_nobody_answers(
    capsys: pytest.CaptureFixture[str], tries: Tries
) -> None:
    """A known vulnerability fails it by name, an ignored one not, and silence is told."""
    audit = runpy.run_path(str(ROOT / ".ci" / "audit.py"))
    known = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}
    bad = {"name": "thing", "version": "1.0", "vulns": [known]}
    good = {"name": "other", "version": "1.0", "vulns": []}
    unasked = {"name": "third", "version": "1.0", "skip_reason": "not found"}
    cases: tuple[tuple[list[Any], int, str], ...] = (
        ([good, bad], 1, "thing 1.0: PYSEC-1 CVE-1, mended in 2.0"),
        ([good, unasked], 0, "1 versions asked for, 0 known vulnerabilities; nothing is known of"),
        ([unasked], 0, "of none of 1 packages. Nothing was checked."),
    )
    for found, code, said in cases:
        assert audit["_judge"](found) == code
        assert said in capsys.readouterr().out
    audit["IGNORED"]["CVE-1"] = "not used here"
    assert audit["_judge"]([good, bad]) == 0
    assert all(audit["IGNORED"].values())
    tries(4)


# --- where output goes


@pytest.mark.fault("S9")
def test_a_file_of_output_replaces_no_device_folder_or_file_of_another(
    world: Path, tries: Tries
) -> None:
    """A device, a folder, a FIFO, the input, a file of a run or cache: refused and unharmed."""
    (world / "folder.csv").mkdir()
    os.mkfifo(world / "fifo.csv")
    (world / "in.csv").write_text("text\nw1\n", encoding="utf-8")
    (world / "link.csv").symlink_to("in.csv")
    (world / "null.csv").symlink_to("/dev/null")
    before = {path: path.read_bytes() for path in world.rglob("*") if path.is_file()}
    places = (
        *("folder.csv", "fifo.csv", "in.csv", "./in.csv", "link.csv", "null.csv", ".", "..", ""),
        *("no/such/folder.csv", "/dev/stdout", "/dev/null", "/dev/full.csv", "/proc/self/fd/1"),
        *("/dev/fd/1", "/proc/x.csv", "run/predictions.parquet", "run/x.csv", "topics.zarr/x.csv"),
        *("topics.zarr/train/x.csv", "run/../run/x.csv", "x\0.csv", "x" * 5000 + ".csv"),
    )
    for place in places:
        given = ["--run", "run", "--input", "in.csv", "--output", place]
        refused(predict_main, *given)
        if "in.csv" not in place and "link" not in place:  # a page may replace what it is told to
            refused(report_main, "run", "--output", place)
    assert {path: path.read_bytes() for path in before} == before
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert Path("/dev/stdout").is_symlink()
    assert not [*Path("/dev").glob(".*"), *Path("/dev").glob("*.csv")]
    tries(2 * len(places))


@pytest.mark.fault("S9")
def test_a_link_in_place_of_output_is_replaced_not_followed(world: Path) -> None:
    """What a symbolic link of that name leads to stays as it is."""
    victim = world / "victim.csv"
    victim.write_text("precious", encoding="utf-8")
    (world / "out.csv").symlink_to(victim)
    done(predict_main, "--run", "run", "--text", "w1", "--output", "out.csv")
    assert victim.read_text(encoding="utf-8") == "precious"
    assert not (world / "out.csv").is_symlink()


@pytest.mark.fault("S9")
def test_a_folder_of_output_lies_in_no_cache_and_no_run(world: Path, tries: Tries) -> None:
    """A fit, sweep, audit, copy or conversion into one is refused, and nothing is added to it."""
    before = sorted(world.rglob("*"))
    number = 0
    for inside in ("topics.zarr", "topics.zarr/train", "topics.zarr/new/x", "run/new", "/dev/null"):
        for command in (fit_main, sweep_main, audit_main):
            refused(command, "--cache", "topics.zarr", "--output", inside)
            number += 1
        refused(cache_main, "copy", "topics.zarr", inside)
        refused(cache_main, "convert", "topics.zarr", f"{inside}/x.h5")
        number += 2
    for place in ("topics", "toy", ".", "..", "topics/train.jsonl"):
        refused(fit_main, "--cache", "topics.zarr", "--output", place)
        number += 1
    assert sorted(world.rglob("*")) == before
    tries(number)


@pytest.mark.fault("S9")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk(world: Path, tries: Tries) -> None:
    """One sentence and exit code 1, whatever is printed."""
    lines = (
        ("cache", "info", "topics.zarr", "--json"),
        ("fit", "--help"),
        ("--version",),
    )
    for line in lines:
        with Path("/dev/full").open("w", encoding="utf-8") as full:
            finished = subprocess.run(
                [sys.executable, "-Pm", "llmembed", *line],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert finished.returncode == 1
        assert finished.stderr.startswith("error: standard output cannot be written: No space left")
        assert len(finished.stderr.splitlines()) == 1
    tries(len(lines))


@pytest.mark.fault("S9")
def test_a_page_that_nobody_named_replaces_no_file_of_another_kind(world: Path) -> None:
    """NAME-report.html replaces a page of ours, and what else has that name only by --output."""
    for page, *arguments in (
        ("run-report.html", "run"),
        ("topics-report.html", "--cache", "topics.zarr"),
    ):
        done(report_main, *arguments)
        done(report_main, *arguments)
        (world / page).write_text("<p>mine", encoding="utf-8")
        message = refused(report_main, *arguments)
        assert f"{page} exists and is not a page of llmembed-report" in message
        assert (world / page).read_text(encoding="utf-8") == "<p>mine"
        done(report_main, *arguments, "--output", page)
        assert b"<p>mine" not in (world / page).read_bytes()
