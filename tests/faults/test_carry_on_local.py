"""What a careful tool does not depend on: clocks, locks of files, being alone."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_cache import DATASET, SOURCE, assert_toy, tree, write_toy

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.stores.local import TEMPORARY
from llmembed.cache_format.tools import verify
from llmembed.cache_format.writing.lock import LOCK
from llmembed.common.errors import CacheLockedError

Tries = Callable[[int], None]
YEAR_S = 366 * 24 * 3600.0


@pytest.mark.fault("25")
@pytest.mark.parametrize("skew_s", [-30 * YEAR_S, -3600.0, 3600.0, 30 * YEAR_S])
def test_clocks_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tries: Tries, skew_s: float
) -> None:
    """What one machine began another goes on with, whatever its clock and the files' times say."""
    whole = tmp_path / "whole.zarr"
    write_toy(whole)
    for n_blocks in (1, 3):
        path = tmp_path / f"{n_blocks}.zarr"
        write_toy(path, n_blocks=n_blocks)
        for file in path.rglob("*"):
            os.utime(file, (time.time() + skew_s,) * 2)
        with monkeypatch.context() as patch:
            now, shift = time.time, skew_s
            patch.setattr(time, "time", lambda now=now, shift=shift: now() - shift)
            write_toy(path)
        assert tree(path) == tree(whole)
    tries(2)


@pytest.mark.fault("25")
@pytest.mark.parametrize("skew_s", [-8 * 24 * 3600.0, 30 * YEAR_S])
def test_a_lock_has_no_age(tmp_path: Path, skew_s: float) -> None:
    """The lock and the unfinished file of a living process stay its own, however old they look."""
    path = tmp_path / "toy.zarr"
    with CacheWriter(path, dataset=DATASET) as writer:
        writer.add_source(SOURCE)
        os.utime(path / LOCK, (time.time() + skew_s,) * 2)
        with pytest.raises(CacheLockedError, match="is being written by process"):
            write_toy(path)


@pytest.mark.fault("27")
def test_file_locks_that_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flock and lockf let everybody in, and where they refuse everybody, all is the same."""
    import fcntl

    write_toy(tmp_path / "whole.zarr")

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    for number, answer in enumerate((lambda *_: None, refuse)):
        path = tmp_path / f"{number}.zarr"
        with monkeypatch.context() as patch:
            for name in ("flock", "lockf", "fcntl"):
                patch.setattr(fcntl, name, answer)
            with CacheWriter(path, dataset=DATASET) as writer:
                writer.add_source(SOURCE)
                with pytest.raises(CacheLockedError, match="is being written by process"):
                    write_toy(path)
            write_toy(path)
        assert tree(path) == tree(tmp_path / "whole.zarr")


def write_when_told(path: Path, begin: Any, said: Any) -> None:
    """Write the toy cache, or say that another one does."""
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    begin.wait()
    try:
        write_toy(path)
        said.put("written")
    except CacheLockedError as error:
        said.put(str(error))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.fault("28")
def test_drivers_that_start_at_once(tmp_path: Path, tries: Tries) -> None:
    """Of real processes each writes the cache, finds it whole, or is told who writes it."""
    write_toy(tmp_path / "whole.zarr")
    context = multiprocessing.get_context("fork")
    n_rounds, n_drivers = 6, 3
    for number in range(n_rounds):
        path = tmp_path / f"{number}.zarr"
        begin, said = context.Barrier(n_drivers), context.Queue()
        drivers = [
            context.Process(target=write_when_told, args=(path, begin, said))
            for _ in range(n_drivers)
        ]
        for driver in drivers:
            driver.start()
        answers = [said.get(timeout=60) for _ in drivers]
        for driver in drivers:
            driver.join()
        assert "written" in answers
        for answer in answers:
            assert answer == "written" or "another writer" in answer or "by process" in answer
        assert tree(path) == tree(tmp_path / "whole.zarr")
        assert not list((path / TEMPORARY).iterdir())
    tries(n_rounds * n_drivers)


@pytest.mark.fault("28")
def test_a_second_driver_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    """While one writes, the other is told its process, and what the first writes is whole."""
    path = tmp_path / "toy.zarr"
    write_toy(path, n_blocks=1)
    with CacheWriter(path, dataset=DATASET):
        before = tree(path)
        with pytest.raises(CacheLockedError, match=f"process {os.getpid()} on host"):
            write_toy(path)
        assert tree(path) == before
    write_toy(path)
    assert_toy(open_cache(path))
    assert verify(open_store(path)).damage == ()
