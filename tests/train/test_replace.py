"""Whatever happens while a run replaces another one, its place has a whole run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clustered import MakeCache, write_cache

from llmembed.common import replace
from llmembed.common.errors import (
    ConfigError,
    LLMEmbedWarning,
    RunFormatError,
    RunStorageError,
)
from llmembed.common.process import owner
from llmembed.common.replace import exchange, make_beside, put_in_place, recover, standing
from llmembed.train import FitConfig, Run, fit, load_run
from llmembed.train.runs import folder as runs
from llmembed.train.runs.folder import write_run
from llmembed.train.runs.predictions import Predictions
from llmembed.train.runs.record import read_json

OPERATIONS = ("mkdir", "fsync", "rename", "unlink", "rmdir", "scandir")


class Killed(BaseException):
    """The process is gone: nothing after it is done."""


class Faults:
    """Lets the n-th operation on the disk fail: alone, with all that follow, or as a kill does.

    Args:
        patch: what puts the operations back.
        kind: `error`, `broken disk` or `kill`.
        at: number of the operation; 0 lets none fail.
        with_exchange: whether two folders can be exchanged in one step.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, kind: str, at: int, *, with_exchange: bool
    ) -> None:
        self.kind, self.at, self.n_seen = kind, at, 0
        for name in OPERATIONS:
            patch.setattr(os, name, self._failing(getattr(os, name)))
        swap = self._failing(exchange) if with_exchange else lambda one, other: False
        patch.setattr(replace, "exchange", swap)
        dead = "_0_".join(owner(os.getpid()).split("_")[::2])  # a process that started earlier
        patch.setattr(replace, "owner", lambda pid: dead)

    def _failing(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            self.n_seen += 1
            lasts = self.kind != "error" and self.n_seen > self.at > 0
            if self.n_seen == self.at or lasts:
                raise Killed if self.kind == "kill" else OSError(errno.EIO, "Input/output error")
            return operation(*args, **options)

        return run


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("earlier")
    cache = write_cache(folder / "tiny.zarr")
    config = FitConfig(cache=str(cache), fusion="mean", head="ridge", output=str(folder / "run"))
    return fit(config)


def later_than(run: Run, path: Path) -> Run:
    """Make a run that differs in its record, its figures and its weights."""
    classifier = copy.deepcopy(run.classifier)
    classifier.temperature.fill_(7.0)
    return dataclasses.replace(
        run,
        path=path,
        config={**run.config, "seed": 7},
        metrics={**run.metrics, "n_eval": 7},
        classifier=classifier,
    )


def put(run: Run) -> None:
    predictions = Predictions(
        rows=np.arange(1), labels=np.zeros(1, dtype=np.int64), log_proba=np.zeros((1, 3))
    )
    write_run(run, predictions, {}, logs=run.path / "none")


def assert_whole(run: Run, *, is_later: bool | None = None) -> None:
    """All files are of one run."""
    later = [
        run.config["seed"] == 7,
        run.metrics["n_eval"] == 7,
        float(run.classifier.temperature) == 7.0,
    ]
    assert len(set(later)) == 1
    assert is_later in (None, later[0])


@pytest.mark.filterwarnings("ignore:a fit was killed")
@pytest.mark.parametrize("kind", ["error", "broken disk", "kill"])
@pytest.mark.parametrize("with_exchange", [True, False])
def test_a_fault_at_any_step_loses_no_run(
    earlier: Run, tmp_path: Path, kind: str, *, with_exchange: bool
) -> None:
    """The place gives the one or the other run whole, and the next fit clears what is left."""
    n_operations = None
    at = 0
    while n_operations is None or at <= n_operations:
        place = tmp_path / str(at) / "run"
        shutil.copytree(earlier.path, place)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, kind, at, with_exchange=with_exchange)
            with contextlib.suppress(OSError, Killed):
                put(later_than(earlier, place))
        if n_operations is None:
            n_operations = faults.n_seen
            assert n_operations > 10
        assert_whole(load_run(place), is_later=True if at == 0 else None)
        assert place.is_dir() or kind != "error"
        recover(place)
        assert_whole(load_run(place))
        assert [path.name for path in place.parent.iterdir()] == ["run"]
        put(later_than(earlier, place))
        assert_whole(load_run(place), is_later=True)
        at += 1


