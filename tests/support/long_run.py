"""What people do to a cache, a run and a server, in random order, with kills at any moment.

python long_run.py SECONDS [SEED [FOLDER]]

A world is a folder with texts, a cache and a run, and what must hold of them. Children act, and die
or meet a failing disk at random operations on files; the parent looks at what they leave. A seed
makes the same world again, kills included. The last line tells what was done, as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from faulty_disk import EIO, ENOSPC, KILL, SHORT, End, Fault, with_fault
from numpy.typing import NDArray
from toy_cache import end_process, tree
from toy_model import N_LAYERS, save_toy_model, toy_texts

from llmembed.cache_format import open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import copy, finalize, remove, verify
from llmembed.common import replace
from llmembed.common.errors import (
    CacheCorruptError,
    CacheFormatError,
    CacheNotFoundError,
    LLMEmbedWarning,
    RunNotFoundError,
)
from llmembed.common.replace import standing
from llmembed.extract import ExtractConfig, extract
from llmembed.train import FitConfig, fit, load_run
from llmembed.train.serving.config import ServeConfig
from llmembed.train.serving.server import serve

LABELS = ("cocoa", "trade")
POOLINGS = ("mean", "last", "max")
MOST_ROWS = {"train": 330, "test": 150}
FIRST_ROWS = {"train": 100, "test": 70}
BLOCK_ROWS = 64
NONE = Fault(KILL, 0)
STEPS_A_WORLD = 40
MOST_TRIES = 12
"""Kills of one act, after which it is let through."""
OF_A_RUN = ("model.safetensors", "predictions.parquet", "held_out.safetensors")

Key: TypeAlias = tuple[str, str, int]
"""Split, pooling, layer."""
Features: TypeAlias = Mapping[Key, NDArray[np.float16]]
"""float16 `[N, H]` each, NaN where no row is committed."""


def texts_of(split: str) -> list[dict[str, str]]:
    """All rows of a split; no text stands there twice."""
    texts = toy_texts(sum(MOST_ROWS.values()), longest=6)
    part = texts[: MOST_ROWS["train"]] if split == "train" else texts[MOST_ROWS["train"] :]
    return [
        {"text": f"w{1 + row % 2} {text}", "label": LABELS[row % 2]}
        for row, text in enumerate(part)
    ]


@dataclasses.dataclass(frozen=True)
class Known:
    """A run as a fit that nobody disturbed made it."""

    files: Mapping[str, bytes]
    proba: NDArray[np.float64]
    """What it says of the asked texts."""


class World:
    """Texts, a cache, a run, and what must hold of them.

    Args:
        folder: an empty one.
        model: the backbone.
        truth: features of all rows, each text computed alone.
        seed: of every choice.
    """

    def __init__(self, folder: Path, model: Path, truth: Features, seed: int) -> None:
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.story: list[str] = []
        self._model, self._truth, self._folder = model, truth, folder
        self._cache, self._run = folder / "toy.zarr", folder / "runs" / "run"
        self._whole_run, self._data = folder / "whole" / "run", folder / "data"
        self._log, self._copy = folder / "log", folder / "copy.zarr"
        self._replayed = folder / "replayed.zarr"
        # Where texts are computed alone, no feature depends on the order of what was asked for.
        self._alone, self._is_repaired = self.random.random() < 0.6, False
        self._is_spoiled = False
        self._lost: set[Key] = set()
        self._n_rows = dict(FIRST_ROWS)
        self._seen: Features = {}
        self._known: dict[int, Known] = {}
        self._n_operations: dict[str, int] = {}
        self._fits = itertools.count(1)
        self._asked = [row["text"] for row in texts_of("test")[:6]] + ["w3 w4", "w1"]
        self._write_texts()

    def step(self) -> None:
        """Do one thing, perhaps several times until it is done, and look at what is left."""
        acts: list[tuple[Callable[[], None], int]] = [(self._extract, 6), (self._grow, 1)]
        if self._seen:
            acts += [(self._ranks, 2), (self._remove, 2), (self._damage, 2), (self._copied, 1)]
        if self._fittable():
            acts += [(self._fit, 4)]
        if self._known:
            acts += [(self._predict, 2), (self._serve, 1), (self._remove_run, 1)]
        (act,) = self.random.choices(*zip(*acts, strict=True))
        act()

    # What is done to the cache

    def _extract(self) -> None:
        config = self._config()
        self._story(f"extract {_told(config)}")
        self._replay(config)
        if self._until_done("extract", lambda: extract(config)):
            self._require_complete(config)

    def _ranks(self) -> None:
        config, world = self._config(), self.random.choice([2, 3])
        self._story(f"{world} ranks extract {_told(config)}")
        self._replay(config)
        ranks = [dataclasses.replace(config, rank=k, world=world) for k in range(world)]
        self.random.shuffle(ranks)
        for rank in ranks:
            if not self._until_done("rank", functools.partial(extract, rank)):
                return
        if not self._is_incomplete() and self._until_done(
            "finalize", lambda: finalize(self._cache)
        ):
            self._require_complete(config)
        self._until_done("extract", lambda: extract(config))

    def _remove(self) -> None:
        key = self.random.choice(sorted(self._seen))
        split, pooling, layer = key
        chosen: dict[str, Any] = self.random.choice(
            [{"layers": [layer]}, {"split": split, "pooling": pooling}, {"split": split}]
        )
        self._story(f"remove {chosen}")
        if not self._alone:
            remove(self._replayed, **chosen)
        gone = {
            key
            for key in self._seen
            if chosen.get("split", key[0]) == key[0]
            and chosen.get("pooling", key[1]) == key[1]
            and key[2] in chosen.get("layers", [key[2]])
        }

        def act() -> None:
            remove(self._cache, **chosen)

        nothing_left = "does not exist. Known" if {*chosen} == {"split"} else "choice; see"
        is_done = self._until_done("remove", act, may_lose=gone, done_says=nothing_left)
        if is_done and not self._alone:
            self._require_same()
        if is_done:
            assert not gone & set(self._seen), f"{chosen} is there still"

    def _damage(self) -> None:
        """Spoil a chunk: `verify` names it, `finalize` withdraws it, and it is extracted again."""
        if self._is_incomplete():
            return
        splits = sorted({split for split, _, _ in self._seen})  # what has arrays to extract again
        places = [f"{split}/*/{below}" for split in splits for below in ("*/*/c.*", "n_*/c.*")]
        chunks = [chunk for place in places for chunk in sorted(self._cache.glob(place))]
        chunk = self.random.choice(chunks)
        sound = chunk.read_bytes()
        how = self.random.choice(["flip", "cut", "remove"])
        self._story(f"{how} {chunk.relative_to(self._cache)}")
        if how == "flip":
            spoiled = bytearray(sound)
            spoiled[self.random.randrange(len(sound))] ^= 1 << self.random.randrange(8)
            chunk.write_bytes(spoiled)
        elif how == "cut":
            chunk.write_bytes(sound[: self.random.randrange(len(sound))])
        else:
            chunk.unlink()
        key = chunk.relative_to(self._cache).as_posix()
        damage = verify(open_store(self._cache)).damage
        assert key in [one.key for one in damage], f"{key} is spoiled; verify names {damage}"
        is_in_rows = how != "flip" or self._rows_differ(chunk, sound)
        if not is_in_rows or self.random.random() < 0.3:
            chunk.write_bytes(sound)
            return
        self._is_repaired = True
        if how == "flip" or self.random.random() < 0.5:  # an extraction sees what is not whole
            with pytest.raises(CacheCorruptError, match="withdrawn"):
                finalize(self._cache)
        split, _, *rest = chunk.relative_to(self._cache).parent.parts
        lost = {(split, rest[0], int(rest[1].removeprefix("layer_")))} if len(rest) == 2 else set()
        self._seen = {key: features for key, features in self._seen.items() if key not in lost}
        arrays = [key for key in self._seen if key[0] == split]
        config = self._config(
            split=(split,),
            layers=",".join(map(str, sorted({layer for _, _, layer in [*arrays, *lost]}))),
            pooling=tuple(sorted({pooling for _, pooling, _ in [*arrays, *lost]})),
        )
        self._replay(config)
        self._is_spoiled, self._lost = True, lost
        self._until_done("repair", lambda: extract(config), may_lose=lost)
        self._is_spoiled, self._lost = False, set()
        self._look()
        self._require_complete(config)

    def _grow(self) -> None:
        """More rows at the end of a split."""
        split = self.random.choice(list(MOST_ROWS))
        n_rows = self._n_rows[split] + self.random.randrange(1, 90)
        self._n_rows[split] = min(n_rows, MOST_ROWS[split])
        self._story(f"{split} grows to {self._n_rows[split]} rows")
        self._write_texts()

    def _copied(self) -> None:
        """A copy of a cache that nobody writes, begun again until it is there."""
        shutil.rmtree(self._copy, ignore_errors=True)
        self._story("copy")
        if (self._cache / ".llmembed/lock").exists():
            end_process(self._cache)
        is_there = f"{self._copy} exists"
        if self._until_done("copy", lambda: copy(self._cache, self._copy), done_says=is_there):
            assert _lasting(self._copy) == _lasting(self._cache)

    # What is done to the run

    def _fit(self) -> None:
        number = next(self._fits)
        layer_sets = self._fittable()
        pooling, layers = self.random.choice(layer_sets)
        chosen = sorted(self.random.sample(layers, self.random.randint(1, len(layers))))
        config = FitConfig(
            cache=str(self._cache),
            layers=",".join(map(str, chosen)),
            pooling=(pooling,),
            fusion=self.random.choice(["mean", "concat"]),
            head=self.random.choice(["ridge", "lda"]),
            seed=number,
            baseline="none",
            accelerator="cpu",
            output=str(self._run),
            overwrite=True,
        )
        self._story(f"fit {number}: {config.fusion}, {config.head}, {pooling} {config.layers}")
        whole = fit(dataclasses.replace(config, output=str(self._whole_run)))
        self._known[number] = Known(
            files={name: (self._whole_run / name).read_bytes() for name in OF_A_RUN},
            proba=whole.predict_proba(self._asked, "cpu"),
        )
        before = self._run_number()
        if self._until_done("fit", lambda: fit(config), one_of={before, number}):
            assert self._run_number() == number
            if self._beside_the_run():  # what could not be cleared, the next fit clears
                fit(config)
            left = self._beside_the_run()
            assert not left, f"a fit that ended leaves {left}"

    def _beside_the_run(self) -> list[str]:
        return [path.name for path in self._run.parent.iterdir() if path != self._run]

    def _predict(self) -> None:
        number = self._run_number()
        self._story(f"predict by {number}")
        if number:
            with _ours_ignored():
                proba = load_run(self._run).predict_proba(self._asked, "cpu")
            np.testing.assert_array_equal(proba, self._known[number].proba)

    def _serve(self) -> None:
        """A server answers as the run does that it was started with, whatever becomes of it."""
        number = self._run_number()
        if not number:
            return
        self._story(f"serve {number}")
        ready, tell = os.pipe()
        child = os.fork()
        if not child:
            os.close(ready)
            _serve_for_ever(self._run, tell, self._log)
        os.close(tell)
        with os.fdopen(ready) as pipe:
            url = pipe.readline().strip()
        assert url, f"the server does not begin:\n{self._log.read_text()}"
        self._ask(url, number)
        if self.random.random() < 0.5 and not _is_hidden(self._run):
            self._story("remove the run that is served")
            aside = self._run.with_name("aside")
            self._run.rename(aside)
            self._ask(url, number)
            aside.rename(self._run)
        end = self.random.choice([signal.SIGTERM, signal.SIGKILL])
        self._story(f"end the server by {end.name}")
        os.kill(child, end)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (0 if end == signal.SIGTERM else -end), self._log.read_text()
        self.kills["serve"] += end == signal.SIGKILL
        self.done["serve"] += 1

    def _ask(self, url: str, number: int) -> None:
        body = json.dumps({"texts": self._asked}).encode()
        request = urllib.request.Request(  # noqa: S310
            f"{url}predict", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            found = json.load(answer)["predictions"]
        told = [{one["label"]: one["probability"] for one in row["labels"]} for row in found]
        proba = [[row[label] for label in LABELS] for row in told]
        np.testing.assert_allclose(proba, self._known[number].proba, atol=1e-6)

    def _remove_run(self) -> None:
        self._story("remove the run")
        shutil.rmtree(self._run.parent, ignore_errors=True)

    # What must hold

    def _until_done(
        self,
        name: str,
        act: Callable[[], object],
        *,
        may_lose: Set[Key] = frozenset(),
        done_says: str = "it says no such thing",
        one_of: set[int] | None = None,
    ) -> bool:
        """Act, killed again and again, look at what is left each time; tell whether it was done.

        Args:
            name: of what is done.
            act: it.
            may_lose: what it removes.
            done_says: part of the refusal where a kill came when all was done.
            one_of: numbers of the runs that may stand at the place.
        """
        for attempt in range(MOST_TRIES + 1):
            fault = self._fault(name) if attempt < MOST_TRIES else NONE
            end = self._disturbed(act, fault)
            if attempt and done_says in end.said:
                end = End("done", n_seen=end.n_seen)
            self._note(name, fault, end)
            self._look(may_lose=may_lose, is_done=end.how == "done")
            if one_of is not None:
                assert self._run_number() in one_of
            if end.how == "done":
                before = self._n_operations.get(name, 0)
                self._n_operations[name] = max(end.n_seen, before // 2)
                self.done[name] += 1
                return True
            if self._alone and name not in ("remove", "repair") and self.random.random() < 0.2:
                self._story(f"leave {name} undone")
                return False
        raise AssertionError(f"{name} does not end")

    def _disturbed(self, act: Callable[[], object], fault: Fault) -> End:
        """Act in a child of which one operation on files fails."""
        can_exchange = self.random.random() < 0.7

        def in_child() -> None:
            warnings.simplefilter("ignore", LLMEmbedWarning)
            if not can_exchange:  # as on systems that cannot exchange folders in one step
                replace.exchange = lambda *_: False
            act()

        return with_fault(in_child, self._folder, fault)

    def _fault(self, name: str) -> Fault:
        if self.random.random() < 0.15:
            return NONE
        most = max(8, self._n_operations.get(name, 60))
        (kind,) = self.random.choices([KILL, EIO, ENOSPC, SHORT], [10, 1, 1, 1])
        return Fault(kind, self.random.randint(1, most + most // 8))

    def _note(self, name: str, fault: Fault, end: End) -> None:
        assert end.how != "raw", f"{name} ends in a traceback:\n{end.said}"
        is_met = end.how != "done" or 0 < fault.at <= end.n_seen
        what = f"{fault.kind} at operation {fault.at}" if is_met else "nothing happens"
        self._story(f"  {name}: {what}: {end.how} {end.said}")
        if end.how == "killed":
            self.kills[name] += 1
        elif end.how == "told":
            assert fault.kind != KILL, f"{name} ends with {end.said}"
            self.errors[name] += 1

    def _look(self, *, may_lose: Set[Key] = frozenset(), is_done: bool = True) -> None:
        """Nothing committed is lost, each row is right, and nothing is damaged.

        A removal that is not done may leave a root that lists what is half gone.
        """
        now = self._read()
        for key, features in now.items():
            self._check_rows(key, features)
        for key in set(self._seen) - may_lose:
            before = ~np.isnan(self._seen[key]).any(axis=1)
            after = ~np.isnan(now[key]).any(axis=1) if key in now else np.zeros(0, bool)
            lost = [row for row in np.flatnonzero(before) if row >= len(after) or not after[row]]
            assert not lost, f"{key} has lost rows {lost[:5]} ({len(lost)} in all)"
        self._seen = {key: features for key, features in now.items() if _has_rows(features)}
        if now and not self._is_spoiled:
            damage = verify(open_store(self._cache)).damage
            if may_lose and not is_done:
                damage = tuple(one for one in damage if one.key != "zarr.json")
            assert not damage, f"nobody spoiled anything, and verify names {damage}"

    def _read(self) -> Features:
        try:
            cache = open_cache(self._cache)
        except (CacheNotFoundError, CacheFormatError):
            assert not self._seen, "the cache is gone"
            return {}
        found = {}
        for name in cache.splits:
            split = cache[name]
            assert split.n_rows in range(FIRST_ROWS[name], self._n_rows[name] + 1)
            expected = [LABELS.index(row["label"]) for row in texts_of(name)[: split.n_rows]]
            if split.layouts:
                order = [cache.labels.index(label) for label in LABELS]
                np.testing.assert_array_equal(split.labels, np.array(order)[expected])
            for source, pooling, layer in split.arrays:
                if (name, pooling, layer) not in self._lost:
                    features = split.features(layer, source, pooling, allow_partial=True)
                    found[name, pooling, layer] = features
        return found

    def _check_rows(self, key: Key, features: NDArray[Any]) -> None:
        there = ~np.isnan(features).any(axis=1)
        truth = self._truth if self._alone else self._replay_seen
        if there.any():
            right = truth[key][: len(features)][there]
            differ = (features[there].view(np.uint16) != right.view(np.uint16)).any(axis=1)
            rows = np.flatnonzero(there)[differ]
            assert not len(rows), f"{key}: rows {rows[:5]} differ ({len(rows)} in all)"

    def _require_complete(self, config: ExtractConfig) -> None:
        layers = [int(layer) for layer in config.layers.split(",")]
        for key in itertools.product(config.split or MOST_ROWS, config.pooling, layers):
            assert key in self._seen, f"{key} was extracted, and is not there"
            assert len(self._seen[key]) == self._n_rows[key[0]]
            assert not np.isnan(self._seen[key]).any(), f"{key} lacks rows"
        if not self._alone:
            self._require_same()

    def _require_same(self) -> None:
        ours, whole = _lasting(self._cache), _lasting(self._replayed)
        if self._is_repaired:  # what was withdrawn is committed by records of its own
            for files in (ours, whole):
                for name in [name for name in files if name.startswith(".llmembed/commits")]:
                    del files[name]
        differing = sorted(
            name for name in ours.keys() | whole.keys() if ours.get(name) != whole.get(name)
        )
        assert not differing, f"{differing} are not those of an undisturbed way to the same cache"

    def _replay(self, config: ExtractConfig) -> None:
        """Do the same to a cache that nobody disturbs, where texts are computed together."""
        if not self._alone:
            again = dataclasses.replace(config, cache=str(self._replayed))
            end = self._disturbed(lambda: extract(again), NONE)
            assert end.how == "done", end.said
            cache = open_cache(self._replayed)
            self._replay_seen: Features = {
                (name, pooling, layer): cache[name].features(
                    layer, source, pooling, allow_partial=True
                )
                for name in cache.splits
                for source, pooling, layer in cache[name].arrays
            }

    def _run_number(self) -> int:
        """Tell which run stands at the place, which is whole; 0 for none."""
        with _ours_ignored():
            try:
                run = load_run(self._run)
            except RunNotFoundError:
                return 0
        number = int(run.config["fit"]["seed"])
        folder = standing(self._run)
        for name, content in self._known[number].files.items():
            assert (folder / name).read_bytes() == content, f"{name} is not of run {number}"
        return number

    # What is chosen

    def _config(self, **given: Any) -> ExtractConfig:
        poolings = sorted(self.random.sample(POOLINGS, self.random.choice([1, 1, 2])))
        layers = sorted(self.random.sample(range(N_LAYERS + 1), self.random.choice([1, 1, 2, 3])))
        chosen = {
            "layers": ",".join(map(str, layers)),
            "pooling": tuple(poolings),
            "split": self.random.choice([(), (), ("train",), ("test",)]),
        }
        return extraction(self._model, self._data, self._cache, alone=self._alone, **chosen | given)

    def _fittable(self) -> list[tuple[str, list[int]]]:
        """List poolings with the layers that both splits have whole."""
        whole = {key for key, features in self._seen.items() if not np.isnan(features).any()}
        found = []
        for pooling in POOLINGS:
            layers = [
                layer
                for layer in range(N_LAYERS + 1)
                if {("train", pooling, layer), ("test", pooling, layer)} <= whole
            ]
            if layers:
                found.append((pooling, layers))
        return found

    def _is_incomplete(self) -> bool:
        return bool(verify(open_store(self._cache)).incomplete)

    def _rows_differ(self, chunk: Path, sound: bytes) -> bool:
        """Whether a flipped bit lies in rows, not in what pads the last chunk, nor in its sum."""
        spoiled = chunk.read_bytes()
        (at,) = [at for at, (a, b) in enumerate(zip(sound, spoiled, strict=True)) if a != b]
        split, index = chunk.relative_to(self._cache).parts[0], int(chunk.name.split(".")[1])
        n_rows = min(BLOCK_ROWS, open_cache(self._cache)[split].n_rows - index * BLOCK_ROWS)
        row_bytes = (len(sound) - 4) // BLOCK_ROWS
        return at < n_rows * row_bytes

    def _write_texts(self) -> None:
        self._data.mkdir(exist_ok=True)
        for split, n_rows in self._n_rows.items():
            lines = "\n".join(map(json.dumps, texts_of(split)[:n_rows]))
            (self._data / f"{split}.jsonl").write_text(lines, encoding="utf-8")

    def _story(self, line: str) -> None:
        self.story.append(line)


def extraction(
    model: Path, data: Path, cache: Path, *, alone: bool, **options: Any
) -> ExtractConfig:
    """The options of an extraction; `alone` computes each text by itself."""
    return ExtractConfig(
        model=str(model),
        dataset=str(data),
        cache=str(cache),
        max_length=16,
        compute_dtype="float32",
        device="cpu",
        token_budget=1 if alone else 200,
        **options,
    )


def _told(config: ExtractConfig) -> str:
    splits = " and ".join(config.split or MOST_ROWS)
    return f"{'+'.join(config.pooling)} {config.layers} of {splits}"


def _lasting(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but locks and what is not finished."""
    passing = (".llmembed/lock", ".llmembed/shared", ".llmembed/tmp")
    return {name: data for name, data in tree(cache).items() if not name.startswith(passing)}


