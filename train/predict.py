"""Where a new text meets a run: the only room that knows both stages.

Features are made as the cache's were, by the recipe that each source left in the run, and only of
the layers that the run uses. A backbone whose fingerprint differs is refused: its features would
be read as something they are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmembed.cache_format.errors import (
    ConfigError,
    DataError,
    DatasetNotFoundError,
    ModelNotFoundError,
)
from llmembed.train.metrics import Floats

if TYPE_CHECKING:
    from llmembed.extract import TextFeatures
    from llmembed.train.run import Run
    from llmembed.train.select import Feature

TEXT_COLUMN = "text"
TEXT_FILE = ".txt"


def predict_proba(
    run: Run, texts: Sequence[str], device: str = "auto", *, trust_remote_code: bool = False
) -> Floats:
    """Give float64 `[N, C]`, the probability of each class for each text.

    Raises:
        ConfigError: a backbone brings code of its own and `trust_remote_code` is not given.
        DataError: `texts` is a single string or holds something else than strings.
        ModelError: a backbone is missing, or is not the one of the cache.
    """
    import torch

    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise DataError("texts must be a list of strings. Pass [text] for a single one.")
    if not texts:
        return np.empty((0, len(run.labels)))
    if not trust_remote_code:
        _refuse_remote_code(run)
    with torch.inference_mode():
        logits = run.classifier(torch.from_numpy(read_new_features(run, texts, device)))
        proba: Floats = logits.double().softmax(dim=1).numpy()
    return proba


def read_new_features(run: Run, texts: Sequence[str], device: str) -> npt.NDArray[np.float32]:
    """Make float32 `[N, F]`, the features of new texts side by side as the run expects them."""
    from llmembed.extract import Extractor

    by_feature: dict[Feature, npt.NDArray[np.floating[Any]]] = {}
    for source, stored in run.config["sources"].items():
        wanted = [feature for feature in run.features if feature.source == source]
        try:
            extractor = Extractor(
                stored["recipe"],
                layers=sorted({feature.layer for feature in wanted}),
                poolings=sorted({feature.pooling for feature in wanted}),
                device=device,
                expected_fingerprint=stored["fingerprint"],
            )
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                f"the run {run.path} needs the backbone of its source {source!r}: {error}"
            ) from error
        arrays = extractor.features(texts)
        by_feature |= {feature: arrays[feature.pooling, feature.layer] for feature in wanted}
    parts = [by_feature[feature] for feature in run.features]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def text_features(options: Mapping[str, Any]) -> TextFeatures:
    """Prepare the features of texts in memory, by options of an extraction."""
    from llmembed.extract import ExtractConfig, TextFeatures

    return TextFeatures(ExtractConfig(**options))


def _refuse_remote_code(run: Run) -> None:
    for source, stored in run.config["sources"].items():
        recipe = stored["recipe"]
        if recipe.get("trust_remote_code"):
            raise ConfigError(
                f"the run {run.path} wants to run the code that the model {recipe.get('model')!r} "
                f"(source {source!r}) brings. Pass --trust-remote-code if you trust its authors."
            )


def read_texts(path: Path, column: str | None = None) -> list[str]:
    """Read the texts of a file: a line each of txt, a column of csv, jsonl, parquet and others.

    Args:
        path: file to read.
        column: name of the column, or two for pairs (`a,b`); None is `text`, or the only column.

    Raises:
        DatasetNotFoundError: there is no such file.
        DataError: the file cannot be read, holds no text, or has no column of texts.
        ConfigError: it has no such column.
    """
    if not path.is_file():
        raise DatasetNotFoundError(f"{path} is not a file. Pass a file of texts to --input.")
    return _read_lines(path) if path.suffix.lower() == TEXT_FILE else _read_column(path, column)


def _read_column(path: Path, column: str | None) -> list[str]:
    from llmembed.extract.pairs import column_names, join_columns
    from llmembed.extract.tables import read_table

    table = read_table(path)
    names = table.column_names
    chosen = column_names(column or (names[0] if len(names) == 1 else TEXT_COLUMN), names)
    for name in chosen:
        for row, value in enumerate(table.column(name).to_pylist()):
            if not isinstance(value, str):
                raise DataError(
                    f"{path}, row {row}: column {name!r} holds {value!r}, which is no text. Remove "
                    "the row, or pass another --text-column."
                )
    columns = [table.column(name) for name in chosen]
    joined = columns[0] if len(columns) == 1 else join_columns(path.stem, *columns)
    values: list[str] = joined.to_pylist()
    return values


def _read_lines(path: Path) -> list[str]:
    content = path.read_bytes()
    if not content:
        raise DataError(f"{path} holds no text. Pass a file with at least one to --input.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. Save the file "
            "as UTF-8."
        ) from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
