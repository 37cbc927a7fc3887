"""Properties: a cache follows a dict model through everything, and hostile documents are errors."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toy_cache import DATASET, HIDDEN_SIZE, SOURCE, Toy, write_toy

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.cache_format.layout.schema import ArrayKey, content_digest
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import convert, describe, remove, tree, verify
from llmembed.cache_format.writing.lock import LOCK, SHARED, WriterLock
from llmembed.common.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheLockedError,
    ConfigError,
    LLMEmbedError,
)

LAYERS = st.lists(st.sampled_from([0, 4, 8]), min_size=1, max_size=3, unique=True)
POOLINGS = st.lists(st.sampled_from(["last", "mean"]), min_size=1, max_size=2, unique=True)
BLOCK_ROWS = 64
"""Rows of a block while the split has fewer than `MAX_ROWS` when its first block is written."""
MAX_ROWS = 512


class CacheMachine(RuleBasedStateMachine):
    """Write, stop, resume, extend, grow, remove, lose chunks, read and verify, against a model.

    The model is, for each array, the set of its committed rows.
    """

    @initialize(n_rows=st.integers(0, 250))
    def start(self, n_rows: int) -> None:
        self.folder = tempfile.mkdtemp()
        self.path = Path(self.folder) / "toy.zarr"
        self.n_rows = n_rows
        self.rows: dict[ArrayKey, set[int]] = {}
        write_toy(self.path, n_rows, layers=[4], poolings=["mean"], n_blocks=0)

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "folder", "/nonexistent"), ignore_errors=True)

    def missing(self, arrays: set[ArrayKey]) -> dict[tuple[int, int], list[ArrayKey]]:
        """Blocks that lack rows, and which arrays lack them."""
        found: dict[tuple[int, int], list[ArrayKey]] = {}
        for start in range(0, self.n_rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self.n_rows)
            for key in sorted(arrays):
                if not set(range(start, stop)) <= self.rows.get(key, set()):
                    found.setdefault((start, stop), []).append(key)
        return found

    @rule(layers=LAYERS, poolings=POOLINGS, n_blocks=st.none() | st.integers(0, 3))
    def extract(self, layers: list[int], poolings: list[str], n_blocks: int | None) -> None:
        arrays = {(pooling, layer) for pooling in poolings for layer in layers}
        expected = self.missing(arrays)
        plan = write_toy(
            self.path, self.n_rows, layers=layers, poolings=poolings, n_blocks=n_blocks
        )
        assert {(b.start, b.stop): list(b.missing) for b in plan.blocks} == expected
        for (start, stop), keys in list(expected.items())[:n_blocks]:
            for key in keys:
                self.rows.setdefault(key, set()).update(range(start, stop))

    @rule(n_more=st.integers(1, 90))
    @precondition(lambda self: self.n_rows + 90 < MAX_ROWS)
    def grow(self, n_more: int) -> None:
        self.n_rows += n_more
        toy = Toy(self.n_rows)
        with CacheWriter(self.path, dataset=DATASET) as writer:
            writer.add_split("train", labels=toy.labels, text_hash=toy.text_hash)

    @rule(layer=st.sampled_from([0, 4, 8]))
    def remove_layer(self, layer: int) -> None:
        with contextlib.suppress(ConfigError):
            remove(self.path, layers=[layer])
        self.rows = {key: rows for key, rows in self.rows.items() if key[1] != layer}

    @rule(data=st.data())
    @precondition(lambda self: any(self.rows.values()))
    def lose_a_chunk(self, data: st.DataObject) -> None:
        pooling, layer = data.draw(st.sampled_from(sorted(k for k, r in self.rows.items() if r)))
        rows = self.rows[pooling, layer]
        block = data.draw(st.sampled_from(sorted({row // BLOCK_ROWS for row in rows})))
        (self.path / f"train/tiny/{pooling}/layer_{layer:03d}/c.{block}.0").unlink()
        assert verify(open_store(self.path)).damage
        write_toy(self.path, self.n_rows, layers=[layer], poolings=[pooling])
        self.rows[pooling, layer] = set(range(self.n_rows))

    @invariant()
    def reads_what_the_model_says(self) -> None:
        split = open_cache(self.path)["train"]
        known = {key: rows for key, rows in self.rows.items() if rows}
        found = {(p, layer): n for (_, p, layer), n in split.arrays.items() if n}
        assert found == {key: len(rows) for key, rows in known.items()}
        for (pooling, layer), rows in known.items():
            expected = np.full((self.n_rows, HIDDEN_SIZE), np.nan, np.float16)
            there = sorted(rows)
            expected[there] = Toy(self.n_rows).features(pooling, layer)[there]
            partial = split.features(layer, pooling=pooling, allow_partial=True)
            np.testing.assert_array_equal(partial, expected)
            if len(rows) < self.n_rows:
                with pytest.raises(CacheIncompleteError):
                    split.features(layer, pooling=pooling)

    @invariant()
    def is_sound(self) -> None:
        assert verify(open_store(self.path)).damage == ()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=25, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
)

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**62, -(2**63), 10**400, 1e308, 0.5]),
    st.sampled_from(["", "..", "../../etc/passwd", "\x00", "\x1b[2J", "a" * 5000, "NaN", "\ud800"]),
    st.just([]),
    st.just({}),
    st.just([[[[]]]]),
    st.sampled_from(["@1e400@", "@-1e999@", *(f"@{n}@" for n in (30, 62, 70, 300, 900, 10**5))]),
    st.just([0, 16]),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    items: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        items = list(document.items())
    elif isinstance(document, list):
        items = list(enumerate(document))
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def with_value(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a place."""
    if not place:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    content = changed.get("attributes", {}) if isinstance(changed, dict) else {}
    content = content.get("llmembed") if isinstance(content, dict) else None
    if isinstance(content, dict) and "digest" in content:
        with contextlib.suppress(ValueError):
            content["digest"] = content_digest(content)
    return changed


