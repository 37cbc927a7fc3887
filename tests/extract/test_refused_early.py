"""A cache that cannot be written is refused before the model is looked for.

`ELSEWHERE` is a model that is not on this machine: who asks for it is told so by a
`ModelNotFoundError`. A refusal by the cache shows that nobody had asked.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_cache import set_format, tree
from toy_model import toy_texts

from llmembed.cache_format import CacheWriter, open_cache
from llmembed.cache_format.layout.schema import FORMAT_VERSION, MINOR_VERSION
from llmembed.common.errors import (
    CacheFormatError,
    CacheLockedError,
    CacheMismatchError,
    ConfigError,
    LLMEmbedWarning,
    ModelNotFoundError,
)
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.dry_run import plan_extraction
from llmembed.extract.engines import local
from llmembed.extract.engines.task import Cluster
from llmembed.extract.pipeline import prepare

ELSEWHERE = "some/toy-llama"
BY_US = f"toy.zarr is being written by process {os.getpid()} on host"

Configure = Callable[..., ExtractConfig]


@pytest.fixture
def config(llama: Path, write_csv: Any, tmp_path: Path) -> Configure:
    """An extraction of 150 texts by a model that is here."""
    settings: dict[str, Any] = {
        "model": str(llama),
        "layers": "1,3",
        "pooling": ("mean",),
        "dataset": str(write_csv()),
        "cache": str(tmp_path / "toy.zarr"),
        "max_length": 16,
        "compute_dtype": "float32",
    }
    return lambda **changes: ExtractConfig(**settings | changes)


def locked(config: ExtractConfig, shared: str | None = None) -> CacheWriter:
    """Give a writer of the cache there is: from its `with` on it has the lock."""
    path = str(config.cache)
    return CacheWriter(path, dataset=open_cache(path).dataset, shared=shared)


@pytest.mark.parametrize("ask", [extract, plan_extraction])
def test_other_texts_are_told_first(config: Configure, write_csv: Any, ask: Any) -> None:
    """Other texts, labels, and fewer rows are refused as they are where the model is here."""
    texts = toy_texts(150)
    path = Path(extract(config()).path)
    before = tree(path)
    for others, message in (
        ({"texts": [*texts[:70], "w90", *texts[71:]]}, "row 70 of split 'train'"),
        ({"labels": ["no", "yes"] * 70 + ["no"] * 10}, "row 141 of split 'train'"),
        ({"labels": ["no", "maybe"] * 75}, "with labels ('no', 'yes'), but ('maybe', 'no')"),
        ({"texts": texts[:100]}, "has 150 rows, but 100 were given"),
    ):
        write_csv(**others)
        for model in (config().model, ELSEWHERE):
            with pytest.raises(CacheMismatchError, match=re.escape(message)):
                ask(config(model=model))
    assert tree(path) == before


@pytest.mark.parametrize("ask", [extract, plan_extraction])
def test_another_format_is_told_first(config: Configure, tmp_path: Path, ask: Any) -> None:
    """So are a folder that is no cache and a cache of a later version."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CacheFormatError, match="mine exists and is not a cache"):
            ask(config(model=ELSEWHERE, cache=str(tmp_path / "mine"), overwrite=overwrite))
    path = Path(extract(config()).path)
    for newer in ({"minor": MINOR_VERSION + 1}, {"format": FORMAT_VERSION + 1}):
        set_format(path, **newer)
        with pytest.raises(CacheFormatError, match="Upgrade with"):
            ask(config(model=ELSEWHERE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "backbone: cache 'toy-llama', given 'some/toy-llama'."),
        ({"max_length": 8}, "; max_length: cache 16, given 8."),
        ({"template": "say {text}"}, "; template: cache None, given 'say {text}'."),
        ({"compute_dtype": "bfloat16"}, "; compute_dtype: cache 'float32', given 'bfloat16'."),
        ({"quantize": "fp8"}, "; quantize: cache None, given 'fp8'."),
    ],
)
def test_another_backbone_is_told_first(
    config: Configure, changes: dict[str, Any], message: str
) -> None:
    """What the options say of a source is compared before what the files say."""
    extract(config())
    with pytest.raises(CacheMismatchError, match=re.escape(message)):
        extract(config(model=ELSEWHERE, **changes))
    with pytest.raises(ModelNotFoundError):
        extract(config(model=ELSEWHERE, source="second"))


def test_what_the_model_lowers_is_no_other_backbone(config: Configure) -> None:
    """A --max-length beyond the positions of the model, which the cache has, contradicts none."""
    for n_rows in (150, 0):
        with pytest.warns(LLMEmbedWarning, match="texts are cut at 64 tokens"):
            done = extract(config(max_length=512, compute_dtype="auto"))
        assert done.n_rows_computed == n_rows


@pytest.mark.parametrize(
    ("shared", "message"),
    [(None, BY_US), ("rank-0-of-2", f"by rank-0-of-2, process {os.getpid()}")],
    ids=["alone", "shared"],  # workers of pytest would not agree on the number of a process
)
def test_a_cache_that_is_being_written_is_told_first(
    config: Configure, shared: str | None, message: str
) -> None:
    """Rows that are missing, or to be replaced, cannot be written beside who shares nothing."""
    extract(config())
    with locked(config(), shared):
        for changes in (
            {"layers": "2"},
            {"model": ELSEWHERE, "source": "second"},
            {"model": ELSEWHERE, "overwrite": True},
        ):
            with pytest.raises(CacheLockedError, match=message):
                extract(config(**changes))


def test_a_cache_that_only_begins_is_told_first(config: Configure, tmp_path: Path) -> None:
    """A lock is there before the root is."""
    source = open_cache(extract(config()).path).sources["toy-llama"]
    dataset = open_cache(str(config().cache)).dataset
    path = tmp_path / "new/toy.zarr"
    with CacheWriter(path, dataset=dataset) as writer:
        writer.add_source(source)
        (path / "zarr.json").unlink()
        with pytest.raises(CacheLockedError, match=BY_US):
            extract(config(model=ELSEWHERE, cache=str(path)))


def test_who_writes_nothing_asks_for_no_lock(config: Configure) -> None:
    """A complete extraction and a dry run go on beside another writer."""
    extract(config())
    with locked(config()):
        assert extract(config(layers="3")).n_rows_computed == 0
        assert plan_extraction(config(layers="2")).n_rows_missing == 150
        with pytest.raises(ConfigError, match="layer 4 does not exist in toy-llama"):
            extract(config(layers="4"))


def test_a_lock_that_comes_later_is_refused_too(config: Configure) -> None:
    """Who takes the lock between the question and the first block keeps it."""
    task = prepare(config())
    plans, _ = task.plan_only()
    cluster = Cluster(
        address=None,
        workers=1,
        gpus_per_worker=None,
        on_cpu=True,
        arithmetic_is_ours=False,
        texts=config().dataset_options,
    )
    work = local.begin(task, plans, cluster)
    with task.open_writer() as writer:
        writer.add_source(dataclasses.replace(task.source, name="second"))
        before = tree(Path(str(config().cache)))
        with pytest.raises(CacheLockedError, match=BY_US):
            work(lambda *_: None)
        assert tree(Path(str(config().cache))) == before
