"""What a run says of texts, row by row: on the terminal, as JSON, csv, jsonl or parquet.

Columns that stood beside the texts go along, in front. Files hold names and texts as they are; a
terminal gets their control characters escaped.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmembed.common.errors import ConfigError, shown, warn
from llmembed.common.replace import check_file, replacing, writing_told

if TYPE_CHECKING:
    import pyarrow as pa

    from llmembed.train.measures import Floats
    from llmembed.train.measures.doubt import Bools

_RENAMED = "input_"
_DIGITS = 6
_BEGIN_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Predictions for N texts."""

    texts: Sequence[str]
    labels: Sequence[str]  # names of the C classes
    proba: Floats  # float64 `[N, C]`, the probability of each class
    # float64 `[C]`, from which on labels are given; None where each text has one, the likeliest
    thresholds: Floats | None = None
    with_all: bool  # whether the probability of every class is told, not of the likeliest alone
    top_k: int = 0  # so many of the likeliest are told too, in this order
    beside: pa.Table | None = None  # columns that stood beside the texts, `[N]`
    refused: Bools | None = None  # bool `[N]`, whether there is no answer; None where all have one
    unknown: str = ""  # label of those without an answer
    doubts: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # further columns, `[N]` each

    def rows(self) -> Iterator[dict[str, Any]]:
        """Give each row as JSON takes it, the probabilities of all classes in one object."""
        rounded = self.proba.round(_DIGITS).tolist()
        by_class = [dict(zip(self.labels, values, strict=True)) for values in rounded]
        told: dict[str, Any] = {"probabilities": by_class} if self.with_all else {}
        if self.top_k:
            told["top"] = [
                [{"label": self.labels[best], "probability": values[best]} for best in row]
                for row, values in zip(self._top, rounded, strict=True)
            ]
        return _by_row(self._columns(told))

    def table(self) -> dict[str, Any]:
        """Give columns by name: `p_<class>` of each class, `label_<k>`, `probability_<k>`."""
        rounded, told = self.proba.round(_DIGITS).T.tolist(), {}
        if self.with_all:
            told = {
                f"p_{name}": of_class for name, of_class in zip(self.labels, rounded, strict=True)
            }
        for k in range(self.top_k):
            best = [row[k] for row in self._top]
            told[f"label_{k + 1}"] = [self.labels[index] for index in best]
            told[f"probability_{k + 1}"] = [rounded[index][n] for n, index in enumerate(best)]
        return self._columns(told)

    def lines(self) -> Iterator[str]:
        """Give each row for a terminal: label, probability, text, and the classes asked for.

        What else is told of a text follows it, `name=value` each, the value as JSON.
        """
        names = self._named
        doubts = [*_by_row(self._doubts)] or [{}] * len(names)
        sure = self._probabilities(4)
        for n, (text, values, top) in enumerate(
            zip(self.texts, self.proba, self._top, strict=True)
        ):
            said = [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in doubts[n].items()]
            first = ", ".join(names[n]) if isinstance(names[n], list) else names[n]
            told = sure[n] if isinstance(sure[n], list) else [sure[n]]
            numbers = ", ".join(f"{one:.4f}" for one in told)
            yield "\t".join(map(shown, (first, numbers, text, *said)))
            for index in range(len(values)) if self.with_all else top:
                yield f"  {shown(self.labels[index])}\t{values[index]:.4f}"

    @functools.cached_property
    def _given(self) -> list[list[int]]:
        """Indices of the labels that each text is given, where it may have several."""
        from llmembed.train.measures import likeliest_first

        assert self.thresholds is not None
        return likeliest_first(self.proba, self.thresholds)

    def _probabilities(self, digits: int) -> list[Any]:
        """Give the probability of what each text is called, of several labels a list."""
        rounded: list[Any] = self.proba.round(digits).tolist()
        if self.thresholds is None:
            return [max(row) for row in rounded]
        pairs = zip(rounded, self._given, strict=True)
        return [[row[index] for index in given] for row, given in pairs]

    @property
    def _named(self) -> list[Any]:
        if self.thresholds is not None:
            return [[self.labels[index] for index in row] for row in self._given]
        named = [self.labels[index] for index in self.proba.argmax(axis=1)]
        refused = [False] * len(named) if self.refused is None else self.refused
        return [self.unknown if no else name for name, no in zip(named, refused, strict=True)]

    @property
    def _doubts(self) -> dict[str, Any]:
        told = {} if self.refused is None else {"abstained": self.refused.tolist()}
        return {**told, **{name: list(values) for name, values in self.doubts.items()}}

    @property
    def _top(self) -> list[list[int]]:
        """Indices of the likeliest classes of each text, of equally likely ones the first first."""
        top: list[list[int]] = (
            (-self.proba).argsort(axis=1, kind="stable")[:, : self.top_k].tolist()
        )
        return top

    def _columns(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Give what stood beside the texts, under names that are not ours, and then ours."""
        ours: dict[str, Any] = {
            "text": list(self.texts),
            "label": self._named,
            "probability": self._probabilities(_DIGITS),
        }
        ours |= {**self._doubts, **told}
        names = [] if self.beside is None else self.beside.column_names
        found: dict[str, Any] = {}
        for name in names:
            free = name
            while free in ours or free in found or (free != name and free in names):
                free = f"{_RENAMED}{free}"
            if free != name:
                warn(
                    f"the input has a column {name!r}, which is what the output calls something of "
                    f"its own: there the input's is {free!r}."
                )
            found[free] = self.beside[name]  # type: ignore[index]
        return found | ours


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before anything is computed.

    Raises:
        ConfigError: it has another suffix, is a folder, or its folder does not exist.
    """
    if path.suffix.lower() not in _WRITERS:
        known = ", ".join(_WRITERS)
        raise ConfigError(f"--output {path} has none of the suffixes {known}. Give it one.")
    check_file(path)


def write(path: Path, answers: Answers, *, defuses_formulas: bool = False) -> None:
    """Write a file by its suffix, whole or not at all.

    With `defuses_formulas`, cells of a csv that a spreadsheet would run get an apostrophe in front.

    Raises:
        RunStorageError: the disk failed or refused.
    """
    with writing_told(path), replacing(path) as partial:
        if defuses_formulas:
            _write_csv(partial, answers, defused)
        else:
            _WRITERS[path.suffix.lower()](partial, answers)


def _write_csv(
    path: Path, answers: Answers, cell: Callable[[Any], Any] = lambda value: value
) -> None:
    table = answers.table()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(map(cell, table))
        for row in _by_row(table):
            writer.writerow(
                json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else cell(v)
                for v in row.values()
            )


def defused(value: Any) -> Any:
    """Put an apostrophe before a text that a spreadsheet takes for a formula (OWASP's list).

    >>> [defused(value) for value in ("=1+1", "-5", -5, "@a", "a=1")]
    ["'=1+1", '-5', -5, "'@a", 'a=1']
    """
    if not isinstance(value, str) or not value.startswith(_BEGIN_FORMULAS):
        return value
    return value if _NUMBER.fullmatch(value) else f"'{value}"


def _write_jsonl(path: Path, answers: Answers) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in answers.rows())


def _write_parquet(path: Path, answers: Answers) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(answers.table()), path)


_WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}


def _by_row(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lists = (one if isinstance(one, list) else one.to_pylist() for one in columns.values())
    for row in zip(*lists, strict=True):
        yield dict(zip(columns, map(_plain, row), strict=True))


def _plain(value: Any) -> Any:
    """Turn what Arrow holds into what JSON holds: dates, decimals, bytes as text, NaN as null."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
