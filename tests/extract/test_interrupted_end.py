"""A run that is interrupted after its last block is finished by the next, to the same bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_cache import end_process

from llmembed.cache_format import CacheWriter
from llmembed.cache_format.stores import LocalStore
from llmembed.cache_format.writing.lock import WriterLock
from llmembed.extract import ExtractConfig, extract

CHANGES = ("put", "create", "delete")


@pytest.fixture
def config(llama: Path, write_csv: Any, tmp_path: Path) -> Callable[[str], ExtractConfig]:
    write_csv()

    def make(cache: str) -> ExtractConfig:
        return ExtractConfig(
            model=str(llama),
            layers="1,3",
            dataset=str(tmp_path / "toy.csv"),
            cache=str(tmp_path / cache),
            max_length=16,
            compute_dtype="float32",
        )

    return make


def tree(path: str) -> dict[str, bytes]:
    files = (file for file in Path(path).rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def interrupt(patch: pytest.MonkeyPatch, change: int) -> list[int]:
    """Interrupt the process at its n-th change of the cache after the last block."""
    n_left, seen = [10**9], [0]
    finish = CacheWriter.finish

    def begin(self: CacheWriter, *args: Any) -> None:
        n_left[0] = change
        finish(self, *args)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            n_left[0] -= 1
            seen[0] += n_left[0] < change
            if n_left[0] == 0:
                raise KeyboardInterrupt
            return function(*args)

        return call

    patch.setattr(CacheWriter, "finish", begin)
    for name in CHANGES:
        patch.setattr(LocalStore, name, counted(getattr(LocalStore, name)))
    return seen


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_interrupted_after_the_last_block_is_finished(
    config: Callable[[str], ExtractConfig], monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Wherever it stopped, the same command writes what lacks, and clears the lock."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with pytest.MonkeyPatch.context() as patch:
        n_changes = interrupt(patch, 10**6)
        whole = tree(extract(config("whole.zarr")).path)
    assert n_changes[0] > 4
    for change in range(1, n_changes[0] + 1):
        one = config(f"{change}.zarr")
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, change)
            if killed:
                patch.setattr(WriterLock, "release", lambda _: None)
            with contextlib.suppress(KeyboardInterrupt):
                extract(one)
        end_process(Path(str(one.cache)))
        assert tree(str(one.cache)) != whole
        assert extract(one).n_rows_computed == 0
        assert tree(str(one.cache)) == whole


def test_a_finished_cache_needs_no_lock(
    config: Callable[[str], ExtractConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is left to do, nothing is written: the cache may be read-only."""
    path = extract(config("toy.zarr")).path
    for name in CHANGES:
        monkeypatch.delattr(LocalStore, name)
    assert extract(config("toy.zarr")).path == path
