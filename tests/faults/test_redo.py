"""What a process that failed had begun is done again: nothing committed is lost or wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import killed_writer
import pytest
from sabotaged import before_first_record, in_processes
from toy_cache import DATASET, SOURCE, Toy, assert_toy, count_right_rows, tree, write_toy
from toy_model import write_texts

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import finalize, verify
from llmembed.common.errors import CacheCorruptError, CacheMismatchError, LLMEmbedWarning
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.engines import devices

Tries = Callable[[int], None]
CHUNK = "train/tiny/mean/layer_008/c.1.0"

pytestmark = pytest.mark.usefixtures("own_home")
N_KILLS = int(os.environ.get("LLMEMBED_KILLS", "12"))
STAGES = ((200, "4,8"), (330, "4,8,12"))  # the data set grows, and a layer is added
N_OPERATIONS = 170  # of a stage, roughly: some draws let the writer finish


def run_killed(path: Path, stage: tuple[int, str], operation: int, log: Path) -> bool:
    """Run the writer until it dies or finishes; tell whether it finished."""
    n_rows, layers = stage
    command = [sys.executable, killed_writer.__file__, path, n_rows, layers, operation, log]
    process = subprocess.run([str(part) for part in command], check=False, capture_output=True)
    assert process.returncode in (0, -signal.SIGKILL), process.stderr.decode()
    return process.returncode == 0


@pytest.mark.fault("1", "2")
def test_kills_lose_nothing_committed(tmp_path: Path, tries: Tries) -> None:
    """No committed row is lost or wrong, at most a block is redone, the bytes end up the same."""
    rng = random.Random(N_KILLS)
    kills = runs = 0
    while kills < N_KILLS:
        path, log = tmp_path / f"killed-{runs}.zarr", tmp_path / f"log-{runs}"
        log.touch()
        seen = stage_kills = 0
        for stage in STAGES:
            while not run_killed(path, stage, rng.randrange(1, N_OPERATIONS), log):
                stage_kills += 1
                now = count_right_rows(path)
                assert now >= seen
                seen = now
        n_blocks = 4 + 6  # 200 rows; then blocks 0-5, of which 0-2 lack a layer
        assert len(log.read_text().split()) <= n_blocks + stage_kills
        kills, runs = kills + stage_kills, runs + 1
        assert_toy(open_cache(path), 330)
        assert verify(open_store(path)).damage == ()
        whole = tmp_path / f"whole-{runs}.zarr"
        write_toy(whole, 200)
        write_toy(whole, 330, layers=[4, 8, 12])
        assert tree(path) == tree(whole)
    tries(kills)


@pytest.mark.fault("2")
def test_leftovers_of_a_killed_writer_are_cleared(tmp_path: Path) -> None:
    """Temporary files are gone after the next run, and the lock of a dead process is taken."""
    path = tmp_path / "toy.zarr"
    assert not run_killed(path, STAGES[0], 60, tmp_path / "log")
    assert list((path / ".llmembed/tmp").iterdir())
    assert (path / ".llmembed/lock").exists()
    write_toy(path)
    assert not list((path / ".llmembed/tmp").iterdir())
    assert not (path / ".llmembed/lock").exists()


@pytest.mark.fault("9")
def test_a_record_without_its_chunk_is_redone(toy_path: Path) -> None:
    """After a power cut that lost a chunk, resuming redoes that block alone, with a warning."""
    before = tree(toy_path)
    (toy_path / CHUNK).unlink()
    plan = write_toy(toy_path)
    assert [block.start for block in plan.blocks] == [64]
    assert plan.blocks[0].missing == (("mean", 8),)
    assert_toy(open_cache(toy_path))
    after = tree(toy_path)
    assert {k: v for k, v in before.items() if "commits" not in k} == {
        k: v for k, v in after.items() if "commits" not in k
    }


@pytest.mark.fault("10")
@pytest.mark.parametrize("left", [b"", b"{", b"\xff\x00"])
def test_a_half_written_record_is_redone(tmp_path: Path, left: bytes) -> None:
    """A record that a power cut left half-written does not count; its block is redone."""
    write_toy(tmp_path / "toy.zarr", n_blocks=3)
    record = min(tmp_path.rglob("00000001-*.json"))
    sound = tree(tmp_path)
    record.write_bytes(left)
    assert [block.start for block in write_toy(tmp_path / "toy.zarr", n_blocks=1).blocks] == [
        64,
        192,
    ]
    assert tree(tmp_path) == sound


@pytest.mark.fault("10")
def test_a_record_cut_anywhere_is_redone(tmp_path: Path, tries: Tries) -> None:
    """Of any length but its own a record does not count; its block is redone to the same bytes."""
    path = tmp_path / "toy.zarr"
    write_toy(path, 70, layers=[4], poolings=["mean"], n_blocks=1)
    (record,) = path.rglob("commits/train/tiny/*.json")
    sound, whole = record.read_bytes(), tree(path)
    lengths = range(0, len(sound) - 1, 5)  # without its last newline it is read
    for n_bytes in lengths:
        record.write_bytes(sound[:n_bytes])
        write_toy(path, 70, layers=[4], poolings=["mean"], n_blocks=1)
        assert tree(path) == whole, n_bytes
    tries(len(lengths))


@pytest.mark.fault("8", "9")
def test_what_a_loss_of_power_left_is_found(tmp_path: Path, tries: Tries) -> None:
    """Chunks that are zeros, in part or whole, or of no length, are named by `verify`."""
    path = tmp_path / "toy.zarr"
    write_toy(path, 130, layers=[4], poolings=["mean"])
    chunks = [key for key in tree(path) if "/c." in key]
    n_tried = 0
    for key in chunks:
        sound = (path / key).read_bytes()
        for n_kept in (0, len(sound) // 2, len(sound) - 1):
            for left in (sound[:n_kept], sound[:n_kept] + bytes(len(sound) - n_kept)):
                if left == sound:
                    continue
                (path / key).write_bytes(left)
                found = [damage.key for damage in verify(open_store(path)).damage]
                assert any(key.startswith(one) for one in found), (key, found)
                n_tried += 1
        (path / key).write_bytes(sound)
    assert verify(open_store(path)).damage == ()
    tries(n_tried)


@pytest.mark.fault("5")
@pytest.mark.parametrize("other_bytes", [False, True])
def test_a_process_that_writes_after_its_unit_was_redone(tmp_path: Path, other_bytes: bool) -> None:
    """Its record is not taken; where its chunk differs, on other hardware, that is found."""
    toy, path = Toy(128), tmp_path / "toy.zarr"

    def write(writer: CacheWriter, *, begin: bool = True, noise: float = 0.0) -> None:
        plan = writer.plan("train", SOURCE.name, arrays=[("mean", 4)])
        for block in plan.blocks if begin else blocks:
            rows = slice(block.start, block.stop)
            features = {("mean", 4): toy.features("mean", 4)[rows] + noise}
            writer.write(plan, block, n_tokens=toy.n_tokens[rows], features=features)

    def opened(shared: str | None) -> CacheWriter:
        return CacheWriter(path, dataset=DATASET, shared=shared)

    def add(writer: CacheWriter) -> None:
        writer.add_source(SOURCE)
        writer.add_split("train", labels=toy.labels, text_hash=toy.text_hash)

    with opened(None) as first:
        add(first)
        first.plan("train", SOURCE.name, arrays=[("mean", 4)])
        first.register()
    with opened("zombie") as zombie:
        add(zombie)
        blocks = zombie.plan("train", SOURCE.name, arrays=[("mean", 4)]).blocks
        with opened("other") as other:
            add(other)
            write(other)
        done = tree(path)
        if not other_bytes:
            write(zombie, begin=False)
            assert tree(path) == done
        else:
            with pytest.raises(CacheMismatchError, match="was committed by another writer"):
                write(zombie, begin=False, noise=1.0)
    if other_bytes:
        with pytest.raises(CacheCorruptError, match=r"does not hold what was committed.*withdrawn"):
            finalize(path)
        with opened("other") as other:
            add(other)
            write(other)
    finalize(path)
    assert_toy(open_cache(path), 128)


AT_FIRST = {
    "out of memory": "os.kill(os.getpid(), signal.SIGKILL)",
    "stands still": "os.kill(os.getpid(), signal.SIGSTOP)",
    "CUDA": "raise RuntimeError('CUDA error: an illegal memory access was encountered')",
}
TOLD = {
    "out of memory": "ended, killed by SIGKILL",
    "stands still": r"ended, killed since it stood still for 0\.25 minutes",
    "CUDA": "ended, with exit code",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("out of memory", marks=pytest.mark.fault("3")),
        pytest.param("stands still", marks=pytest.mark.fault("4")),
        pytest.param("CUDA", marks=pytest.mark.fault("6")),
    ],
)
def test_a_process_of_several_that_fails(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """It is parted from and named, what it had is done by the other, to the same bytes."""
    monkeypatch.setattr(devices, "MOST_SILENT_S", 15.0)
    write_texts(tmp_path / "toy.csv", 200)

    def config(cache: str, **options: str) -> ExtractConfig:
        return ExtractConfig(
            model=str(llama),
            layers="1,3",
            dataset=str(tmp_path / "toy.csv"),
            cache=str(tmp_path / cache),
            max_length=16,
            compute_dtype="float32",
            device="cpu",
            **options,
        )

    code = before_first_record(tmp_path / "marker", AT_FIRST[fault])
    with in_processes(code), pytest.warns(LLMEmbedWarning, match=TOLD[fault]):
        extract(config("several.zarr", devices="2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(config("whole.zarr"))
    assert tree(tmp_path / "several.zarr") == tree(tmp_path / "whole.zarr")
