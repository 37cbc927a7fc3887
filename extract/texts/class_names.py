"""What integer labels are called: by the ClassLabel of the label column, or by labels.json."""

from __future__ import annotations

import json

import pyarrow as pa

from llmembed.common.errors import DataError
from llmembed.extract.texts.folders import LABELS_FILE
from llmembed.extract.texts.label_checks import check_names
from llmembed.extract.texts.origins import Origin

_KEY = b"huggingface"
"""Under which `datasets` describes the columns in the schema of Parquet and Arrow files."""


def class_names(origin: Origin, label_column: str) -> list[str] | None:
    """Find the names that the integers of a column are indices of; no other column's count.

    Raises:
        DataError: two splits, or a split and labels.json, name them differently.
    """
    given = {
        f"split {split!r}": names_of_column(table.schema, label_column)
        for split, table in origin.tables.items()
    }
    given[LABELS_FILE] = origin.names
    named = {where: list(names) for where, names in given.items() if names is not None}
    first = next(iter(named), "")
    for where, names in named.items():
        if names != named[first]:
            message = (
                f"{where} names the classes of column {label_column!r} {names}, {first} "
                f"{named[first]}, so the same integer is two classes. Make them agree."
            )
            raise DataError(message)
    return named.get(first)


def names_of_column(schema: pa.Schema, column: str) -> list[str] | None:
    """Read the names of a ClassLabel out of a schema; None where the column is no such.

    Raises:
        DataError: they are not distinct names.

    >>> column = {"_type": "ClassLabel", "names": ["neg", "pos"]}
    >>> about = json.dumps({"info": {"features": {"label": column}}})
    >>> names_of_column(pa.schema([("label", "int64")], {"huggingface": about}), "label")
    ['neg', 'pos']
    """
    try:
        described = json.loads((schema.metadata or {}).get(_KEY, b"{}"))
        feature = described.get("info", {}).get("features", {}).get(column, {})
        names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    except (ValueError, RecursionError, AttributeError) as error:
        message = (
            f"the metadata 'huggingface' of the file with column {column!r} cannot be read "
            f"({type(error).__name__}). Write the file again with datasets, or without metadata."
        )
        raise DataError(message) from error
    return None if names is None else check_names(names, f"the ClassLabel {column!r}")
