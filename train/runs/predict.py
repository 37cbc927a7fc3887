"""Where a new text meets a run: the only room that knows both stages.

Features are made as the cache's were, by the recipe that each source left in the run, and only of
the layers that the run uses. A backbone whose fingerprint differs is refused: its features would
be read as something they are not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llmembed.common.errors import (
    ConfigError,
    DataError,
    DatasetNotFoundError,
    ModelNotFoundError,
    RunFormatError,
)
from llmembed.common.regular import open_regular, require_regular
from llmembed.train.measures.metrics import Floats

if TYPE_CHECKING:
    import pyarrow as pa

    from llmembed.extract import Extractor, TextFeatures
    from llmembed.extract.texts.files.dialect import Dialect
    from llmembed.train.runs.run import Run
    from llmembed.train.inputs.select import Feature

Places: TypeAlias = str | Mapping[str, str] | None
"""Where backbones are now: one place, or one for each source by name."""

TEXT_FILE = ".txt"
_WHERE_FOUND = ("backbone", "revision")
"""What a fingerprint says of the place of a backbone, and not of its content."""
_log = logging.getLogger(__name__)


class Backbones:
    """The backbones of one run, each loaded once for a device; they can't be pickled, and stay."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while texts are read: neither tokenizers nor models serve two threads at a time."""
        self._loaded: dict[tuple[str, str, str | None], Extractor] = {}

    def __reduce__(self) -> tuple[type[Backbones], tuple[()]]:
        """Leave all behind."""
        return Backbones, ()

    def of(self, run: Run, source: str, device: str, place: str | None) -> Extractor:
        """Give the extractor of a source, from its recorded place or from another one.

        Raises:
            ModelError: there is no backbone, or another one.
        """
        from llmembed.extract.backbones.load import resolve_device

        key = (source, str(resolve_device(device)), place)
        if key not in self._loaded:
            self._loaded[key] = _load(run, source, device, place)
        return self._loaded[key]


def predict_proba(
    run: Run,
    backbones: Backbones,
    texts: Sequence[str],
    device: str = "auto",
    model: Places = None,
    *,
    trust_remote_code: bool = False,
) -> Floats:
    """Give float64 `[N, C]`, the probability of each class for each text.

    Raises:
        ConfigError: a backbone brings code of its own and `trust_remote_code` is not given; or
            `model` leaves open which of several sources it is for.
        DataError: `texts` is a single string or holds something else than strings.
        ModelError: a backbone is missing, or is not the one of the cache.
    """
    import torch

    texts = _as_list(texts)
    places = _by_source(run, model)
    if not texts:
        return np.empty((0, len(run.labels)))
    if not trust_remote_code:
        _refuse_remote_code(run)
    with torch.inference_mode(), backbones.lock:
        features = _read_features(run, backbones, texts, device, places)
        logits = run.classifier(torch.from_numpy(features))
        proba: Floats = logits.double().softmax(dim=1).numpy()
    return proba


def _as_list(texts: Any) -> list[str]:
    is_one = isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable)
    if not is_one and getattr(texts, "ndim", 1) == 1:
        found = list(texts)
        if all(isinstance(text, str) for text in found):
            return found
    raise DataError("texts must be a list of strings. Pass [text] for a single one.")


def _by_source(run: Run, model: Places) -> Mapping[str, str]:
    sources = list(run.config["sources"])
    if model is None:
        return {}
    if isinstance(model, str):
        if len(sources) > 1:
            raise ConfigError(
                f"model {model!r} is one place, and the run {run.path} has the sources "
                f"{', '.join(sources)}. Pass a place for each that moved: --model {sources[0]}="
                f"PLACE, in Python model={{{sources[0]!r}: PLACE}}."
            )
        return {sources[0]: model}
    for source in model:
        if source not in sources:
            raise ConfigError.unknown("source", source, sources, "Pass source=place to --model.")
    return model


def named_places(run: Run, given: Sequence[str]) -> Places:
    """Read what `--model` is given: a place, or `source=place` for some of the sources.

    Raises:
        ConfigError: more than one place, not all with the name of their source.
    """
    parts = [one.partition("=") for one in given]
    named = {source: place for source, _, place in parts if source in run.config["sources"]}
    if named and len(named) == len(given):
        return named
    if len(given) > 1:
        raise ConfigError(
            f"--model is given {len(given)} places, not each for one source of the run {run.path}. "
            f"Pass source=place, with the sources {', '.join(run.config['sources'])}, once each."
        )
    return given[0] if given else None


