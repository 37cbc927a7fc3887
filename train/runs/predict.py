"""Where a new text meets a run: the features of texts, and the texts of files.

Features are made as the cache's were, by the recipe that each source left in the run, and only of
the layers that the run uses. A backbone whose fingerprint differs is refused: its features would
be read as something they are not.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from llmembed.common.errors import (
    ConfigError,
    DataError,
    DatasetNotFoundError,
    ModelNotFoundError,
    RunFormatError,
    warn,
)
from llmembed.common.regular import open_regular, require_regular
from llmembed.train.inputs import Feature
from llmembed.train.inputs.data import GB, make_room, memory_limit
from llmembed.train.linear.devices import has_room
from llmembed.train.runs.record import how_to_get

if TYPE_CHECKING:
    import pyarrow as pa

    from llmembed.extract import Extractor

Places: TypeAlias = str | Sequence[str] | Mapping[str, str] | None
"""Where backbones are now: one place, or one for each source that moved, by its name or written
`source=place`."""

_BLOCK_ROWS = 4096
_WHERE_FOUND = ("backbone", "revision")
"""What a fingerprint says of the place of a backbone, and not of its content."""


class Backbones:
    """The backbones of one run, kept from call to call; where it is pickled they stay behind.

    A source has one at a time, for the device and the place of the last call. Several sources have
    theirs side by side while half of the device's memory is free before each is loaded; else one
    after the other, loaded in every call.
    """

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        """Load nothing yet; the record is the content of the run's config.json."""
        self._path, self._record = path, record
        self._lock = threading.Lock()  # neither tokenizers nor models serve two threads at a time
        self._loaded: dict[str, tuple[tuple[str, str | None], Extractor]] = {}

    def __reduce__(self) -> tuple[type[Backbones], tuple[Path, Mapping[str, Any]]]:
        """Leave what is loaded behind."""
        return Backbones, (self._path, self._record)

    def features(
        self, texts: Sequence[str], device: str, model: Places, *, trust_remote_code: bool
    ) -> Generator[Tensor]:
        """Make the features of new texts, some thousand texts at a time.

        Yields:
            float32 `[n, F]`, side by side as the run expects them.

        Raises:
            ConfigError: a backbone brings code of its own and `trust_remote_code` is not given; or
                `model` leaves open which of several sources it is for.
            ModelError: a backbone is missing, or is not the one of the cache.
        """
        places = self._by_source(model)
        wanted = [Feature(**feature) for feature in self._record["features"]]
        if not texts:
            return
        if not trust_remote_code:
            self._refuse_remote_code()
        sources = list(dict.fromkeys(feature.source for feature in wanted))
        widths = [feature.hidden_size for feature in wanted]

        def load(source: str) -> Extractor:
            return self._extractor(source, wanted, device, places.get(source))

        with self._lock:
            if self._load_together(sources, load):
                loaded = [load(source).in_blocks(texts) for source in sources]
                for blocks in zip(*loaded, strict=True):
                    x = torch.empty(_n_rows(blocks[0]), sum(widths))
                    for source, block in zip(sources, blocks, strict=True):
                        self._put(x, wanted, source, block)
                    yield x
                return
            x = make_room(len(texts), sum(widths), memory_limit() / GB)
            for source in sources:
                self._loaded = {name: one for name, one in self._loaded.items() if name == source}
                start = 0
                for block in load(source).in_blocks(texts):
                    rows = slice(start, start + _n_rows(block))
                    self._put(x[rows], wanted, source, block)
                    start = rows.stop
        yield from torch.split(x, _BLOCK_ROWS)

    def token_counter(self) -> Callable[[Sequence[str]], Counted]:
        """Make what counts tokens as the loaded backbones do, for one thread beside theirs.

        Raises:
            ConfigError: the backbones were loaded one after the other, for want of memory.
        """
        needed = {feature["source"] for feature in self._record["features"]}
        if missing := sorted(needed - self._loaded.keys()):
            raise ConfigError(
                f"the backbones of the run {self._path} do not fit into the device's memory "
                f"together: {', '.join(missing)} would be loaded again for every request. Pass "
                "--device cpu, or a device with more memory."
            )
        extractors = []
        for _, extractor in self._loaded.values():
            own = copy.copy(extractor)
            own.recipe = copy.copy(extractor.recipe)
            vars(own.recipe)["tokenizer"] = copy.deepcopy(extractor.recipe.tokenizer)
            extractors.append(own)

        def count(texts: Sequence[str]) -> Counted:
            found = [extractor.tokenize(texts) for extractor in extractors]
            return Counted(
                n_tokens=np.max([one.n_tokens for one in found], axis=0).tolist(),
                is_cut=[any(cuts) for cuts in zip(*(one.is_cut for one in found), strict=True)],
            )

        return count

    def _load_together(self, sources: Sequence[str], load: Callable[[str], Extractor]) -> bool:
        """Load the backbones of all sources, as long as there is room for one more."""
        for source in sources:
            others = [one for name, (_, one) in self._loaded.items() if name != source]
            if source not in self._loaded and others and not has_room(others[0].backbone.device):
                return False
            load(source)
        return True

    def _put(
        self, x: Tensor, wanted: Sequence[Feature], source: str, block: Mapping[Any, Any]
    ) -> None:
        """Put the features of a source into their columns of float32 `[n, F]`."""
        columns = torch.split(x, [feature.hidden_size for feature in wanted], dim=1)
        for feature, column in zip(wanted, columns, strict=True):
            if feature.source != source:
                continue
            part = block.get((feature.pooling, feature.layer))
            if part is None or part.shape != column.shape:
                raise RunFormatError(
                    f"the run {self._path} asks for {feature} of width {feature.hidden_size}, "
                    "which its backbone does not have. The run is damaged; fit again."
                )
            column.copy_(torch.from_numpy(part))

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
        from llmembed.extract.texts.prompts import pooling_of

        key = (str(resolve_device(device)), place)
        if source in self._loaded and self._loaded[source][0] == key:
            return self._loaded[source][1]
        self._loaded.pop(source, None)
        stored = self._record["sources"][source]
        recipe, expected = dict(stored["recipe"]), dict(stored["fingerprint"])
        recipe["revision"] = recipe.get("revision") or expected.get("revision")  # of the Hub
        if place is not None:  # where it may be called otherwise
            recipe |= {"model": place, "revision": None}
            expected = {key: value for key, value in expected.items() if key not in _WHERE_FOUND}
        own = [feature for feature in wanted if feature.source == source]
        prompts = stored.get("prompts", {})
        known = [*POOLINGS, *map(pooling_of, prompts)]
        for feature in own:
            if feature.pooling not in known:
                remedy = "Install the package that registers it (llmembed.poolings), or fit again."
                raise RunFormatError.unknown("pooling", feature.pooling, known, remedy)
        try:
            extractor = Extractor(
                recipe,
                layers=sorted({feature.layer for feature in own}),
                poolings=sorted({feature.pooling for feature in own}),
                prompts=prompts,
                device=device,
                expected_fingerprint=expected,
            )
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                self._not_found(source, str(recipe.get("model")), error)
            ) from error
        self._loaded[source] = key, extractor
        return extractor

    def _not_found(self, source: str, model: str, error: ModelNotFoundError) -> str:
        lasting = self._record["sources"][source]["fingerprint"]
        is_path = model.startswith((".", "~")) or Path(model).is_absolute()
        reason = f"its place {model!r} does not exist." if is_path else str(error)
        option = f"{source}=PLACE" if len(self._record["sources"]) > 1 else "PLACE"
        return (
            f"the run {self._path} needs the backbone {lasting.get('backbone')!r} (source "
            f"{source!r}, weights {lasting.get('weights')}): {reason} Where it is now can be told "
            f"by --model {option}. {how_to_get(self._record['sources'][source])}"
        )


