"""Where a new text meets a run: the features of texts, and the texts of files.

Features are made as the cache's were, by the recipe that each source left in the run, and only of
the layers that the run uses. A backbone whose fingerprint differs is refused: its features would
be read as something they are not.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
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
from llmembed.train.inputs import Feature

if TYPE_CHECKING:
    import pyarrow as pa

    from llmembed.extract import Extractor

Places: TypeAlias = str | Sequence[str] | Mapping[str, str] | None
"""Where backbones are now: one place, or one for each source that moved, by its name or written
`source=place`."""

_WHERE_FOUND = ("backbone", "revision")
"""What a fingerprint says of the place of a backbone, and not of its content."""


class Backbones:
    """The backbones of one run, each loaded once for a device; where it is pickled they stay."""

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        """Load nothing yet; the record is the content of the run's config.json."""
        self._path, self._record = path, record
        self._lock = threading.Lock()  # neither tokenizers nor models serve two threads at a time
        self._loaded: dict[tuple[str, str, str | None], Extractor] = {}

    def __reduce__(self) -> tuple[type[Backbones], tuple[Path, Mapping[str, Any]]]:
        """Leave what is loaded behind."""
        return Backbones, (self._path, self._record)

    def features(
        self, texts: Sequence[str], device: str, model: Places, *, trust_remote_code: bool
    ) -> npt.NDArray[np.float32]:
        """Make float32 `[N, F]`, the features of new texts side by side as the run expects them.

        Raises:
            ConfigError: a backbone brings code of its own and `trust_remote_code` is not given; or
                `model` leaves open which of several sources it is for.
            ModelError: a backbone is missing, or is not the one of the cache.
        """
        places = self._by_source(model)
        wanted = [Feature(**feature) for feature in self._record["features"]]
        if not texts:
            return np.empty((0, sum(feature.hidden_size for feature in wanted)), dtype=np.float32)
        if not trust_remote_code:
            self._refuse_remote_code()
        with self._lock:
            arrays = {
                source: self._extractor(source, wanted, device, places.get(source)).features(texts)
                for source in dict.fromkeys(feature.source for feature in wanted)
            }
        parts = [arrays[one.source].get((one.pooling, one.layer)) for one in wanted]
        for feature, part in zip(wanted, parts, strict=True):
            if part is None or part.shape[1] != feature.hidden_size:
                raise RunFormatError(
                    f"the run {self._path} asks for {feature} of width {feature.hidden_size}, "
                    "which its backbone does not have. The run is damaged; fit again."
                )
        return np.concatenate(parts, axis=1, dtype=np.float32)  # type: ignore[arg-type]

    def _by_source(self, model: Places) -> Mapping[str, str]:
        """Read where backbones are now, by the names of their sources."""
        sources = list(self._record["sources"])
        if isinstance(model, Mapping):
            for source in model:
                if source not in sources:
                    remedy = "Pass source=place to --model."
                    raise ConfigError.unknown("source", source, sources, remedy)
            return model
        given = [model] if isinstance(model, str) else list(model or ())
        parts = [one.partition("=") for one in given]
        named = {source: place for source, _, place in parts if source in sources}
        if len(named) == len(given):
            return named
        if len(given) > 1:
            raise ConfigError(
                f"--model is given {len(given)} places, not each for one source of the run "
                f"{self._path}. Pass source=place, with the sources {', '.join(sources)}, once "
                "each."
            )
        if len(sources) > 1:
            raise ConfigError(
                f"model {given[0]!r} is one place, and the run {self._path} has the sources "
                f"{', '.join(sources)}. Pass a place for each that moved: --model {sources[0]}="
                f"PLACE, in Python model={{{sources[0]!r}: PLACE}}."
            )
        return {sources[0]: given[0]}

    def _refuse_remote_code(self) -> None:
        for source, stored in self._record["sources"].items():
            if stored["recipe"].get("trust_remote_code"):
                raise ConfigError(
                    f"the run {self._path} wants to run the code that the model "
                    f"{stored['recipe'].get('model')!r} (source {source!r}) brings. Pass "
                    "--trust-remote-code if you trust its authors."
                )

    def _extractor(
        self, source: str, wanted: Sequence[Feature], device: str, place: str | None
    ) -> Extractor:
        """Load the backbone of a source, from its recorded place or from another one."""
        from llmembed.extract import Extractor
        from llmembed.extract.backbones.load import resolve_device
        from llmembed.extract.features.poolings import POOLINGS

        key = (source, str(resolve_device(device)), place)
        if key in self._loaded:
            return self._loaded[key]
        stored = self._record["sources"][source]
        recipe, expected = dict(stored["recipe"]), dict(stored["fingerprint"])
        if place is not None:  # where it may be called otherwise
            recipe |= {"model": place, "revision": None}
            expected = {key: value for key, value in expected.items() if key not in _WHERE_FOUND}
        own = [feature for feature in wanted if feature.source == source]
        for feature in own:
            if feature.pooling not in POOLINGS:
                remedy = "Install the package that registers it (llmembed.poolings), or fit again."
                raise RunFormatError.unknown("pooling", feature.pooling, POOLINGS, remedy)
        try:
            self._loaded[key] = Extractor(
                recipe,
                layers=sorted({feature.layer for feature in own}),
                poolings=sorted({feature.pooling for feature in own}),
                device=device,
                expected_fingerprint=expected,
            )
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                self._not_found(source, str(recipe.get("model")), error)
            ) from error
        return self._loaded[key]

    def _not_found(self, source: str, model: str, error: ModelNotFoundError) -> str:
        lasting = self._record["sources"][source]["fingerprint"]
        is_path = model.startswith((".", "~")) or Path(model).is_absolute()
        reason = f"its place {model!r} does not exist." if is_path else str(error)
        option = f"{source}=PLACE" if len(self._record["sources"]) > 1 else "PLACE"
        return (
            f"the run {self._path} needs the backbone {lasting.get('backbone')!r} (source "
            f"{source!r}, weights {lasting.get('weights')}): {reason} Where it is now can be told "
            f"by --model {option}."
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
    from llmembed.extract.texts import Dialect

    dialect = Dialect.of(csv)
    try:
        require_regular(path)
    except OSError as error:
        message = f"{path}: {error.strerror}. Pass a file of texts to --input, or - for stdin."
        raise DatasetNotFoundError(message) from error
    if path.suffix.lower() == ".txt":
        dialect.refuse_for(str(path))
        with open_regular(path) as file:
            return read_lines(file.read(), str(path))
    from llmembed.extract.texts.corpora import texts_of_file

    texts, beside = texts_of_file(path, column, known, dialect)
    return Input(texts=texts, beside=beside if beside.num_columns else None)


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
