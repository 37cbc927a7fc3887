"""What a text is, as the options say it: which data set, which splits and columns of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from llmembed.common.errors import ConfigError

NO_QUOTES = "none"
_NAMED = {"tab": "\t", "\\t": "\t", "space": " "}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    r"""How a delimited file is written, where its suffix does not say it.

    Raises:
        ConfigError: one of them is not a single character that can serve so.

    >>> Dialect(delimiter="tab")
    Dialect(delimiter='\t', csv_escape=None, csv_quote=None)
    """

    delimiter: str | None = None
    """Between the fields of a row."""
    csv_escape: str | None = None
    """Before a character that stands for itself."""
    csv_quote: str | None = None
    """Around a field; `NO_QUOTES` if quotes are characters as any other."""

    def __post_init__(self) -> None:
        """Check each, and that they differ."""
        object.__setattr__(self, "delimiter", _NAMED.get(self.delimiter or "", self.delimiter))
        given = {_option(name): value for name, value in self.given.items()}
        if self.csv_quote == NO_QUOTES:
            del given["--csv-quote"]
        for option, value in given.items():
            if len(value) != 1 or value in "\r\n\0\ufeff":
                raise ConfigError(
                    f"{option} is {value!r}, which is not one character. Pass one, such as ';' or "
                    "tab for --delimiter, '\\' for --csv-escape, \"'\" or none for --csv-quote."
                )
        if len(set(given.values())) < len(given):
            raise ConfigError(f"{' and '.join(given)} are the same character. Pass different ones.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Take the dialect out of what has it among other options."""
        return cls(**{field.name: options.get(field.name) for field in dataclasses.fields(cls)})

    @property
    def given(self) -> dict[str, str]:
        """Name -> value of what was given."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def refuse_for(self, what: str) -> None:
        """Raise ConfigError if any was given, which has nothing to say about this data set."""
        if self.given:
            raise ConfigError(
                f"{', '.join(map(_option, self.given))} is for csv, tsv and tab files; {what} is "
                "none. Leave it away."
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


AS_THE_SUFFIX_SAYS = Dialect()


@dataclasses.dataclass(frozen=True)
class DatasetOptions:
    """Which texts and labels are meant; the command's options of the same names say more."""

    dataset: str
    """Alias, Hub id or path."""
    _: dataclasses.KW_ONLY
    config: str | None = None
    """Configuration of a Hub data set."""
    splits: Sequence[str] = ()
    """The wanted ones, by any of their names; none means all labelled ones."""
    text_column: str | None = None
    """Column of the texts, or two with a comma between; None detects it."""
    label_column: str | None = None
    """Column of the labels; None detects it."""
    unlabelled: str | None = None
    """What stands in it where there is no label; "" is an empty cell, null or NaN."""
    limit: int | None = None
    """Examples a split, stratified by label."""
    seed: int = 0
    """Seed of that choice."""
    dialect: Dialect = AS_THE_SUFFIX_SAYS
    """How delimited files are written."""

    @property
    def recorded(self) -> dict[str, str | int | None]:
        """What a cache records of these choices, under the names of the options.

        What later versions added is there only where it was given, since older caches lack it.
        """
        marked = {} if self.unlabelled is None else {"unlabelled": self.unlabelled}
        seed = self.seed if self.limit else None
        return {"limit": self.limit, "seed": seed, **self.dialect.given, **marked}
