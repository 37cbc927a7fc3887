"""What a run says about its evaluation rows: predictions.parquet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmembed.common.errors import RunFormatError
from llmembed.common.regular import require_regular
from llmembed.train.measures import names_of
from llmembed.train.runs.record import malformed

if TYPE_CHECKING:
    from llmembed.train.measures import Floats, Sets

PREDICTIONS_FILE = "predictions.parquet"
_TEXT = "text"
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a run says about the evaluation rows."""

    rows: npt.NDArray[np.int64]
    """int64 `[n]`, row in the evaluation split."""
    labels: npt.NDArray[np.int64]
    """int64 `[n]`, index of the true class; where a text may have several, `[n, C]`, 1 for
    those."""
    log_proba: Floats
    """float64 `[n, C]`, log-probability of each class."""
    predicted: Sets | None = None
    """`[n, C]`, 1 for the labels that are given; None where each text has one, the
    likeliest."""
    texts: Sequence[str] | None = None
    """The n texts, where the run is to hold them."""


def write_predictions(path: Path, predictions: Predictions, names: Sequence[str]) -> None:
    """Write the predictions of a run with the classes `names`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    proba = np.exp(predictions.log_proba)
    labels, predicted = np.asarray(names, dtype=object), predictions.predicted
    if predicted is None:
        told: tuple[Any, Any] = labels[predictions.labels], labels[proba.argmax(axis=1)]
    else:
        lists = pa.list_(pa.string())
        sets = (predictions.labels, predicted)
        told = tuple(pa.array(names_of(one, names), type=lists) for one in sets)
    columns: dict[str, Any] = {
        "row": predictions.rows,
        "label": told[0],
        "predicted": told[1],
        **{f"p_{name}": proba[:, index] for index, name in enumerate(names)},
        **({} if predictions.texts is None else {_TEXT: predictions.texts}),
    }
    pq.write_table(pa.table(columns), path)


def read_predictions(path: Path, names: Sequence[str]) -> Predictions:
    """Read the predictions of a run with the classes `names`.

    Raises:
        RunFormatError: the file is missing or is not what it should be.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {name: index for index, name in enumerate(names)}
    try:
        require_regular(path, RunFormatError)
        table = pq.read_table(path)
        proba = np.stack([table[f"p_{name}"].to_numpy() for name in names], axis=1)
        if pa.types.is_list(table.schema.field("label").type):
            labels, predicted = (
                _sets(table[name].to_pylist(), known) for name in ("label", "predicted")
            )
        else:
            labels = np.array([known[name] for name in table["label"].to_pylist()], dtype=np.int64)
            predicted = None
        rows = table["row"].to_numpy()
        if rows.dtype != np.int64 or (rows < 0).any():  # nulls make it another type
            raise ValueError("a row has no number")
        if not ((proba >= 0) & (proba <= 1 + _ROUNDING)).all():  # nor NaN
            raise ValueError("a probability lies outside of 0 to 1")
        return Predictions(
            rows=rows,
            labels=labels,
            predicted=predicted,
            log_proba=np.log(np.maximum(proba, np.finfo(np.float64).tiny)),
            texts=table[_TEXT].to_pylist() if _TEXT in table.column_names else None,
        )
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise malformed(path, str(error)) from error


def _sets(named: Sequence[Sequence[str]], known: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """Give named labels as `[n, C]`, 1 for those of a row."""
    sets = np.zeros((len(named), len(known)), dtype=np.int64)
    for row, names in enumerate(named):
        sets[row, [known[name] for name in names]] = 1
    return sets


def without_texts(content: bytes) -> bytes:
    """Give predictions.parquet without the texts that `--store-texts` put there.

    Raises:
        RunFormatError: it is no such file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise malformed(Path(PREDICTIONS_FILE), str(error)) from error
    if _TEXT not in table.column_names:
        return content
    file = io.BytesIO()
    pq.write_table(table.drop_columns([_TEXT]), file)
    return file.getvalue()