def test_a_killed_process_leaves_the_earlier_run(earlier: Run, tmp_path: Path) -> None:
    """Killed between two renames, it is loaded with a warning and put back by the next fit."""
    place = tmp_path / "run"
    shutil.copytree(earlier.path, place)
    code = (
        "import os, signal, sys; from pathlib import Path; from llmembed.common import replace\n"
        "place, rename = Path(sys.argv[1]), os.rename\n"
        "def once(*args):\n"
        "    rename(*args); os.kill(os.getpid(), signal.SIGKILL)\n"
        "replace.exchange = lambda one, other: False\n"
        "folder = replace.make_beside(place)\n"
        "os.rename = once\n"
        "replace.put_in_place(folder, place)"
    )
    done = subprocess.run([sys.executable, "-Pc", code, str(place)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not place.exists()
    with pytest.warns(LLMEmbedWarning, match=r"a fit was killed while it replaced .*puts it back"):
        assert_whole(load_run(place), is_later=False)
    recover(place)
    assert_whole(load_run(place), is_later=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folders_of_living_processes_stay(tmp_path: Path) -> None:
    """Neither what this process writes is cleared, nor what belongs to another place."""
    mine = make_beside(tmp_path / "run")
    (tmp_path / ".run.partial").mkdir()
    alien = tmp_path / ".run.new-1_0_elsewhere-01234567"
    alien.mkdir()
    recover(tmp_path / "run")
    assert mine.is_dir()
    assert alien.is_dir()
    assert (tmp_path / ".run.partial").is_dir()
    assert standing(tmp_path / "run") == tmp_path / "run"


def test_two_folders_are_exchanged_in_one_step_on_linux(tmp_path: Path) -> None:
    """Where the system can exchange folders, both stand after it; without one, nothing changes."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "file").touch()
    assert not exchange(one, other)
    other.mkdir()
    assert exchange(one, other) == (other / "file").exists() != (one / "file").exists()


def test_what_a_link_points_to_is_replaced(earlier: Run, tmp_path: Path) -> None:
    """A run at a link stays where the link points to, and the link stays."""
    shutil.copytree(earlier.path, tmp_path / "kept" / "run")
    link = tmp_path / "latest"
    link.symlink_to(tmp_path / "kept" / "run")
    put(later_than(earlier, link))
    assert link.is_symlink()
    assert_whole(load_run(link), is_later=True)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["run"]


def test_a_run_that_is_replaced_while_it_is_read(
    earlier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that began with the earlier run's record gives the later one, nothing mixed."""
    place = tmp_path / "run"
    shutil.copytree(earlier.path, place)
    new = iter([later_than(earlier, place)])

    def read_and_replace(path: Path) -> dict[str, Any]:
        document = read_json(path)
        for run in new:
            put(run)
        return document

    monkeypatch.setattr(runs, "read_json", read_and_replace)
    assert_whole(load_run(place), is_later=True)


@pytest.fixture(params=[0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_of_the_umask(
    make_cache: MakeCache, tmp_path: Path, umask: int
) -> None:
    """Every file and folder of a run, weights and logs included, may be read as others may."""
    config = FitConfig(
        cache=str(make_cache()), fusion="mean", head="mlp", epochs=1, output=str(tmp_path / "run")
    )
    folder = fit(config).path
    found = [folder, *folder.rglob("*")]
    assert len(found) > 6
    for path in found:
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~umask, path


def test_a_full_disk_is_told_and_checkpoints_stay(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that cannot be written is one sentence; the same command goes on where it ended."""
    options: dict[str, Any] = {"fusion": "mean", "head": "mlp", "epochs": 2, "checkpoint_s": 0.0}
    config = FitConfig(cache=str(make_cache()), output=str(tmp_path / "run"), **options)
    before = fit(config).config

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(replace, "_flush", full)
        with pytest.raises(RunStorageError, match=r"while .*run was made: .*No space left"):
            fit(config)
    assert load_run(tmp_path / "run").config["versions"] == before["versions"]
    assert len([*(tmp_path / ".run.partial").rglob("*.ckpt")]) == 1
    fit(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tiny.zarr"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("x" * 250, "File name too long"),
        ("a\0b", "embedded null"),
        ("file/run", "Not a directory"),
    ],
)
def test_places_that_cannot_hold_a_run(tmp_path: Path, output: str, message: str) -> None:
    """They are refused before the cache is looked for."""
    (tmp_path / "file").touch()
    with pytest.raises(RunStorageError, match=f"nothing can be written to .*{message}"):
        fit(FitConfig(cache="none.zarr", output=f"{tmp_path}/{output}"))


def test_a_run_of_another_fusion_is_replaced_when_told(earlier: Run, tmp_path: Path) -> None:
    """One of the same fusion is replaced as it is, another one with `overwrite`."""
    place = shutil.copytree(earlier.path, tmp_path / "run")
    config = FitConfig(cache=earlier.config["fit"]["cache"], fusion="mean", output=str(place))
    assert load_run(fit(config).path).config["fit"]["head"] == "auto"
    other = dataclasses.replace(config, fusion="concat", head="ridge")
    with pytest.raises(ConfigError, match=r"run of fusion 'mean', and this is one of fusion 'conc"):
        fit(other)
    assert load_run(place).config["fit"]["fusion"] == "mean"
    fit(dataclasses.replace(other, overwrite=True))
    assert load_run(place).config["fit"]["fusion"] == "concat"


def test_a_run_of_other_options_is_named_when_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fit of the same options again says nothing."""
    cache, place = str(write_cache(tmp_path / "toy.zarr")), str(tmp_path / "run")
    options = {"cache": cache, "fusion": "single", "output": place, "baseline": "none"}
    with caplog.at_level(logging.INFO, logger="llmembed"):
        fit(FitConfig(layers="1", **options))
        fit(FitConfig(layers="1", **options))
        assert "replaced" not in caplog.text
        fit(FitConfig(layers="2", head="lda", **options))
    assert f"{place} replaced a run with layers '1', head 'auto'." in caplog.text


def test_what_is_no_run_is_not_replaced(tmp_path: Path) -> None:
    """A folder of other things stays, whatever is told."""
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunFormatError, match="exists and is not a run, so it is not replaced"):
        fit(FitConfig(cache="none.zarr", output=str(tmp_path), overwrite=True))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_damaged_run_is_not_replaced(earlier: Run, tmp_path: Path) -> None:
    """Where the record cannot be read, nobody knows what would be lost."""
    place = tmp_path / "run"
    shutil.copytree(earlier.path, place)
    (place / "config.json").write_text("{")
    with pytest.raises(
        RunFormatError, match=r"config\.json cannot be read, and so .* not replaced"
    ):
        fit(FitConfig(cache="none.zarr", output=str(place)))


@pytest.mark.parametrize("options", [None, [], "x", {}])
def test_a_run_of_unreadable_options_is_replaced_when_told(
    earlier: Run, tmp_path: Path, options: object
) -> None:
    """What cannot be told of it stops nothing."""
    place = shutil.copytree(earlier.path, tmp_path / "run")
    record = read_json(place / "config.json") | {"fit": options}
    (place / "config.json").write_text(json.dumps(record))
    cache = earlier.config["fit"]["cache"]
    fit(FitConfig(cache=cache, fusion="mean", output=str(place), overwrite=True))
    assert load_run(place).config["fit"]["fusion"] == "mean"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    """A folder takes the place of an empty one, and of none."""
    for place in (tmp_path / "empty", tmp_path / "none"):
        folder = make_beside(place)
        (folder / "file").touch()
        if place.name == "empty":
            place.mkdir()
        put_in_place(folder, place)
        assert [path.name for path in place.iterdir()] == ["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "none"]
