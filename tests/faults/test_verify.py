"""Chunks that are gone, empty, cut or changed: `verify` names them, and a fit stops there."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from clustered import write_cache
from toy_cache import assert_toy, write_toy
from toy_rows import write_rows

from llmembed.cache_format import open_cache
from llmembed.cache_format.cli import main
from llmembed.cache_format.layout.arrays import SHARD_BLOCKS
from llmembed.cache_format.tools import convert
from llmembed.common.errors import CacheCorruptError, CacheError
from llmembed.train import FitConfig, fit

N_ROWS = 70
INDEX_BYTES = 16 * SHARD_BLOCKS + 4  # of a shard: offset and length of each part, and a crc32c
KINDS = ("plain", "rows", "archive")


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A sound cache as the writer leaves it, one with all columns, or an archive."""
    return make(request.param, tmp_path)


def make(kind: str, folder: Path) -> Path:
    if kind == "rows":
        write_rows(folder / "toy.zarr", N_ROWS)
        return folder / "toy.zarr"
    write_toy(folder / "toy.zarr", N_ROWS)
    if kind == "archive":
        convert(folder / "toy.zarr", folder / "archive.zarr", archive=True)
        return folder / "archive.zarr"
    return folder / "toy.zarr"


def chunks_of(cache: Path) -> list[Path]:
    files = (path for path in sorted(cache.rglob("*")) if path.is_file())
    return [path for path in files if path.suffix != ".json" and ".llmembed" not in path.parts]


def said_of(cache: Path) -> str:
    """What `verify` says of a damaged cache, on the terminal, with exit code 1."""
    result = CliRunner().invoke(main, ["verify", str(cache)])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    return result.output


def array_of(chunk: Path, cache: Path) -> str:
    """Key of the array that a chunk belongs to."""
    key = chunk.relative_to(cache).as_posix()
    return key.partition("/c.")[0].partition("/c/")[0]


def flips(data: bytes, first: int, n: int) -> Iterator[bytes]:
    """The same bytes with one bit flipped, from a byte on, so many times."""
    rng = random.Random(first)
    for _ in range(n):
        at = rng.randrange(8 * first, 8 * len(data))
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        yield bytes(flipped)


@pytest.mark.fault("43", "44", "45")
def test_each_chunk_that_is_not_whole_is_named(cache: Path, tries: Callable[[int], None]) -> None:
    """Gone, empty, cut by a byte or to its half, or longer: the command names it, and exits 1."""
    n_tried = 0
    for chunk in chunks_of(cache):
        sound = chunk.read_bytes()
        for damaged in (None, b"", sound[:-1], sound[: len(sound) // 2], sound + b"\0"):
            chunk.unlink(missing_ok=True)
            if damaged is not None:
                chunk.write_bytes(damaged)
            assert array_of(chunk, cache) in said_of(cache), (chunk, damaged)
            n_tried += 1
        chunk.write_bytes(sound)
    assert CliRunner().invoke(main, ["verify", str(cache)]).exit_code == 0
    tries(n_tried)


@pytest.mark.fault("46")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, pytest.param(250, marks=pytest.mark.slow)])
def test_each_flipped_bit_is_named(
    kind: str, n: int, tmp_path: Path, tries: Callable[[int], None]
) -> None:
    """Of rows, of padding, of a checksum, of what is compressed."""
    cache = make(kind, tmp_path)
    chunks = chunks_of(cache)
    for chunk in chunks:
        sound = chunk.read_bytes()
        for flipped in flips(sound, 0, n):
            chunk.write_bytes(flipped)
            assert array_of(chunk, cache) in said_of(cache), chunk
        chunk.write_bytes(sound)
    tries(n * len(chunks))


@pytest.mark.fault("47")
@pytest.mark.parametrize("n", [20, pytest.param(2_000, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_the_index_of_a_shard_is_named(
    n: int, tmp_path: Path, tries: Callable[[int], None]
) -> None:
    """Where a part begins, how long it is, and the checksum of that; no read gives other rows."""
    cache = make("archive", tmp_path)
    shard = next(chunk for chunk in chunks_of(cache) if "layer_008" in chunk.parts)
    sound = shard.read_bytes()
    for flipped in flips(sound, len(sound) - INDEX_BYTES, n):
        shard.write_bytes(flipped)
        assert array_of(shard, cache) in said_of(cache)
        with pytest.raises(CacheError, match=r"layer_008.*cannot be decoded"):
            assert_toy(open_cache(cache), N_ROWS)
    tries(n)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: None, marks=pytest.mark.fault("43")),
        pytest.param(lambda _: b"", marks=pytest.mark.fault("44")),
        pytest.param(lambda sound: sound[:-5], marks=pytest.mark.fault("45")),
        pytest.param(lambda sound: next(flips(sound, 0, 1)), marks=pytest.mark.fault("46")),
    ],
    ids=["missing", "empty", "cut", "flipped"],
)
def test_a_fit_stops_at_a_damaged_chunk(
    damage: Callable[[bytes], bytes | None], tmp_path: Path
) -> None:
    """It names the chunk or its rows, and leaves no run."""
    cache = write_cache(tmp_path / "tiny.zarr")
    chunk = cache / "train/tiny/mean/layer_002/c.0.0"
    content = damage(chunk.read_bytes())
    chunk.unlink()
    if content is not None:
        chunk.write_bytes(content)
    config = FitConfig(cache=str(cache), fusion="concat", output=str(tmp_path / "run"))
    with pytest.raises(CacheCorruptError, match="train/tiny/mean/layer_002"):
        fit(config)
    assert not (tmp_path / "run").exists()
