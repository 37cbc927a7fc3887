"""Targets: the documents of a cache in memory, and every file of caches on disk."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import JSON, Targets, Try, as_bytes, mutated, mutated_json
from numpy.typing import NDArray
from toy_cache import tree, write_toy
from toy_rows import write_rows

from llmembed.cache_format import open_cache
from llmembed.cache_format.layout.commits import is_half_written, read_layout, sources_of
from llmembed.cache_format.layout.documents import parse_array
from llmembed.cache_format.layout.schema import content_digest, require_header
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import convert, verify
from llmembed.common.errors import LLMEmbedError

ROOT, GROUP, ARRAY = "zarr.json", "train/tiny/zarr.json", "train/tiny/mean/layer_008"
N_ROWS = 70  # of the caches that are damaged: two blocks


class Documents:
    """A store of a single document, for reading."""

    path: Path | None = None
    location = "memory.zarr"

    def __init__(self) -> None:
        self.data: bytes | None = None

    def is_folder(self) -> bool | None:
        return True

    def get(self, key: str) -> bytes | None:
        return self.data

    def names(self, prefix: str) -> list[str]:
        return ["zarr.json"]


class Headers:
    """The parsers of every document that a cache has, on bytes: no file, no thread."""

    def __init__(self, _: ExitStack) -> None:
        with tempfile.TemporaryDirectory() as folder:
            plain, rows, archive = (Path(folder, name) for name in ("plain", "rows", "archive"))
            write_toy(plain, N_ROWS, layers=[8], poolings=["mean"])
            write_rows(rows)
            convert(plain, archive, archive=True)
            self.roots = [json.loads((one / ROOT).read_bytes()) for one in (plain, rows, archive)]
            for root in self.roots:
                root.pop("consolidated_metadata", None)
            arrays = [(plain, ARRAY), (plain, "train/label"), (rows, "train/labels")]
            arrays.append((archive, ARRAY))
            self.arrays = [(one / key / ROOT).read_bytes() for one, key in arrays]
            self.group = (plain / GROUP).read_bytes()
            store: Any = open_store(plain)
            (self.stored,) = sources_of(store, require_header(store))
            self.records = {key: (plain / key).read_bytes() for key in self.stored.records}
            self.index = (plain / self.stored.index_key("mean/layer_008")).read_bytes()
        self.store: Any = Documents()
        self.stored._store = self.store
        self.others = [*self.arrays, self.group, *self.records.values(), self.index]
        parsers = (self.root, self.array, self.layout, self.record, self.by_index)
        self.parsers = (*parsers, self.array, self.record)

    def __call__(self, rng: random.Random) -> bool:
        rng.choice(self.parsers)(rng)
        return True

    def root(self, rng: random.Random) -> None:
        document = rng.choice(self.roots)
        self.store.data = self._damaged(rng, as_bytes(document))
        if rng.random() < 0.8:  # the digest would hide what is in it
            attributes = document["attributes"]
            content = mutated_json(rng, attributes["llmembed"])
            if isinstance(content, dict):
                content = {**content, "digest": _digest(content)}
            self.store.data = as_bytes({"attributes": {**attributes, "llmembed": content}})
        header = require_header(self.store)
        assert header.fingerprint()

    def array(self, rng: random.Random) -> None:
        info = parse_array(self._damaged(rng, rng.choice(self.arrays)), "memory.zarr/a/zarr.json")
        assert info.chunk_key(0)
        assert info.chunk_bytes
        assert info.numpy_dtype

    def layout(self, rng: random.Random) -> None:
        self.store.data = self._damaged(rng, self.group)
        read_layout(self.store, "train", "tiny")

    def record(self, rng: random.Random) -> None:
        key, data = rng.choice(list(self.records.items()))
        self.store.data = self._damaged(rng, data)
        if self.stored._read_record(key) is None:
            assert is_half_written(self.store.data)

    def by_index(self, rng: random.Random) -> None:
        self.store.data = self._damaged(rng, self.index)
        found = self.stored._by_index("mean/layer_008")
        assert found is None or len(found.hashes) == len(self.stored.expected)

    def _damaged(self, rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.3:
            return mutated(rng, data, self.others)
        return as_bytes(mutated_json(rng, json.loads(data)))


def _digest(content: dict[str, JSON]) -> str:
    try:
        return content_digest(content)
    except (ValueError, RecursionError):  # NaN and depth, which `dump` refuses
        return "0" * 32


def on_disk(kind: str, stack: ExitStack) -> Try:
    """Any file of a cache, damaged, swapped with another or gone; all is read and verified."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    place = folder / "toy.zarr"
    write_toy(folder / "plain", N_ROWS, layers=[8], poolings=["mean"])
    if kind == "rows":
        write_rows(place)
    elif kind == "archive":
        convert(folder / "plain", place, archive=True)
    else:
        place = folder / "plain"
    sound, features = tree(place), _read_all(place)
    documents = {key: data for key, data in sound.items() if key.endswith(".json")}

    def one(rng: random.Random) -> bool:
        key = rng.choice(list(sound if rng.random() < 0.5 else documents))
        data: bytes | None = sound[key]
        assert data is not None
        match rng.randrange(8):
            case 0:
                data = rng.choice([None, b"", rng.choice(list(sound.values()))])
            case 1 | 2:
                data = mutated(rng, data, list(sound.values()))
            case _ if key in documents:
                document = mutated_json(rng, json.loads(data))
                try:
                    content = document["attributes"]["llmembed"]
                    if "digest" in content:
                        content["digest"] = content_digest(content)
                except (KeyError, TypeError, ValueError, RecursionError):
                    pass
                data = as_bytes(document)
            case _:
                data = mutated(rng, data)
        path = place / key
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        try:
            read = _read_all(place)
            assert all(
                np.array_equal(features.get(key, found), found) for key, found in read.items()
            )
            result = verify(open_store(place))
            return not result.damage and not result.incomplete
        finally:
            path.write_bytes(sound[key])

    return one


def _read_all(place: Path) -> dict[tuple[str, str, int], NDArray[Any]]:
    """Read all that a cache says it has; one that refuses to be read can be verified, or not."""
    features = {}
    try:
        cache = open_cache(place)
        for name in cache.splits:
            split = cache[name]
            for column in (split.labels, split.text_hash, split.label_sets, split.weights):
                assert column is None or len(column) == split.n_rows
            for source, pooling, layer in split.arrays:
                found = split.features(layer, source, pooling, verify=True)
                assert len(found) == len(split.n_tokens(source))
                split.features(layer, source, pooling, rows=[0], allow_partial=True)
                features[source, pooling, layer] = found.copy()
    except LLMEmbedError:
        with suppress(LLMEmbedError):
            verify(open_store(place))
        raise
    return features


TARGETS: Targets = {
    "headers": Headers,
    **{kind: functools.partial(on_disk, kind) for kind in ("plain", "rows", "archive")},
}
