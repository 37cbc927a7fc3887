"""Caches as data sets of the Hub, by the real client against a stand-in on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hub_stand_in import HubStandIn, Repository, hub_on_this_machine
from toy_cache import SOURCE, assert_toy, tree, write_toy

from llmembed.cache_format import open_cache
from llmembed.cache_format.cli import main as cache_main
from llmembed.cache_format.stores import hub as hub_store
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import convert, copy, remove
from llmembed.common.errors import (
    CacheCorruptError,
    CacheFormatError,
    CacheNotFoundError,
    CacheStorageError,
    ConfigError,
    LLMEmbedError,
    LLMEmbedWarning,
)
from llmembed.extract import ExtractConfig

# Without Xet the client of huggingface_hub 2.4 uploads as httpx2 no longer wants it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
URL = "hf://datasets/me/features/toy.zarr"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with hub_on_this_machine(str(tmp_path / "hub")) as server:
        yield server


@pytest.fixture
def local(tmp_path: Path) -> Path:
    write_toy(tmp_path / "toy.zarr", 100, poolings=["mean"])
    return tmp_path / "toy.zarr"


def repository(hub: HubStandIn) -> Repository:
    return hub.repositories["datasets", "me/features"]


def commits(hub: HubStandIn) -> list[dict[str, bytes]]:
    """The files of every commit but the first, which the Hub itself makes."""
    return list(repository(hub).commits.values())[1:]


def test_a_cache_goes_to_the_hub_and_back(hub: HubStandIn, local: Path, tmp_path: Path) -> None:
    """It becomes one commit of a private data set, is read there, and comes back byte for byte."""
    assert copy(local, URL) == len(tree(local))
    assert_toy(open_cache(URL), 100)
    assert repository(hub).private
    (files,) = commits(hub)
    assert {key.partition("/")[0] for key in files} == {".gitattributes", "toy.zarr"}
    copy(URL, tmp_path / "back.zarr")
    assert tree(tmp_path / "back.zarr") == tree(local)
    with pytest.raises(CacheFormatError, match="exists"):
        copy(local, URL)


def test_the_command_copies_and_tells(hub: HubStandIn, local: Path) -> None:
    """llmembed-cache copy, info and verify take hf:// as any other place."""
    done = CliRunner().invoke(cache_main, ["copy", str(local), URL])
    assert done.exit_code == 0, done.output
    assert f"copied to {URL}, every hash holds" in done.output
    assert CliRunner().invoke(cache_main, ["verify", URL]).exit_code == 0
    assert json.loads(CliRunner().invoke(cache_main, ["info", URL, "--json"]).stdout)