def as_text(document: Any) -> str:
    """JSON in which `"@1e400@"` stands for that number, `"@70@"` for 70 lists in each other."""

    def literal(match: re.Match[str]) -> str:
        return match[1] if "e" in match[1] else "[" * int(match[1]) + "]" * int(match[1])

    return re.sub('"@([0-9e-]+)@"', literal, json.dumps(document))


def use_everything(path: Path) -> None:
    """Read, verify and plan; every error must be one of the tree."""
    with contextlib.suppress(LLMEmbedError):
        cache = open_cache(path)
        assert "\x1b" not in "".join(tree(describe(cache)))
        for name in cache.splits:
            for source, pooling, layer in cache[name].arrays:
                with contextlib.suppress(LLMEmbedError):
                    cache[name].features(layer, source, pooling, verify=True)
                with contextlib.suppress(LLMEmbedError):
                    cache[name].features(layer, source, pooling, rows=[1, 90])
    with contextlib.suppress(LLMEmbedError):
        verify(open_store(path))
    with (
        contextlib.suppress(LLMEmbedError),
        CacheWriter(path, dataset=DATASET, dry_run=True) as writer,
    ):
        writer.add_source(SOURCE)
        writer.add_split("train", labels=Toy(100).labels, text_hash=Toy(100).text_hash)
        plan = writer.plan("train", "tiny", arrays=[("mean", 4), ("mean", 5)])
        writer.is_finished(plan)


@pytest.fixture(scope="module", params=["a cache", "an archive"])
def fuzzed_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "toy.zarr"
    write_toy(path, 100, layers=[4], poolings=["mean"])
    if request.param == "a cache":
        return path
    convert(path, path.with_suffix(".archive"), archive=True)
    return path.with_suffix(".archive")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hostile_documents_are_errors_of_the_tree(fuzzed_path: Path, data: st.DataObject) -> None:
    """Whatever stands in a document, the answer is a known error: no traceback, no hang."""
    logging.disable(logging.WARNING)
    documents = sorted(fuzzed_path.rglob("*.json"))
    file = data.draw(st.sampled_from(documents))
    sound = file.read_bytes()
    document = json.loads(sound)
    place = data.draw(st.sampled_from(places(document)))
    hostile = with_value(document, place, data.draw(HOSTILE))
    index_too = data.draw(st.booleans())  # without the index the records are read
    indexes = {path: path.read_bytes() for path in fuzzed_path.rglob("index/**/*.json")}
    try:
        if index_too and file not in indexes:
            for path in indexes:
                path.unlink()
        file.write_text(as_text(hostile))
        use_everything(fuzzed_path)
    finally:
        for path, content in {file: sound, **indexes}.items():
            path.write_bytes(content)
        logging.disable(logging.NOTSET)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_bytes_are_errors_of_the_tree(fuzzed_path: Path, data: st.DataObject) -> None:
    """Any file replaced by any bytes gives a known error too."""
    logging.disable(logging.WARNING)
    file = data.draw(st.sampled_from([f for f in sorted(fuzzed_path.rglob("*")) if f.is_file()]))
    sound = file.read_bytes()
    try:
        file.write_bytes(data.draw(st.binary(max_size=200)))
        use_everything(fuzzed_path)
    finally:
        file.write_bytes(sound)
        logging.disable(logging.NOTSET)


@settings(max_examples=200, deadline=None)
@given(
    document=st.one_of(
        st.binary(max_size=60),
        st.fixed_dictionaries(
            {"pid": HOSTILE, "host": HOSTILE | st.just(platform.node()), "started": HOSTILE}
        ).map(lambda holder: as_text(holder).encode()),
    ),
    shared=st.booleans(),
)
def test_hostile_locks_are_errors_of_the_tree(document: bytes, shared: bool) -> None:
    """Whatever stands in a lock, it is held by somebody who is named, or is taken over."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        store.create(f"{SHARED}/rank-0" if shared else LOCK, document)
        message = ""
        try:
            WriterLock(store).release()
        except CacheLockedError as error:
            message = str(error)
        assert "is being written by" in message or not list(store.walk())


@pytest.mark.parametrize("column_rows", [1, 64])
@pytest.mark.parametrize("n_rows", [10**9, 2**40])
def test_claimed_rows_are_refused_at_once(toy_path: Path, n_rows: int, column_rows: int) -> None:
    """A root that claims rows for which there are no files is refused before work is done."""
    root = json.loads((toy_path / "zarr.json").read_text())
    place = ("attributes", "llmembed", "splits", "train", "n_rows")
    (toy_path / "zarr.json").write_text(json.dumps(with_value(root, place, n_rows)))
    for name in ("label", "text_hash", "tiny/n_tokens", "tiny/mean/layer_004"):
        file = toy_path / "train" / name / "zarr.json"
        document = with_value(json.loads(file.read_text()), ("shape", 0), n_rows)
        if "/" not in name:
            chunk = ("chunk_grid", "configuration", "chunk_shape", 0)
            document = with_value(document, chunk, column_rows)
        file.write_text(json.dumps(document))
    message = f"split 'train' claims {n_rows:,} rows, and the files of text_hash hold 4,325,376"
    split = open_cache(toy_path)["train"]
    for read in (
        lambda: split.labels,
        lambda: split.features(4, pooling="mean"),
        lambda: split.features(4, pooling="mean", allow_partial=True),
        lambda: split.arrays,
    ):
        with pytest.raises(CacheCorruptError, match=message):
            read()
    assert message in verify(open_store(toy_path)).damage[0].problem