def _has_rows(features: NDArray[Any]) -> bool:
    return bool((~np.isnan(features).any(axis=1)).any())


def _is_hidden(run: Path) -> bool:
    return standing(run) != run


@contextmanager
def _ours_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LLMEmbedWarning)
        yield


def _serve_for_ever(run: Path, tell: int, log: Path) -> None:
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        warnings.simplefilter("ignore", LLMEmbedWarning)
        config = ServeConfig(run=str(run), port=0, device="cpu")
        serve(config, lambda url: os.write(tell, f"{url}\n".encode()))
        code = 0
    except BaseException:  # noqa: BLE001 - the parent tells it
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def warm(folder: Path) -> tuple[Path, Features]:
    """Make the model and the right features, and import what children need."""
    torch.set_num_threads(1)
    model, data = save_toy_model(folder / "toy", "llama"), folder / "data"
    data.mkdir()
    for split in MOST_ROWS:
        lines = "\n".join(map(json.dumps, texts_of(split)))
        (data / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    layers = ",".join(map(str, range(N_LAYERS + 1)))
    config = extraction(
        model, data, folder / "truth.zarr", alone=True, layers=layers, pooling=POOLINGS
    )
    extract(config)
    cache = open_cache(folder / "truth.zarr")
    truth = {
        (split, pooling, layer): cache[split].features(layer, source, pooling).copy()
        for split in cache.splits
        for source, pooling, layer in cache[split].arrays
    }
    options = {"cache": config.cache, "layers": "1", "pooling": ("mean",), "accelerator": "cpu"}
    for head in ("ridge", "lda"):
        run = fit(
            FitConfig(
                **options,  # type: ignore[arg-type]
                fusion="mean",
                head=head,
                baseline="none",
                output=str(folder / "warm"),
                overwrite=True,
            )
        )
    run.predict_proba(["w1 w2"], "cpu")
    return model, truth


def main() -> None:
    """Live in one world after the other until the time is over."""
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 0
    root = Path(sys.argv[3]) if sys.argv[3:] else Path(tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "SOURCE_DATE_EPOCH": "1700000000",
        "LLMEMBED_HOME": str(root / "home"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    model, truth = warm(root)
    kills: Counter[str] = Counter()
    done: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    end, n_worlds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        folder = root / f"world-{seed}"
        folder.mkdir()
        world = World(folder, model, truth, seed)
        try:
            for _ in range(STEPS_A_WORLD):
                if time.monotonic() > end:
                    break
                world.step()
        except BaseException:
            sys.stderr.write("\n".join([f"seed {seed} in {folder}:", *world.story[-40:], ""]))
            raise
        kills += world.kills
        done += world.done
        errors += world.errors
        shutil.rmtree(folder)
        seed, n_worlds = seed + 1, n_worlds + 1
    told = {"kills": kills, "done": done, "errors": errors, "worlds": n_worlds}
    sys.stdout.write(f"{json.dumps({**told, 'n_kills': kills.total()})}\n")


if __name__ == "__main__":
    main()