def test_a_half_upload_is_no_cache_and_is_taken_up(
    hub: HubStandIn, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the second commit fails there is no root; run again, nothing is sent twice."""
    monkeypatch.setattr(hub_store, "_UPLOAD_FILES", 3)
    monkeypatch.setattr(hub_store, "_COMMIT_FILES", 6)
    send, sent = hub_store.HubStore._put_commit, []

    def failing(store: Any, additions: list[Any]) -> None:
        if sent:
            hub.refusals.append(("commit", 503, "Unavailable"))
        sent.append(len(additions))
        send(store, additions)

    monkeypatch.setattr(hub_store.HubStore, "_put_commit", failing)
    with pytest.raises(CacheStorageError, match=r"the Hub failed with status 503.*again later"):
        copy(local, URL)
    (first,) = commits(hub)
    assert "toy.zarr/zarr.json" not in first
    with pytest.raises(CacheFormatError, match="is not a cache"):
        open_cache(URL)
    hub.refusals.clear()
    monkeypatch.setattr(hub_store.HubStore, "_put_commit", send)
    copy(local, URL)
    assert_toy(open_cache(URL), 100)
    assert len(hub.uploaded) == len(set(hub.uploaded))
    roots = ["toy.zarr/zarr.json" in files for files in commits(hub)]
    assert roots == [False] * (len(roots) - 1) + [True]


def test_a_cache_there_is_never_written_over(hub: HubStandIn, local: Path, tmp_path: Path) -> None:
    """Where the listing fails, or somebody else commits meanwhile, the copy stops."""
    copy(local, URL)
    before = dict(repository(hub).commits)
    hub.refusals.append(("/tree/", 500, "Broken"))
    write_toy(tmp_path / "other.zarr", 130, poolings=["mean"])
    with pytest.raises(CacheStorageError, match="failed with status 500"):
        copy(tmp_path / "other.zarr", URL)
    hub.refusals.clear()
    assert repository(hub).commits == before
    store = open_store("hf://datasets/me/features/other.zarr")
    repository(hub).commit("main", {})
    with pytest.raises(CacheStorageError, match="was changed by somebody else meanwhile"):
        store.put_all([("zarr.json", b"{}")])
    assert repository(hub).at("main")[1] == {}


def test_what_is_read_is_one_commit(hub: HubStandIn, local: Path, tmp_path: Path) -> None:
    """An open cache stays what it was when its branch moves; a revision can be named."""
    copy(local, URL)
    opened, before = open_cache(URL), repository(hub).refs["main"]
    files = dict(repository(hub).at("main")[1])
    del files["toy.zarr/train/tiny/mean/layer_008/c.1.0"]
    repository(hub).commit("main", files)
    assert_toy(opened, 100)
    with pytest.raises(CacheCorruptError, match="is missing"):
        open_cache(URL)["train"].features(8, verify=True)
    assert_toy(open_cache(f"hf://datasets/me/features@{before}/toy.zarr"), 100)


def test_damage_on_the_hub_is_found(hub: HubStandIn, local: Path, tmp_path: Path) -> None:
    """A changed byte is found by reading with hashes, and by a copy from there."""
    copy(local, URL)
    files = dict(repository(hub).at("main")[1])
    key = "toy.zarr/train/tiny/mean/layer_008/c.1.0"
    files[key] = bytes([files[key][0] ^ 1]) + files[key][1:]
    repository(hub).commit("main", files)
    with pytest.raises(CacheCorruptError):
        open_cache(URL)["train"].features(8, verify=True)
    with pytest.raises(CacheCorruptError):
        copy(URL, tmp_path / "back.zarr")


def test_an_archive_on_the_hub_is_read(hub: HubStandIn, local: Path, tmp_path: Path) -> None:
    """Sharded and compressed arrays come through zarr-python."""
    convert(local, tmp_path / "archive.zarr", archive=True)
    copy(tmp_path / "archive.zarr", "hf://datasets/me/features/archive.zarr")
    assert_toy(open_cache("hf://datasets/me/features/archive.zarr"), 100)


def test_nothing_is_written_piece_by_piece(hub: HubStandIn, local: Path) -> None:
    """Extraction, removal and merging are told to work locally and to copy; nothing changes."""
    copy(local, URL)
    before = dict(repository(hub).commits)
    way_out = rf"put whole.*llmembed-cache copy FOLDER {URL}"
    with pytest.raises(ConfigError, match=way_out):
        ExtractConfig(model="minilm", layers="1", cache=URL)
    with pytest.raises(ConfigError, match=way_out):
        remove(URL, layers=[4])
    with pytest.raises(ConfigError, match=way_out):
        write_toy(URL, 130)
    assert repository(hub).commits == before


def test_places_of_this_machine_are_told(hub: HubStandIn, tmp_path: Path) -> None:
    """Who uploads a cache that knows local paths hears which."""
    source = SOURCE.__class__(**{**vars(SOURCE), "recipe": {"model": "/home/me/model"}})
    write_toy(tmp_path / "toy.zarr", 100, poolings=["mean"], source=source)
    with pytest.warns(LLMEmbedWarning, match=r"on this machine: /home/me/model\. Keep"):
        copy(tmp_path / "toy.zarr", URL)


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((401, "RepoNotFound"), "the Hub shows no data set 'me/features'. Check the name"),
        ((403, "GatedRepo"), "data set 'me/features' is gated. Accept its terms"),
        ((403, "Forbidden"), "refuses data set 'me/features' (status 403). Set HF_TOKEN"),
        ((404, "RevisionNotFound"), "data set 'me/features' has no such revision"),
        ((429, "TooMany"), "the Hub was asked too often (status 429). Wait some minutes"),
        ((500, "Broken"), "the Hub failed with status 500 for data set 'me/features'"),
    ],
)
def test_refusals_say_what_to_do(
    hub: HubStandIn, local: Path, refusal: tuple[int, str], sentence: str
) -> None:
    """What the Hub answers becomes a sentence, when a cache is opened and when it is read."""
    copy(local, URL)
    opened = open_cache(URL)
    hub.refusals.append(("", *refusal))
    with pytest.raises(LLMEmbedError) as caught:
        open_cache(URL)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(LLMEmbedError) as caught:
        opened["train"].features(8)
    assert sentence.partition(" (")[0].partition(".")[0] in str(caught.value)


def test_a_token_that_may_not_write(
    hub: HubStandIn, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the right to make a data set nothing is made, and the token is not shown."""
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    with pytest.raises(CacheStorageError, match=r"status 401.*HF_TOKEN") as caught:
        copy(local, URL)
    assert "hf_read" not in str(caught.value)
    assert not hub.repositories


def test_what_is_not_there_is_named(hub: HubStandIn, local: Path) -> None:
    """No data set, no cache in it, no folder named: each has its sentence."""
    with pytest.raises(CacheNotFoundError, match="the Hub shows no data set 'me/features'"):
        open_cache(URL)
    copy(local, URL)
    with pytest.raises(CacheNotFoundError, match=r"there is no cache at .*other\.zarr"):
        open_cache("hf://datasets/me/features/other.zarr")
    for place in ("hf://datasets/me/features", "hf://me/features/toy.zarr", "hf://buckets/a/b/c"):
        with pytest.raises(ConfigError, match=r"names no cache on the Hub\. Pass hf://datasets/"):
            open_store(place)
