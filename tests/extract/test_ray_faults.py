"""Extraction on Ray where machines, drivers and stores fail: every row right, none done twice."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import ray
from faulty_proxy import faulty_proxy
from sabotaged import before_first_record, fatal_to_worker, in_workers, two_units
from toy_cache import as_options, tree

from llmembed.cache_format.stores import open_store
from llmembed.common.errors import ConfigError, LLMEmbedWarning, RowError
from llmembed.extract import ExtractConfig, extract

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray Data sets deprecated fields of its own context.
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[str, Any]]:
    """A store that answers 503 to a fifth of all requests and loses a tenth of its answers."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with (
        faulty_proxy(f"http://{host}:{port}", busy=0.2, lost=0.1) as (endpoint, proxy),
        pytest.MonkeyPatch.context() as patch,
    ):
        options = {"endpoint_url": endpoint, "key": "testing", "secret": "testing"}
        patch.setitem(fsspec.config.conf, "s3", options)
        for name, value in options.items():  # workers read these
            patch.setenv(f"FSSPEC_S3_{name.upper()}", value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket", proxy
    server.stop()


@pytest.fixture(scope="module")
def cluster(s3: object) -> Iterator[Any]:
    """Ray on three machines, and a head that only the driver uses."""
    from ray.cluster_utils import Cluster

    small = {"include_dashboard": False, "object_store_memory": 2**27}
    found = Cluster(initialize_head=True, connect=True, head_node_args=small | {"num_cpus": 0})
    for _ in range(3):
        found.add_node(num_cpus=1, wait=False, **small)
    found.wait_for_nodes()
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def on_ray(settings: dict[str, Any], tmp_path: Path, cluster: object) -> ExtractConfig:
    """The extraction by two workers."""
    return ExtractConfig(**settings, cache=str(tmp_path / "ray.zarr"), engine="ray", workers=2)


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


def test_a_store_that_fails_now_and_then_loses_nothing(
    on_ray: ExtractConfig, whole: dict[str, bytes], s3: tuple[str, Any]
) -> None:
    """With 503s and lost answers, an object store ends up with the bytes of the local cache."""
    url, proxy = s3
    result = extract(dataclasses.replace(on_ray, cache=f"{url}/ray.zarr"))
    assert min(proxy.counts.values()) > 10
    assert result.n_rows_computed == 300
    store = open_store(result.path)
    assert {key: store.get(key) for key in store.walk()} == whole


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


def test_the_arithmetic_of_gpus_is_not_chosen_without_one(on_ray: ExtractConfig) -> None:
    """A driver that sees no GPU does not decide what workers with GPUs compute in."""
    config = dataclasses.replace(on_ray, compute_dtype="auto", gpus_per_worker=1.0)
    with pytest.raises(ConfigError, match=r"but the workers have. Pass --compute-dtype"):
        extract(config)
