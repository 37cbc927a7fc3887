"""Runs of several processes and machines: what is lost is done by others, or named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from faulty_proxy import faulty_proxy
from little_memory import MIB, only
from sabotaged import (
    POISON,
    before_first_record,
    fatal_to_worker,
    in_processes,
    in_workers,
    two_units,
)
from toy_cache import as_options, tree

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.cache_format.cli import main as cache_main
from llmembed.cache_format.layout.commits import Record
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import finalize
from llmembed.cache_format.writing.blocks import commit
from llmembed.common.errors import (
    CacheIncompleteError,
    CacheMismatchError,
    ExtractionError,
    LLMEmbedWarning,
    ModelError,
    RowError,
)
from llmembed.extract import ExtractConfig, Extractor, extract
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.cli import main
from llmembed.extract.features.recheck import recheck

GOING_ON = r"row 128 is poison\. Going on with the other blocks of rows\."
NAMED = r"row 128 is poison\. All other blocks of rows are done\."
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")


def on_cluster(test: Any) -> Any:
    """Mark a test that starts machines of Ray."""
    # Ray Data sets deprecated fields of its own context.
    deprecated = "ignore:.*is deprecated:DeprecationWarning"
    for mark in (pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings(deprecated)):
        test = mark(test)
    return test


@pytest.fixture
def on_two(settings: dict[str, Any], tmp_path: Path) -> ExtractConfig:
    """The extraction by two processes on the CPU."""
    cache = str(tmp_path / "shared.zarr")
    return ExtractConfig(**settings, cache=cache, device="cpu", devices="2")


@pytest.fixture(scope="module")
def s3(s3_endpoint: str) -> Iterator[tuple[str, Any]]:
    """A store that answers 503 to a fifth of all requests and loses a tenth of its answers."""
    with (
        faulty_proxy(s3_endpoint, busy=0.2, lost=0.1) as (endpoint, proxy),
        pytest.MonkeyPatch.context() as patch,
    ):
        options = {"endpoint_url": endpoint, "key": "testing", "secret": "testing"}
        patch.setitem(fsspec.config.conf, "s3", options)
        for name, value in options.items():  # workers read these
            patch.setenv(f"FSSPEC_S3_{name.upper()}", value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket", proxy


@pytest.fixture(scope="module")
def cluster(s3: object) -> Iterator[Any]:
    """Ray on three machines, and a head that only the driver uses."""
    import ray
    from ray.cluster_utils import Cluster

    small = {"include_dashboard": False, "object_store_memory": 2**27}
    with pytest.MonkeyPatch.context() as patch:
        # Ray gives its workers the lowest priority, which on a busy machine costs minutes.
        patch.setenv("RAY_worker_niceness", "0")
        found = Cluster(initialize_head=True, connect=True, head_node_args=small | {"num_cpus": 0})
        for _ in range(3):
            found.add_node(num_cpus=1, wait=False, **small)
        found.wait_for_nodes()
        yield found
        ray.shutdown()
        found.shutdown()


@pytest.fixture
def on_ray(settings: dict[str, Any], tmp_path: Path, cluster: object) -> ExtractConfig:
    """The extraction by two workers of Ray."""
    return ExtractConfig(**settings, cache=str(tmp_path / "ray.zarr"), engine="ray", workers=2)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Row 128 has no feature until this is undone."""
    monkeypatch.setattr(Extractor, "launch", Extractor.launch)
    exec(POISON, {})  # noqa: S102
    return monkeypatch


def ranks(settings: dict[str, Any], cache: Path, numbers: list[int], world: int) -> Any:
    """Run ranks in this process, one after the other."""
    for rank in numbers:
        result = extract(ExtractConfig(**settings, cache=str(cache), rank=rank, world=world))
    return result


