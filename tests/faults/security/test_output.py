"""Where output goes: on nothing that is not its own."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_commands import done, refused

from llmembed.cache_format.cli import main as cache_main
from llmembed.train.cli.audit import audit_main
from llmembed.train.cli.fit import fit_main
from llmembed.train.cli.predict import predict_main
from llmembed.train.cli.report import report_main
from llmembed.train.cli.sweep import sweep_main

Tries = Callable[[int], None]


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