def _n_rows(block: Mapping[Any, Any]) -> int:
    return len(next(iter(block.values())))


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Tokens of N texts, in the source that makes most of them."""

    n_tokens: list[int]
    """Of each text, as far as it is read."""
    is_cut: list[bool]
    """Whether each is cut, by any source."""

    @property
    def n_truncated(self) -> int:
        """Texts that are cut."""
        return sum(self.is_cut)


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
        try:
            with open_regular(path) as file:
                content = file.read()
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}. Check the path and who may read it."
            ) from error
        return read_lines(content, str(path))
    from llmembed.extract.texts.corpora import texts_of_file

    texts, beside = texts_of_file(path, column, known, dialect)
    return Input(texts=texts, beside=beside if beside.num_columns else None)


def notes_on(texts: Sequence[str], is_cut: Sequence[bool]) -> list[str]:
    """Say which texts are `empty` and which were `truncated`.

    >>> notes_on(["long", "short", " "], [True, False, False])
    ['truncated', '', 'empty']
    """
    pairs = zip(texts, is_cut, strict=True)
    return ["truncated" if cut else "" if text.strip() else "empty" for text, cut in pairs]


def warn_of_empty(texts: Sequence[str]) -> None:
    """Say, once, how many of the texts that were given a label have nothing to read."""
    n_empty = sum(not text.strip() for text in texts)
    if n_empty:
        are, mean = ("is", "its label means") if n_empty == 1 else ("are", "their labels mean")
        warn(
            f"{n_empty:,} of {len(texts):,} texts {are} empty, so there was nothing to read and "
            f"{mean} nothing. Leave such texts out."
        )


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
