"""How a delimited file is written, where its suffix does not say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from llmembed.common.errors import ConfigError

_NAMED = {"tab": "\t", "\\t": "\t", "space": " "}
NO_QUOTES = "none"
_OPTIONS = {"delimiter": "delimiter", "escape": "csv_escape", "quote": "csv_quote"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    r"""What was given of `--delimiter`, `--csv-escape` and `--csv-quote`; None is the suffix's way.

    Raises:
        ConfigError: one of them is not a single character that can serve so.

    >>> Dialect(delimiter="tab")
    Dialect(delimiter='\t', escape=None, quote=None)
    """

    delimiter: str | None = None
    """Between the fields of a row."""
    escape: str | None = None
    """Before a character that stands for itself."""
    quote: str | None = None
    """Around a field; `NO_QUOTES` if quotes are characters as any other."""

    def __post_init__(self) -> None:
        """Check each, and that they differ."""
        if self.delimiter is not None:
            object.__setattr__(self, "delimiter", _NAMED.get(self.delimiter, self.delimiter))
        characters = {
            "--delimiter": self.delimiter,
            "--csv-escape": self.escape,
            "--csv-quote": None if self.quote == NO_QUOTES else self.quote,
        }
        given = {option: value for option, value in characters.items() if value is not None}
        for option, value in given.items():
            if len(value) != 1 or value in "\r\n\0\ufeff":
                message = (
                    f"{option} is {value!r}, which is not one character. Pass one, such as ';' or "
                    "tab for --delimiter, '\\' for --csv-escape, \"'\" or none for --csv-quote."
                )
                raise ConfigError(message)
        if len(set(given.values())) < len(given):
            message = f"{' and '.join(given)} are the same character. Pass different ones."
            raise ConfigError(message)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Take the dialect out of what has it under the names of the options, among others."""
        return cls(**{field: options.get(option) for field, option in _OPTIONS.items()})

    @property
    def given(self) -> dict[str, str]:
        """Option name, as in `ExtractConfig` -> value, of what was given."""
        options = {option: getattr(self, field) for field, option in _OPTIONS.items()}
        return {option: value for option, value in options.items() if value is not None}

    def refuse_for(self, what: str) -> None:
        """Refuse options that have nothing to say about something that is not delimited.

        Raises:
            ConfigError: any was given.
        """
        if self.given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in self.given)
            message = f"{names} is for csv, tsv and tab files; {what} is none. Leave it away."
            raise ConfigError(message)


AS_THE_SUFFIX_SAYS = Dialect()