def _read_features(
    run: Run,
    backbones: Backbones,
    texts: Sequence[str],
    device: str,
    places: Mapping[str, str],
) -> npt.NDArray[np.float32]:
    """Make float32 `[N, F]`, the features of new texts side by side as the run expects them."""
    by_feature: dict[Feature, npt.NDArray[np.floating[Any]]] = {}
    for source in dict.fromkeys(feature.source for feature in run.features):
        arrays = backbones.of(run, source, device, places.get(source)).features(texts)
        for feature in run.features:
            if feature.source == source:
                array = arrays.get((feature.pooling, feature.layer))
                if array is None or array.shape[1] != feature.hidden_size:
                    raise RunFormatError(
                        f"the run {run.path} asks for {feature} of width {feature.hidden_size}, "
                        "which its backbone does not have. The run is damaged; fit again."
                    )
                by_feature[feature] = array
    parts = [by_feature[feature] for feature in run.features]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _load(run: Run, source: str, device: str, place: str | None) -> Extractor:
    """Load the backbone of a source; at another place it may be called otherwise."""
    from llmembed.extract import Extractor
    from llmembed.extract.features.poolings import POOLINGS

    stored = run.config["sources"][source]
    recipe, expected = dict(stored["recipe"]), dict(stored["fingerprint"])
    if place is not None:
        recipe |= {"model": place, "revision": None}
        expected = {key: value for key, value in expected.items() if key not in _WHERE_FOUND}
    wanted = [feature for feature in run.features if feature.source == source]
    for feature in wanted:
        if feature.pooling not in POOLINGS:
            remedy = "Install the package that registers it (llmembed.poolings), or fit again."
            raise RunFormatError.unknown("pooling", feature.pooling, POOLINGS, remedy)
    try:
        return Extractor(
            recipe,
            layers=sorted({feature.layer for feature in wanted}),
            poolings=sorted({feature.pooling for feature in wanted}),
            device=device,
            expected_fingerprint=expected,
        )
    except ModelNotFoundError as error:
        raise ModelNotFoundError(_not_found(run, source, recipe.get("model"), error)) from error


def _not_found(run: Run, source: str, model: object, error: ModelNotFoundError) -> str:
    fingerprint = run.config["sources"][source]["fingerprint"]
    option = f"{source}=PLACE" if len(run.config["sources"]) > 1 else "PLACE"
    is_path = str(model).startswith((".", "~")) or Path(str(model)).is_absolute()
    reason = f"its place {str(model)!r} does not exist." if is_path else str(error)
    return (
        f"the run {run.path} needs the backbone {fingerprint.get('backbone')!r} (source "
        f"{source!r}, weights {fingerprint.get('weights')}): {reason} Where it is now can be told "
        f"by --model {option}."
    )


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


@dataclass(frozen=True, kw_only=True)
class Input:
    """What is to be classified."""

    texts: list[str]
    """N texts."""
    beside: pa.Table | None = None
    """The other columns of their file, `[N]`, where it has any."""


def read_input(
    path: Path,
    column: str | None = None,
    *,
    known: str | None = None,
    csv: Mapping[str, str | None] = MappingProxyType({}),
) -> Input:
    """Read the texts of a file: a line each of txt, a column of csv, jsonl, parquet and others.

    Args:
        path: file to read.
        column: name of the column, or two for pairs (`a,b`); None detects it, and says which.
        known: column that the texts of the run's cache came from, taken if the file has it.
        csv: `delimiter`, `csv_escape` and `csv_quote` of a delimited file, as at extraction.

    Raises:
        DatasetNotFoundError: there is no such file.
        DataError: the file cannot be read, holds no text, or has no column of texts.
        ConfigError: it has no such column.
    """
    from llmembed.extract.texts.files.dialect import Dialect

    dialect = Dialect.of(csv)
    try:
        require_regular(path)
    except OSError as error:
        message = f"{path}: {error.strerror}. Pass a file of texts to --input, or - for stdin."
        raise DatasetNotFoundError(message) from error
    if path.suffix.lower() != TEXT_FILE:
        return _read_columns(path, column, known, dialect)
    dialect.refuse_for(str(path))
    with open_regular(path) as file:
        return read_lines(file.read(), str(path))


def _read_columns(path: Path, column: str | None, known: str | None, dialect: Dialect) -> Input:
    from llmembed.extract.texts.columns import as_texts
    from llmembed.extract.texts.corpora import text_column_of
    from llmembed.extract.texts.pairs import column_names, join_columns
    from llmembed.extract.texts.files.tables import read_table

    table = read_table(path, dialect)
    names = table.column_names
    if column is None:
        held = known is not None and (known in names or {*known.split(",")} <= {*names})
        column = known if held else text_column_of(names)
        _log.info("Text from column %r.", column)
    chosen = column_names(str(column), names)
    columns = [as_texts(str(path), name, table.column(name)) for name in chosen]
    joined = columns[0] if len(columns) == 1 else join_columns(path.stem, *columns)
    beside = table.drop_columns(chosen)
    return Input(texts=joined.to_pylist(), beside=beside if beside.num_columns else None)


def read_lines(content: bytes, where: str) -> Input:
    """Take a text from each line, empty ones too.

    Args:
        content: the lines, UTF-8.
        where: what they come from, for messages.

    Raises:
        DataError: there is none, or one is not UTF-8.
    """
    if not content:
        raise DataError(f"{where} holds no text. Pass a file with at least one to --input.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. Save the file "
            "as UTF-8."
        ) from error
    lines = text.removesuffix("\n").split("\n")
    return Input(texts=[line.removesuffix("\r") for line in lines])
