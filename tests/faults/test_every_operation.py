"""A fault at each operation on the disk: what was finished stays, and the next run ends alike."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clustered import write_cache
from faulty_disk import (
    End,
    Fault,
    count_operations,
    faults,
    with_fault,
    with_files_up_to,
)
from toy_cache import DATASET, SOURCE, Toy, count_right_rows, tree, write_toy
from toy_model import write_texts

from llmembed.cache_format import CacheWriter
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.stores.local import TEMPORARY
from llmembed.cache_format.tools import convert, copy, finalize, merge, remove, verify
from llmembed.cache_format.writing.lock import LOCK
from llmembed.common.errors import ConfigError
from llmembed.extract import ExtractConfig, extract
from llmembed.train import FitConfig, Run, fit, load_run

Act = Callable[[Path], object]
Tries = Callable[[int], None]


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """Try few faults, or, in the slow half, up to so many: each of each kind, if they suffice."""
    marks = [pytest.mark.slow, pytest.mark.timeout(3600)]
    chosen = [pytest.param(few, id="few"), pytest.param(many, id="many", marks=marks)]
    return pytest.mark.parametrize("most", chosen)


OF_THIS_RUN = {"metrics.json", "report.html"}  # they tell how long it took


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, since a fork takes no other along."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def renew(folder: Path, start: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(start, folder)


def whole_after(act: Act, start: Path, folder: Path) -> tuple[int, dict[str, bytes]]:
    """Count the operations of what is not disturbed, and give the files that it leaves."""
    renew(folder, start)
    n = count_operations(lambda: act(folder), folder)
    return n, tree(folder)


def ended(end: End, fault: object) -> None:
    """Whatever happened, it was finished, told in one of our sentences, or killed."""
    assert end.how != "raw", f"{fault}: {end.said}"


def assert_done_again(
    act: Act, start: Path, folder: Path, chosen: Callable[[int], Iterable[Fault]]
) -> int:
    """Try faults; after each, the same again leaves what it leaves undisturbed."""
    n_operations, whole = whole_after(act, start, folder)
    assert n_operations > 50
    n_tried = n_broken = 0
    for fault in chosen(n_operations):
        renew(folder, start)
        end = with_fault(lambda: act(folder), folder, fault)
        ended(end, fault)
        if end.how == "done":
            assert tree(folder) == whole, fault
        elif tree(folder) != whole:
            n_broken += 1
            act(folder)
            assert tree(folder) == whole, fault
        n_tried += 1
    assert n_broken
    return n_tried


def assert_nothing_half(found: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """Every chunk under its name is as long as it will be, every document a whole one."""
    for key, data in found.items():
        if TEMPORARY in key or key.endswith(LOCK):
            continue
        if key.endswith(".json"):
            json.loads(data)
        else:
            assert len(data) == len(whole[key]), key


def write_first(folder: Path) -> None:
    write_toy(folder / "toy.zarr", 140, layers=[4], poolings=["mean"])


def write_more(folder: Path) -> None:
    """Rows come behind those that are there, and a layer."""
    write_toy(folder / "toy.zarr", 200, layers=[4, 8], poolings=["mean"])


def write_safely(folder: Path) -> None:
    write_toy(folder / "toy.zarr", 140, layers=[4], poolings=["mean"], fsync=True)


@pytest.mark.fault("F1", "1", "2", "7", "14")
@pytest.mark.parametrize("write", [write_first, write_more, write_safely])
@few_or_many(8, 10_000)
def test_a_writer_disturbed_at_any_operation(
    disk: Path, tries: Tries, write: Act, most: int
) -> None:
    """No row that was committed is lost or wrong, and resumed it ends in the same bytes."""
    start, folder = disk / "start", disk / "folder"
    start.mkdir()
    if write is write_more:
        write_first(start)
    n_operations, whole = whole_after(write, start, folder)
    seen: dict[str, int] = {}
    n_before = count_right_rows(start / "toy.zarr")
    n_tried = 0
    for fault in faults(n_operations, most):
        renew(folder, start)
        end = with_fault(lambda: write(folder), folder, fault)
        ended(end, fault)
        seen[end.how] = seen.get(end.how, 0) + 1
        assert_nothing_half(tree(folder), whole)
        assert count_right_rows(folder / "toy.zarr") >= n_before
        write(folder)
        assert tree(folder) == whole, fault
        n_tried += 1
    assert verify(open_store(folder / "toy.zarr")).damage == ()
    assert seen.keys() == {"killed", "told", "done"}
    tries(n_tried)


@pytest.mark.fault("F1")
@few_or_many(4, 400)
def test_an_extraction_disturbed_at_any_operation(
    disk: Path, llama: Path, tries: Tries, most: int
) -> None:
    """The whole of `extract`, resumed after a fault, ends in the bytes of the undisturbed one."""
    write_texts(disk / "toy.csv", 70)
    (disk / "start").mkdir()

    def act(folder: Path) -> None:
        config = ExtractConfig(
            model=str(llama),
            layers="1,3",
            dataset=str(disk / "toy.csv"),
            cache=str(folder / "toy.zarr"),
            max_length=16,
            compute_dtype="float32",
        )
        extract(config)

    act(disk / "warm")
    folder = disk / "folder"
    tries(assert_done_again(act, disk / "start", folder, lambda n: faults(n, most)))


def finish_ranks(folder: Path) -> None:
    """Write all blocks as ranks do, which leave the closing to `finalize`."""
    toy = Toy(100)
    for shared in (None, "rank-0"):
        with CacheWriter(folder / "ranks.zarr", dataset=DATASET, shared=shared) as writer:
            writer.add_source(SOURCE)
            writer.add_split("train", labels=toy.labels, text_hash=toy.text_hash)
            plan = writer.plan("train", SOURCE.name, arrays=[("mean", 4)])
            if shared is None:
                writer.register()
                continue
            for block in plan.blocks:
                rows = slice(block.start, block.stop)
                features = {("mean", 4): toy.features("mean", 4)[rows]}
                writer.write(plan, block, n_tokens=toy.n_tokens[rows], features=features)


def removing(**choice: Any) -> Act:
    """Remove, or hear that it is done."""

    def act(folder: Path) -> None:
        with contextlib.suppress(ConfigError):  # after a fault when all was gone: nothing fits
            remove(folder / "a.zarr", **choice)

    return act


TOOLS: dict[str, Act] = {
    "convert to HDF5": lambda f: convert(f / "a.zarr", f / "out.h5"),
    "convert from HDF5": lambda f: convert(f / "a.h5", f / "out.zarr"),
    "archive": lambda f: convert(f / "a.zarr", f / "out.zarr", archive=True),
    "copy": lambda f: copy(f / "a.zarr", f / "out.zarr"),
    "merge": lambda f: merge(f / "out.zarr", [f / "a.zarr", f / "b.zarr"]),
    "remove a layer": removing(layers=[4]),
    "remove a pooling": removing(pooling="last"),
    "remove a split": removing(split="test"),
    "remove a source": removing(source="tiny"),
    "remove a source of a split": removing(split="test", source="tiny"),
    "finalize": lambda f: finalize(f / "ranks.zarr"),
}
NEEDED = {
    "convert from HDF5": ["a.h5"],
    "merge": ["a.zarr", "b.zarr"],
    "finalize": ["ranks.zarr"],
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tools work on."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        write_toy(folder / "a.zarr", 100, layers=[4], poolings=["mean", "last"])
        write_toy(folder / "a.zarr", 40, layers=[4, 8], poolings=["mean"], split="test")
        write_toy(folder / "b.zarr", 100, layers=[4, 8], poolings=["mean"])
        convert(folder / "a.zarr", folder / "a.h5")
        finish_ranks(folder)
    return folder


@pytest.mark.fault("F4")
@pytest.mark.parametrize("tool", TOOLS)
@few_or_many(4, 1000)
def test_a_tool_disturbed_at_any_operation(
    caches: Path, disk: Path, tries: Tries, tool: str, most: int
) -> None:
    """The same command, given again, leaves the bytes of the undisturbed one, and nothing else."""
    start = disk / "start"
    start.mkdir()
    for name in NEEDED.get(tool, ["a.zarr"]):
        copied = shutil.copy if name.endswith(".h5") else shutil.copytree
        copied(caches / name, start / name)

    tries(assert_done_again(TOOLS[tool], start, disk / "folder", lambda n: faults(n, most)))


@pytest.mark.fault("F4", "14")
@pytest.mark.parametrize("killed", [False, True])
def test_hdf5_that_finds_no_room(caches: Path, disk: Path, tries: Tries, killed: bool) -> None:
    """However far the file came, that is told or killed, and the same again writes it whole."""
    act, folder = TOOLS["convert to HDF5"], disk / "folder"
    _, whole = whole_after(act, caches, folder)
    limits = range(0, len(whole["out.h5"]), 6000)
    for n_bytes in limits:
        renew(folder, caches)
        end = with_files_up_to(lambda: act(folder), n_bytes, killed=killed)
        assert end.how == ("killed" if killed else "told"), (n_bytes, end.said)
        assert not (folder / "out.h5").exists()
        act(folder)
        assert tree(folder) == whole
    tries(len(limits))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("features") / "tiny.zarr")


def fitting(features: Path, seed: int, **options: Any) -> Act:
    """Fit a run to the place `run` of a folder."""

    def act(folder: Path) -> None:
        fit(
            FitConfig(
                cache=str(features), output=str(folder / "run"), seed=seed, fusion="mean", **options
            )
        )

    return act


def files_of(run: Run) -> dict[str, bytes]:
    return {name: data for name, data in tree(run.path).items() if name not in OF_THIS_RUN}


def find_run(folder: Path) -> Run:
    """Load what stands at the place; that it is an earlier run under its hidden name is told."""
    return load_run(folder / "run")


def assert_one_whole_run(folder: Path, earlier: Run, later: Run | None) -> None:
    found = find_run(folder)
    is_later = found.config["fit"]["seed"] != earlier.config["fit"]["seed"]
    expected = later if is_later else earlier
    assert expected is not None
    assert files_of(found) == files_of(expected)


@pytest.mark.fault("F2", "S9")
@few_or_many(6, 1000)
def test_a_fit_over_an_old_run_disturbed_at_any_operation(
    disk: Path, features: Path, tries: Tries, most: int
) -> None:
    """The place has one whole run, the old or the new; the next fit leaves that run alone."""
    start, folder, whole = disk / "start", disk / "folder", disk / "whole"
    fitting(features, 1, head="ridge")(folder)
    renew(start, folder)
    act = fitting(features, 2, head="ridge")
    renew(folder, start)
    n_operations = count_operations(lambda: act(folder), folder)
    earlier, later = find_run(start), find_run(renew(whole, folder))
    n_tried = 0
    for fault in faults(n_operations, most):
        renew(folder, start)
        ended(with_fault(lambda: act(folder), folder, fault), fault)
        assert_one_whole_run(folder, earlier, later)
        act(folder)
        assert_one_whole_run(folder, later, None)
        assert [path.name for path in folder.iterdir()] == ["run"], fault
        n_tried += 1
    tries(n_tried)


@pytest.mark.fault("F2", "14")
@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_finds_no_room(disk: Path, features: Path, tries: Tries, killed: bool) -> None:
    """Whichever file of it finds none, that is told or killed, and the old run stays."""
    start, folder = disk / "start", disk / "folder"
    fitting(features, 1, head="ridge")(folder)
    renew(start, folder)
    earlier = find_run(start)
    act = fitting(features, 2, head="ridge")
    sizes = sorted({file.stat().st_size for file in start.rglob("*") if file.is_file()})
    for n_bytes in (0, *(size - 1 for size in sizes[:-1:2])):
        renew(folder, start)
        end = with_files_up_to(lambda: act(folder), n_bytes, killed=killed)
        assert end.how == ("killed" if killed else "told"), (n_bytes, end.said)
        assert_one_whole_run(folder, earlier, None)
    act(folder)
    assert [path.name for path in folder.iterdir()] == ["run"]
    tries(1 + len(sizes[:-1:2]))


BY_GRADIENT: dict[str, Any] = {
    "head": "mlp",
    "epochs": 3,
    "patience": 3,
    "lr": 0.01,
    "accelerator": "cpu",
    "checkpoint_s": 0,
}


@pytest.mark.fault("F3", "60")
@few_or_many(4, 160)
def test_a_fit_by_gradient_disturbed_at_any_operation(
    disk: Path, features: Path, tries: Tries, most: int
) -> None:
    """It goes on from the last whole checkpoint to the same weights, figures and log."""
    start, folder = disk / "start", disk / "folder"
    start.mkdir()
    act = fitting(features, 1, **BY_GRADIENT)
    act(folder)
    whole = find_run(renew(disk / "whole", folder))
    renew(folder, start)
    n_operations = count_operations(lambda: act(folder), folder)
    n_tried = 0
    for fault in faults(n_operations, most):
        renew(folder, start)
        ended(with_fault(lambda: act(folder), folder, fault), fault)
        act(folder)
        assert_one_whole_run(folder, whole, None)
        assert [path.name for path in folder.iterdir()] == ["run"], fault
        n_tried += 1
    tries(n_tried)


@pytest.mark.fault("F3", "60")
@pytest.mark.parametrize("killed", [False, True])
def test_a_checkpoint_that_finds_no_room(
    disk: Path, features: Path, tries: Tries, killed: bool
) -> None:
    """Wherever its writing ended, none of it lies under its name, and the fit goes on."""
    act, folder = fitting(features, 1, **BY_GRADIENT), disk / "folder"
    act(folder)
    whole = find_run(renew(disk / "whole", folder))
    limits = (0, 4000)  # of some 20,000
    for n_bytes in limits:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        end = with_files_up_to(lambda: act(folder), n_bytes, killed=killed)
        assert end.how == ("killed" if killed else "told"), (n_bytes, end.said)
        assert not list(folder.rglob("last.ckpt"))
        act(folder)
        assert_one_whole_run(folder, whole, None)
        assert [path.name for path in folder.iterdir()] == ["run"]
    tries(len(limits))