@pytest.mark.fault("26")
def test_ranks_of_another_number_do_the_rest(
    settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """What one rank of two left is done by three; until then finalize says what is missing."""
    cache = tmp_path / "shared.zarr"
    ranks(settings, cache, [1], world=2)
    with pytest.raises(CacheIncompleteError, match=r"lacks 172 rows of .*Run the ranks again"):
        finalize(cache)
    assert ranks(settings, cache, [2, 1, 0, 0], world=3).n_rows_computed == 0
    finalize(cache)
    assert tree(cache) == whole


@pytest.mark.fault("26")
def test_any_number_of_ranks_makes_the_same_bytes(
    settings: dict[str, Any],
    whole: dict[str, bytes],
    tmp_path: Path,
    tries: Callable[[int], None],
) -> None:
    """What one rank of a world did not do is done by those of any other world."""
    for first, then in ((2, 1), (3, 9)):
        cache = tmp_path / f"{first}-{then}.zarr"
        ranks(settings, cache, [first - 1], world=first)
        ranks(settings, cache, list(reversed(range(then))), world=then)
        finalize(cache)
        assert tree(cache) == whole
    tries(2)


@pytest.mark.slow
@pytest.mark.fault("18")
def test_an_end_of_all_workers_is_no_hang(on_two: ExtractConfig, whole: dict[str, bytes]) -> None:
    """Where each process that has a block ends, the command does, too; the next one does all."""
    die = (
        "import os\n"
        "from llmembed.cache_format.writing import blocks\n"
        "blocks.commit = lambda *_: os._exit(3)"
    )
    with (
        in_processes(die),
        pytest.warns(LLMEmbedWarning, match="ended"),
        pytest.raises(ExtractionError, match=r"rows .* ended"),
    ):
        extract(on_two)
    assert extract(dataclasses.replace(on_two, devices=None)).n_rows_computed == 300
    assert tree(Path(on_two.cache or "")) == whole


@pytest.mark.fault("18")
@pytest.mark.slow
def test_all_killed_are_started_again(
    on_two: ExtractConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Where none is left to do the rest, new ones are started."""
    once = (
        "import os, pathlib\n"
        "from llmembed.cache_format.writing import blocks\n"
        "commit = blocks.commit\n"
        "def last(*arguments):\n"
        "    commit(*arguments)\n"
        f"    if len(os.listdir({str(tmp_path / 'ended')!r})) < 2:\n"
        f"        pathlib.Path({str(tmp_path / 'ended')!r}, str(os.getpid())).touch()\n"
        "        os._exit(3)\n"
        "blocks.commit = last"
    )
    (tmp_path / "ended").mkdir()
    with in_processes(once):
        result = extract(on_two)
    assert len(list((tmp_path / "ended").iterdir())) == 2
    assert tree(Path(result.path)) == whole


@pytest.mark.fault("18", "1")
@pytest.mark.slow
def test_what_a_killed_process_had_is_done_by_the_other(
    on_two: ExtractConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL before a record: one warning, and all rows are right."""
    kill = before_first_record(tmp_path / "marker", "os.kill(os.getpid(), signal.SIGKILL)")
    with in_processes(kill), pytest.warns(LLMEmbedWarning, match="killed by SIGKILL") as told:
        result = extract(on_two)
    assert len(told) == 1
    assert (tmp_path / "marker").exists()
    assert tree(Path(result.path)) == whole


def extractor(folder: Path) -> Extractor:
    recipe = Recipe(model=str(folder), max_length=60, compute_dtype="float32", dtype="float32")
    return Extractor(recipe, layers=[1, 2], poolings=["mean"], token_budget=1 << 20, device="cpu")


@LINUX
@pytest.mark.fault("20")
def test_too_large_a_budget_is_halved_until_it_fits(llama: Path) -> None:
    """Memory runs out, one warning says so, and all features are those of the undisturbed run."""
    ours = extractor(llama)
    token_ids = np.random.default_rng(0).integers(5, 90, size=(2000, 60)).tolist()
    with only(12 * MIB), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        features = ours.compute(token_ids)
    messages = [str(w.message) for w in caught if w.category is LLMEmbedWarning]
    assert len(messages) == 1
    assert "tokens a batch do not fit in the memory of cpu: going on with" in messages[0]
    assert ours.token_budget < 1 << 16
    expected = extractor(llama).compute(token_ids)
    for name, feature in features.items():
        error = np.linalg.norm(feature - expected[name], axis=1)
        assert (error <= 1e-5 * np.linalg.norm(expected[name], axis=1)).all()


@LINUX
@pytest.mark.fault("20")
def test_a_text_that_does_not_fit_alone_is_named(llama: Path) -> None:
    """A single text without room ends the run with its row and its length."""
    ours = extractor(llama)
    ours.features(["w1"])
    token_ids = [[7] * 2_000_000]
    with only(MIB // 4), pytest.raises(ExtractionError, match="text 0: its 2,000,000 tokens alone"):
        ours.compute(token_ids)


@pytest.mark.fault("21")
def test_the_rest_is_done_and_the_next_run_does_the_row(
    settings: dict[str, Any],
    whole: dict[str, bytes],
    tmp_path: Path,
    poison: pytest.MonkeyPatch,
) -> None:
    """One process goes on behind a poison row; once it is cured, only its block is computed."""
    config = ExtractConfig(**settings, cache=str(tmp_path / "here.zarr"))
    with pytest.warns(LLMEmbedWarning, match=GOING_ON), pytest.raises(RowError, match=NAMED):
        extract(config)
    poison.undo()
    assert extract(config).n_rows_computed == 64
    assert tree(tmp_path / "here.zarr") == whole


@pytest.mark.fault("21")
def test_rows_left_are_exit_4(
    settings: dict[str, Any], tmp_path: Path, poison: pytest.MonkeyPatch
) -> None:
    """A script can tell a run that is done but for some rows from one that failed."""
    options = as_options(settings)
    result = CliRunner().invoke(main, [*options, "--cache", str(tmp_path / "c.zarr"), "--quiet"])
    assert (result.exit_code, result.stdout) == (4, "")
    warning, error = result.stderr.splitlines()
    assert re.fullmatch(f"warning: split 'train', {GOING_ON}", warning)
    assert re.match(f"error: split 'train', {NAMED}", error)


@pytest.mark.fault("23")
def test_a_lost_acknowledgement_is_no_conflict() -> None:
    """A put that was told "exists" for its own bytes counts; other bytes are refused."""
    url = f"memory://{uuid.uuid4().hex}/toy.zarr"
    arrays = {"n_tokens": "0" * 32}
    record = Record(split="train", source="s", start=0, stop=9, texts="", arrays=arrays)
    other = dataclasses.replace(record, arrays={"n_tokens": "1" * 32})
    for _ in range(2):
        commit(open_store(url), record, block_rows=64)
    with pytest.raises(CacheMismatchError, match="committed by another writer"):
        commit(open_store(url), other, block_rows=64)


def stored(settings: dict[str, Any], place: Path, noise: float) -> str:
    """Write a cache as if another device had computed it, whose rounding is that much."""
    whole = open_cache(extract(ExtractConfig(**settings, cache=f"{place}-own.zarr")).path)
    split, generator = whole["train"], np.random.default_rng(0)
    with CacheWriter(place, dataset=whole.dataset) as writer:
        for source in whole.sources.values():
            writer.add_source(source)
        writer.add_split("train", labels=split.labels, text_hash=split.text_hash)
        plan = writer.plan("train", "toy-llama", arrays=[("mean", 1)])
        features = split.features(1).astype(np.float32)
        features *= 1 + noise * generator.standard_normal(features.shape).astype(np.float32)
        for block in plan.blocks:
            rows = slice(block.start, block.stop)
            arrays = {("mean", 1): features[rows]}
            writer.write(plan, block, n_tokens=split.n_tokens()[rows], features=arrays)
        writer.finish("train", "toy-llama")
    return str(place)


@pytest.mark.fault("29")
def test_what_devices_round_differently_is_told_from_what_is_wrong(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """The cache records its arithmetic; a difference beyond the stated tolerance is named."""
    near = stored(settings, tmp_path / "near.zarr", 1e-4)
    recipe = open_cache(near).sources["toy-llama"].recipe
    assert {"compute_dtype", "attention", "torch", "transformers"} <= recipe.keys()
    assert recheck(near, model=settings["model"], n_rows=20).differences == ()
    far = stored(settings, tmp_path / "far.zarr", 3e-2)
    (found,) = recheck(far, model=settings["model"]).differences  # of the command's own rows
    assert found.difference > found.tolerance > 0
    command = ["verify", far, "--model", settings["model"]]
    result = CliRunner().invoke(cache_main, command)
    assert result.exit_code == 1
    named = f"row {found.row} by {found.difference:.2g} (relative); rounding explains"
    assert f"{named} {found.tolerance:.2g}" in result.output


@pytest.mark.fault("30")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("errors.ModelError('no such weights.')", ModelError, "^no such weights.$"),
        ("SystemExit(7)", ExtractionError, "ended, with exit code 7. None could load the backbone"),
    ],
)
def test_what_keeps_processes_from_beginning_is_said(
    on_two: ExtractConfig, error: str, kind: type[Exception], message: str
) -> None:
    """A known error is raised as if it were this process's; nothing was written."""
    code = (
        "from llmembed.common import errors\n"
        "from llmembed.extract.engines.task import Task\n"
        "def load_extractor(*_, **__):\n"
        f"    raise {error}\n"
        "Task.load_extractor = load_extractor"
    )
    with in_processes(code), pytest.raises(kind, match=message):
        extract(on_two)
    assert not Path(on_two.cache or "").exists()


@pytest.mark.slow
@pytest.mark.fault("30", "18")
@pytest.mark.filterwarnings("ignore:a process ended, with exit code 5. The others go on")
def test_an_exit_in_the_midst_of_a_unit_is_reported(on_two: ExtractConfig) -> None:
    """`sys.exit` where rows are computed is named with these rows; every other row is done."""
    leave = (
        "import sys\n"
        "from llmembed.extract.features.extractor import Extractor\n"
        "launch = Extractor.launch\n"
        "def left(self, planned, on_batch, describe_row):\n"
        "    if describe_row(0).endswith('row 128'):\n"
        "        sys.exit(5)\n"
        "    return launch(self, planned, on_batch, describe_row)\n"
        "Extractor.launch = left"
    )
    named = r"rows 128-192 of split 'train': a process that did them ended, with exit code 5\."
    with (
        in_processes(leave),
        pytest.warns(LLMEmbedWarning, match=named),
        pytest.raises(RowError, match=named),
    ):
        extract(on_two)
    assert extract(dataclasses.replace(on_two, devices=None)).n_rows_computed == 64


@on_cluster
@pytest.mark.fault("19")
def test_a_lost_machine_is_not_needed(
    on_ray: ExtractConfig, whole: dict[str, bytes], cluster: Any, tmp_path: Path
) -> None:
    """Of three machines one is lost in the middle of a unit and not replaced: the others do it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = before_first_record(
        tmp_path / "marker",
        "import ray, threading\n"
        f"    pathlib.Path({str(pipe)!r}).write_text(ray.get_runtime_context().get_node_id())\n"
        "    threading.Event().wait()",
    )
    with in_workers(code), ThreadPoolExecutor(1) as thread:
        extraction = thread.submit(extract, on_ray)
        lost = pipe.read_text()
        (node,) = (node for node in cluster.worker_nodes if node.node_id == lost)
        cluster.remove_node(node, allow_graceful=False)
        result = extraction.result()
    assert result.n_rows_computed == 300
    assert tree(Path(result.path)) == whole


@on_cluster
@pytest.mark.fault("26", "11")
def test_a_killed_driver_is_started_again_with_more_workers(
    on_ray: ExtractConfig, whole: dict[str, bytes], settings: dict[str, Any], cluster: Any
) -> None:
    """SIGKILL of the command after its first receipt: the next one does what is left, with two."""
    program = (
        "import os, signal\n"
        "from llmembed.extract import cli, pipeline\n"
        "pipeline.Progress.advance = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cli.main()"
    )
    options = settings | {"cache": on_ray.cache, "engine": "ray", "address": cluster.address}
    line = as_options(options)
    killed = subprocess.run([sys.executable, "-c", program, *line], check=False)
    assert killed.returncode == -signal.SIGKILL
    result = extract(on_ray)
    assert 0 < result.n_rows_computed <= 300 - 64
    assert tree(Path(result.path)) == whole


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault("12")
def test_a_driver_that_is_told_to_stop_says_so(
    settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGTERM after the first receipt: the exit code is 75, as without Ray, and a resume completes.

    Where it is started here, Ray has a way of its own to end a process on SIGTERM, with 1.
    """
    program = (
        "import os, signal\n"
        "from llmembed.extract import cli, pipeline\n"
        "pipeline.Progress.advance = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "cli.main()"
    )
    options = settings | {"cache": str(tmp_path / "toy.zarr")}
    line = [sys.executable, "-c", program, *as_options(options | {"engine": "ray"})]
    told = subprocess.run(line, check=False, capture_output=True, text=True)
    assert told.returncode == 75, told.stderr
    assert "interrupted. Committed blocks are safe" in told.stderr
    assert tree(Path(extract(ExtractConfig(**options)).path)) == whole


@on_cluster
@pytest.mark.fault("22", "23")
def test_a_store_that_fails_now_and_then_loses_nothing(
    on_ray: ExtractConfig, whole: dict[str, bytes], s3: tuple[str, Any]
) -> None:
    """With 503s and lost answers, an object store ends up with the bytes of the local cache."""
    url, proxy = s3
    result = extract(dataclasses.replace(on_ray, cache=f"{url}/ray.zarr"))
    assert min(proxy.counts[fate] for fate in ("busy", "lost", "fine")) > 10
    assert result.n_rows_computed == 300
    store = open_store(result.path)
    assert {key: store.get(key) for key in store.walk()} == whole


@on_cluster
@pytest.mark.fault("18")
def test_rows_that_end_their_worker_are_named(on_ray: ExtractConfig) -> None:
    """A unit that ends every worker is given up and named; every other unit is done."""
    named = r"rows 0-192 of split 'train': they ended their worker each time"
    with (
        two_units(),
        in_workers(fatal_to_worker(0)),
        pytest.warns(LLMEmbedWarning, match=named),
        pytest.raises(RowError, match=named),
    ):
        extract(dataclasses.replace(on_ray, workers=1))
    assert extract(dataclasses.replace(on_ray, engine="local", workers=1)).n_rows_computed == 192


@on_cluster
@pytest.mark.fault("30")
def test_an_exit_in_a_worker_of_ray_is_reported(on_ray: ExtractConfig) -> None:
    """`sys.exit` in a unit ends its worker each time: the unit is named, every other one done."""
    leave = fatal_to_worker(0).replace("os._exit(1)", "__import__('sys').exit(5)")
    named = r"rows 0-192 of split 'train': they ended their worker each time"
    with (
        two_units(),
        in_workers(leave),
        pytest.warns(LLMEmbedWarning, match=named),
        pytest.raises(RowError, match=named),
    ):
        extract(dataclasses.replace(on_ray, workers=1))
    assert extract(dataclasses.replace(on_ray, engine="local", workers=1)).n_rows_computed == 192


@on_cluster
@pytest.mark.fault("37")
def test_a_ray_without_a_cpu_is_refused_before_anything_is_written(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Its own tasks would wait for ever; of a cluster that may grow it is said."""
    cache = tmp_path / "none.zarr"
    program = (
        "import json, sys, warnings, ray\n"
        "from llmembed.common.cluster import joined\n"
        "from llmembed.common.errors import ConfigError\n"
        "from llmembed.extract import ExtractConfig, extract\n"
        "settings = json.loads(sys.argv[1])\n"
        "settings['pooling'] = tuple(settings['pooling'])\n"
        "ray.init('local', num_cpus=0, include_dashboard=False, log_to_driver=False)\n"
        "try:\n"
        "    extract(ExtractConfig(**settings))\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
        "with warnings.catch_warnings(record=True) as caught, joined('head:1', 1):\n"
        "    print(caught[0].message)\n"
    )
    given = json.dumps(settings | {"cache": str(cache), "engine": "ray"})
    done = subprocess.run(
        [sys.executable, "-Pc", program, given], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lack = "no machine of Ray has a CPU, and each worker takes one"
    assert done.stdout.splitlines()[-2:] == [
        f"{lack}. Start Ray with `--num-cpus 1` or more, or join another one.",
        f"{lack}: waiting for one.",
    ]
    assert not cache.exists()


@on_cluster
@pytest.mark.fault("19")
@pytest.mark.usefixtures("cluster")
def test_a_ray_of_others_on_this_machine_is_left_alone() -> None:
    """Without an address a Ray is started, also where one runs that was not asked for."""
    program = (
        "import ray\n"
        "from llmembed.common.cluster import joined\n"
        "with joined(None, 1):\n"
        "    print(len(ray.nodes()), ray.cluster_resources()['CPU'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-Pc", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 2.0"
