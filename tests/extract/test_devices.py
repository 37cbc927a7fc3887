"""Several processes of one command share the devices of this machine: `--devices`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sabotaged import POISON, before_first_record, fatal_to_worker, in_processes
from toy_cache import as_options, tree

from llmembed.common.errors import (
    CacheSpaceError,
    ConfigError,
    DataError,
    ExtractionError,
    LLMEmbedError,
    LLMEmbedWarning,
    RowError,
)
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.engines.devices import _at_most, _refuse_known, device_groups


@pytest.fixture
def on_two(settings: dict[str, Any], tmp_path: Path) -> ExtractConfig:
    """The extraction by two processes on the CPU."""
    cache = str(tmp_path / "shared.zarr")
    return ExtractConfig(**settings, cache=cache, device="cpu", devices="2")


def at_work(pipe: Path) -> str:
    """Make code that tells of each process that it computes, and then computes no further.

    The pipe stays open while one of them lives.
    """
    return f"""
import os, threading
from llmembed.extract.features.extractor import Extractor
def launch(*_):
    os.write(os.open({str(pipe)!r}, os.O_WRONLY), b"x")
    threading.Event().wait()
Extractor.launch = launch
"""


@contextmanager
def started(config: ExtractConfig, pipe: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start the command; when both of its processes compute, give it and the pipe's end."""
    os.mkfifo(pipe)
    program = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's job ignores it
        "from llmembed.extract import cli\n"
        "from llmembed.extract.engines import devices\n"
        f"devices._PROGRAM = {at_work(pipe)!r} + devices._PROGRAM\n"
        "cli.main()"
    )
    given = {name: value for name, value in vars(config).items() if value is not None}
    names = ("model", "layers", "dataset", "cache", "max_length", "compute_dtype", "token_budget")
    names += ("device", "devices", "pooling")
    line = as_options({name: given[name] for name in names})
    command = subprocess.Popen(
        [sys.executable, "-c", program, *line],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with command:
        try:
            end = os.open(pipe, os.O_RDONLY)
            said = b""
            while len(said) < 2:
                said += os.read(end, 1)
            yield command, end
            os.close(end)
        finally:
            command.kill()


def test_two_processes_make_the_cache_of_one(
    on_two: ExtractConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Both do a part, each with a share of the cores; the bytes and the counts are those of one."""
    told = (
        "import os\n"
        "from llmembed.cache_format.writing import blocks\n"
        "commit = blocks.commit\n"
        "def tell(*arguments):\n"
        f"    with open({str(tmp_path / 'threads')!r} + str(os.getpid()), 'w') as file:\n"
        "        file.write(os.environ['OMP_NUM_THREADS'])\n"
        "    commit(*arguments)\n"
        "blocks.commit = tell"
    )
    with warnings.catch_warnings(), in_processes(told):
        warnings.simplefilter("error")
        result = extract(on_two)
    assert tree(Path(result.path)) == whole
    assert (result.n_rows_computed, result.is_share) == (300, False)
    threads = [path.read_text() for path in tmp_path.glob("threads*")]
    assert threads == [str(max(1, torch.get_num_threads() // 2))] * 2
    assert extract(on_two).n_rows_computed == 0


@pytest.mark.slow
def test_a_failing_device_is_left_to_the_other(
    on_two: ExtractConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """What fails once in a process is done again, by one that did not see it fail."""
    fail = "raise RuntimeError('CUDA error: an illegal memory access was encountered')"
    with (
        in_processes(before_first_record(tmp_path / "marker", fail)),
        pytest.warns(LLMEmbedWarning, match="a process ended, with exit code 1. The others go on"),
    ):
        result = extract(on_two)
    assert tree(Path(result.path)) == whole


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a process ended, with exit code 1. The others go on")
def test_rows_that_end_their_process_are_named(on_two: ExtractConfig) -> None:
    """A unit that ends every process is given up and named; every other unit is done."""
    named = r"rows 128-192 of split 'train': a process that did them ended, with exit code 1\."
    with (
        in_processes(fatal_to_worker(128)),
        pytest.warns(LLMEmbedWarning, match=named),
        pytest.raises(RowError, match=named),
    ):
        extract(on_two)
    assert extract(ExtractConfig(**vars(on_two) | {"devices": None})).n_rows_computed == 64


@pytest.mark.slow
def test_a_poison_row_is_named_and_the_rest_is_done(on_two: ExtractConfig) -> None:
    """A row without a feature is named, once, by the words of a single process."""
    with (
        in_processes(POISON),
        pytest.warns(LLMEmbedWarning, match=r"row 128 is poison\. Going on") as told,
        pytest.raises(RowError, match=r"row 128 is poison\. All other blocks of rows are done\."),
    ):
        extract(on_two)
    assert len(told) == 1
    assert extract(ExtractConfig(**vars(on_two) | {"devices": None})).n_rows_computed == 64


@pytest.mark.slow
def test_processes_end_with_the_command(
    on_two: ExtractConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL of the command ends what it started, at work or not; the next one does the rest."""
    with started(on_two, tmp_path / "pipe") as (command, end):
        command.kill()
        assert os.read(end, 1) == b""  # both have ended, or this would wait
    assert extract(ExtractConfig(**vars(on_two) | {"devices": None})).n_rows_computed == 300
    assert tree(Path(on_two.cache or "")) == whole


@pytest.mark.slow
def test_ctrl_c_ends_all(on_two: ExtractConfig, tmp_path: Path) -> None:
    """The terminal interrupts the command and its processes: one sentence, 130, no lock left."""
    with started(on_two, tmp_path / "pipe") as (command, end):
        os.killpg(command.pid, signal.SIGINT)
        assert os.read(end, 1) == b""
        assert command.stderr is not None
        said = command.stderr.read().splitlines()
    assert command.returncode == 130
    assert said[-1].startswith("interrupted. Committed blocks are safe")
    assert not any("Traceback" in line for line in said)
    assert not (Path(on_two.cache or "") / ".llmembed/lock").exists()


@pytest.mark.slow
def test_each_process_sees_its_own_gpus(
    on_two: ExtractConfig,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of five GPUs that the command sees, four go in pairs, a model over each pair."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,1,5,0")
    on_cpu = (
        "import json, os, pathlib\n"
        "from llmembed.extract.engines.worker import Worker\n"
        "begin = Worker.__init__\n"
        "def on_cpu(self, job, on_batch):\n"
        "    job = json.loads(job)\n"
        "    seen = [os.environ['CUDA_VISIBLE_DEVICES'], job['placement']]\n"
        f"    path = pathlib.Path({str(tmp_path)!r}, f'seen{{os.getpid()}}')\n"
        "    path.write_text(json.dumps(seen))\n"
        "    job['placement'] |= {'device': 'cpu', 'all_gpus': False}\n"
        "    begin(self, json.dumps(job), on_batch)\n"
        "Worker.__init__ = on_cpu"
    )
    changes = {"device": "auto", "devices": "4", "gpus_per_worker": 2.0}
    with in_processes(on_cpu):
        result = extract(ExtractConfig(**vars(on_two) | changes))
    assert tree(Path(result.path)) == whole
    seen = sorted(json.loads(path.read_text()) for path in tmp_path.glob("seen*"))
    assert [group for group, _ in seen] == ["1,5", "7,3"]
    assert all((place["device"], place["all_gpus"]) == ("cuda", True) for _, place in seen)


@pytest.mark.parametrize(
    ("receipt", "raised"),
    [
        ({"kind": "DataError", "fatal": "", "reason": "no text."}, DataError("no text.")),
        ({"kind": "CacheSpaceError", "fatal": "full.", "reason": ""}, CacheSpaceError("full.")),
        ({"kind": "ImportError", "fatal": "no such.", "reason": ""}, ExtractionError("no such.")),
        ({"kind": "", "fatal": "", "reason": "RuntimeError: once"}, None),
    ],
)
def test_a_known_error_keeps_its_kind(
    receipt: dict[str, str], raised: LLMEmbedError | None
) -> None:
    """What the next process would meet as well ends the command, as it ends a single process."""
    if raised is None:
        _refuse_known(receipt)
        return
    with pytest.raises(LLMEmbedError) as caught:
        _refuse_known(receipt)
    assert (type(caught.value), str(caught.value)) == (type(raised), str(raised))


def test_rows_that_come_again_are_counted_once() -> None:
    """Progress never tells of more rows than there are."""
    told: list[tuple[int, int]] = []
    count = _at_most(10, lambda *done: told.append(done))
    for rows in (6, 3, 4, 5):
        count(rows, 7)
    assert told == [(6, 7), (3, 7), (1, 7), (0, 7)]


@pytest.mark.parametrize(
    ("n_gpus", "given", "groups"),
    [
        (0, (None, None, "auto"), ()),
        (0, ("all", None, "auto"), ()),
        (0, ("1", None, "auto"), ()),
        (0, ("all", None, "cpu"), ()),
        (0, ("3", None, "cpu"), ("", "", "")),
        (4, (None, None, "auto"), ()),
        (4, ("1", None, "auto"), ()),
        (1, ("all", None, "auto"), ()),
        (4, ("all", None, "auto"), ("0", "1", "2", "3")),
        (4, ("2", None, "cuda"), ("0", "1")),
        (4, ("all", 2.0, "auto"), ("0,1", "2,3")),
        (4, (None, 2.0, "auto"), ("0,1",)),
        (4, (None, 1.0, "auto"), ()),
    ],
)
def test_groups_of_devices(
    monkeypatch: pytest.MonkeyPatch,
    n_gpus: int,
    given: tuple[str | None, float | None, str],
    groups: tuple[str, ...],
) -> None:
    """One device or none needs no other process; else each has its GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_groups(*given) == groups


@pytest.mark.parametrize(
    ("n_gpus", "given", "message"),
    [
        (0, ("2", None, "auto"), "--devices is 2, but --device auto has 0 GPUs on this machine"),
        (2, ("3", None, "cuda"), "--devices is 3, but --device cuda has 2 GPUs"),
        (1, (None, 2.0, "auto"), "--gpus-per-worker is 2, but --device auto has 1 GPUs"),
        (0, (None, 1.0, "auto"), "--gpus-per-worker is 1, but --device auto has 0 GPUs"),
        (4, ("2", 2.0, "cpu"), "--gpus-per-worker is 2, but --device cpu has 0 GPUs"),
        (4, ("3", 2.0, "auto"), "3 devices cannot be shared out by --gpus-per-worker 2"),
        (4, ("2", None, "cuda:1"), "--device is cuda:1, but --devices .* Pass --device auto"),
    ],
)
def test_devices_that_are_not_there_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    n_gpus: int,
    given: tuple[str | None, float | None, str],
    message: str,
) -> None:
    """More than this machine has, or no whole number of groups."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    with pytest.raises(ConfigError, match=message):
        device_groups(*given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": "0"}, "--devices is '0'. Pass a number from 1 on, or all."),
        ({"devices": "many"}, "--devices is 'many'"),
        ({"devices": "2", "engine": "ray"}, "Pass either it or --engine ray, with --workers."),
        ({"devices": "2", "rank": 0, "world": 2}, "--devices shares out the devices of this"),
        ({"gpus_per_worker": 2.0, "rank": 0, "world": 2}, "--gpus-per-worker shares out the"),
        ({"gpus_per_worker": 0.5}, "--gpus-per-worker is 0.5; without --engine ray it is a whole"),
    ],
)
def test_devices_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    """A number from 1 on or all, without another way to share the work."""
    with pytest.raises(ConfigError, match=message):
        ExtractConfig(model="m", layers="1", **changes)
