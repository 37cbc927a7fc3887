"""Folders of texts: one file a split, shards of a split, the Hub's layout, `save_to_disk`.

Nothing outside the folder is read, whatever its files say, and what was taken as what is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmembed.common.errors import DataError, DatasetNotFoundError
from llmembed.common.splits import TRAIN, split_name
from llmembed.extract.texts.files.tables import READERS, split_suffix
from llmembed.extract.texts.label_checks import check_names

LABELS_FILE = "labels.json"
_SPLITS_FILE, _STATE_FILE = "dataset_dict.json", "state.json"
_NO_TEXTS = {LABELS_FILE, _SPLITS_FILE, _STATE_FILE, "dataset_info.json", "dataset_infos.json"}
_SHARD = re.compile(r"(.+?)-(\d{5})-of-(\d{5})(?:-[0-9a-f]{16})?")
"""train-00000-of-00002, as the Hub names shards; some end in a hash."""

Tables = dict[str, pa.Table]


def read_folder(path: Path, read: Callable[[Path], pa.Table]) -> tuple[Tables, list[str]]:
    """Read all splits of a folder.

    Args:
        path: a folder with one file a split, or with its shards, there or in its folder `data`; or
            one that `save_to_disk` wrote.
        read: reads one file.

    Returns:
        Arrow tables by split, train first, and what to say of how they were found.

    Raises:
        DatasetNotFoundError: it holds no file of texts.
        DataError: a file cannot be read, or the files do not make up splits.
    """
    if (path / _SPLITS_FILE).exists():
        names = _json(path / _SPLITS_FILE, "splits")
        found = {name: _read_saved(path / name) for name in _inside(path / _SPLITS_FILE, names)}
        return rename_splits(found, str(path))
    if (path / _STATE_FILE).exists():
        return {TRAIN: _read_saved(path)}, []
    folder, files = path, _split_files(path)
    if not files and (path / "data").is_dir():
        folder = path / "data"
        files = _split_files(folder)
    if not files:
        message = (
            f"{path} holds no file of texts. Put one file a split there (train.parquet, test.csv; "
            f"known suffixes: {', '.join(READERS)}), or pass a save_to_disk folder."
        )
        raise DatasetNotFoundError(message)
    tables = {split: _joined([read(file) for file in of], of) for split, of in files.items()}
    return tables, _told(folder, files)


def read_label_names(folder: Path) -> list[str] | None:
    """Read the class names that `labels.json` gives integer labels; None where there is no such.

    Raises:
        DataError: it is not a JSON list of distinct names.
    """
    path = folder / LABELS_FILE
    if not path.exists():
        return None
    return check_names(_json(path), str(path))


def rename_splits(tables: Mapping[str, pa.Table], where: str) -> tuple[Tables, list[str]]:
    """Give splits their usual names, and say which were called otherwise.

    Raises:
        DataError: two splits have the same purpose.

    >>> rename_splits({"train": pa.table({}), "dev": pa.table({})}, "toy")[1]
    ["toy: split 'validation' is 'dev'."]
    """
    renamed: Tables = {}
    for name, table in tables.items():
        if split_name(name) in renamed:
            others = " and ".join(
                repr(one) for one in tables if split_name(one) == split_name(name)
            )
            raise DataError(f"{where} has two splits for {split_name(name)!r}: {others}. Keep one.")
        renamed[split_name(name)] = table
    notes = [
        f"{where}: split {split_name(name)!r} is {name!r}."
        for name in tables
        if split_name(name) != name
    ]
    return renamed, notes


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
            first = next(iter(files.values())).name
            message = (
                f"{folder} has two files for the split {split!r}: {first} and {file.name}. Keep "
                "one of them."
            )
            raise DataError(message)
        files[int(index)] = file
    for split, files in found.items():
        _refuse_gap(folder, split, files, kinds[split][2])
    order = sorted(found, key=lambda split: (split != TRAIN, split))
    return {split: [found[split][index] for index in sorted(found[split])] for split in order}


def _refuse_gap(folder: Path, split: str, files: Mapping[int, Path], count: int) -> None:
    missing = sorted(set(range(count)) - files.keys())
    if missing:
        message = (
            f"{folder} has {len(files)} of the {count} shards of split {split!r}; shard "
            f"{missing[0]:05d} is missing. Fetch it, or rename the files to what they are."
        )
        raise DataError(message)


def _joined(tables: Sequence[pa.Table], files: Sequence[Path]) -> pa.Table:
    for table, file in zip(tables, files, strict=True):
        if not table.schema.equals(tables[0].schema):
            message = (
                f"{file} has the columns {_columns(table)}, its first shard {files[0].name} has "
                f"{_columns(tables[0])}. Give all shards of a split the same columns."
            )
            raise DataError(message)
    return pa.concat_tables(tables)


def _columns(table: pa.Table) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in table.schema)


def _told(folder: Path, files: Mapping[str, Sequence[Path]]) -> list[str]:
    """Say in one line what was taken as what, where the names of the files do not say it."""
    if folder.name != "data" and all(
        split_suffix(of[0].name)[0] == split for split, of in files.items()
    ):
        return []
    parts = (
        f"{split} from {of[0].name}" + (f" and {len(of) - 1} more shards" if of[1:] else "")
        for split, of in files.items()
    )
    return [f"{folder}: {', '.join(parts)}."]


def _read_saved(folder: Path) -> pa.Table:
    """Read one split that `save_to_disk` wrote, mapped: Arrow streams that state.json lists."""
    path = folder / _STATE_FILE
    entries = _json(path, "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    tables = [_read_stream(folder / name) for name in _inside(path, names)]
    return _joined(tables, [folder / str(name) for name in names])


def _read_stream(path: Path) -> pa.Table:
    if not path.is_file():
        raise DataError(f"{path}, which {_STATE_FILE} names, is missing or not a file. {_SAVE}")
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            return stream.read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read as an Arrow stream: {reason}. {_SAVE}") from error


_SAVE = "Save the data set again with save_to_disk."


def _inside(path: Path, names: Any) -> list[str]:
    """Refuse names that are none, or that lead out of the folder."""
    for name in names:
        if not isinstance(name, str) or name in {"", ".."} or set(name) & set("/\\\0"):
            message = f"{path} names {name!r}, which is not the name of a file beside it. {_SAVE}"
            raise DataError(message)
    return list(names)


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
